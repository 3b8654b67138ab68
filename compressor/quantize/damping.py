"""Moments that are damped, and their triangular factors in the order of their diagonals."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.measure.scale import power_of_two
from compressor.torch_state import in_float64


def damped(moment: Tensor, share: float) -> Tensor:
    """A moment divided by a power of two, with `damping_of` it added to the diagonal."""
    moment = in_float64(moment)
    moment = moment / power_of_two(moment)
    added = damping_of(moment, share)
    if moment.dim() == 1:
        return moment + added
    return moment + torch.diag(added.expand(len(moment)))


def damping_of(moment: Tensor, share: float) -> Tensor:
    """A share of the mean of a moment's diagonal; 1 where it is zero, so that the sum is the identity."""
    mean = diagonal_of(moment).mean()
    return torch.where(mean > 0, share * mean, 1.0)


def diagonal_of(moment: Tensor) -> Tensor:
    """The diagonal of a moment, which may be given as its diagonal alone."""
    return moment if moment.dim() == 1 else moment.diagonal()


def descending(moment: Tensor) -> Tensor:
    """The order of the diagonal, the largest first."""
    return diagonal_of(moment).argsort(descending=True, stable=True)


def upper_factor(moment: Tensor) -> Tensor:
    """F of `F F^T`, upper triangular with a positive diagonal."""
    factor: Tensor = torch.linalg.cholesky(moment.flip(0, 1)).flip(0, 1)
    return factor
