"""How much of the difference between two stored weights is rounding, and which of its singular values are.

A weight that was computed in a wider type and rounded to its dtype has an error of variance `ulp^2 / 12`, as long as
the change is not small compared with the spacing `ulp` of the stored numbers. If it is small, most numbers have not
moved at all, and rounding added no more to the others than they moved by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Rounding:
    """The part of a difference that is rounding.

    `size` is the Frobenius norm of the difference and `share` the relative norm of the part. `edge` is the largest
    singular value of the part alone: for independent errors of variance `v_ij` it is at most about `sqrt(max_i sum_j
    v_ij) + sqrt(max_j sum_i v_ij)` (Bandeira and van Handel, 2016), which is `s (sqrt(m) + sqrt(n))` if all are `s^2`.
    """

    size: float
    share: float
    edge: float

    def explains(self, largest: float) -> bool:
        """Whether a difference with this largest singular value is rounding, as far as anybody can tell.

        It is nine tenths of the norm, and no singular value stands clearly above the edge, which holds for many
        independent errors: few that are far apart exceed it a little.
        """
        return self.share >= 0.9 and largest <= 1.5 * self.edge


def rounding(stored: Tensor, difference: Tensor) -> Rounding:
    """Estimate the rounding to the dtype of `stored` in `difference`, which is `stored` minus an exact start, in
    float64.

    Numbers are grouped by their spacing; rounding never has more energy than the differences themselves.
    """
    weights = stored.to(torch.float64)
    exponents = _spacing_exponents(weights, _narrowest(stored))
    steps, group = torch.unique(exponents, return_inverse=True)
    uniform = torch.exp2(2.0 * steps) / 12
    energy = torch.zeros_like(uniform).index_add_(0, group.flatten(), difference.square().flatten())
    counts = torch.bincount(group.flatten(), minlength=len(steps))
    variances = torch.minimum(uniform, energy / counts)[group]
    total, rounded = float(energy.sum()), float(variances.sum())
    matrix = variances.flatten(1) if variances.dim() > 1 else variances.reshape(1, -1)
    edge = float(matrix.sum(1).max().sqrt() + matrix.sum(0).max().sqrt())
    return Rounding(total**0.5, (rounded / total) ** 0.5 if total > 0 else 0.0, edge)


def _narrowest(stored: Tensor) -> torch.dtype:
    """The narrowest dtype that holds all of the numbers: rounded weights may have been stored in a wider one later."""
    if stored.dtype in _NARROW:
        return stored.dtype
    return next((dtype for dtype in _NARROW if torch.equal(stored.to(dtype).to(stored.dtype), stored)), stored.dtype)


def _spacing_exponents(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """The base-2 logarithm of the spacing of the dtype's numbers at each weight."""
    precision = torch.finfo(dtype)
    # frexp's mantissas are below one, where the spacing is that of numbers just below the power of two.
    exponents = torch.frexp(weights).exponent.to(torch.float64) - 1 + math.log2(precision.eps)
    smallest = math.log2(precision.smallest_normal * precision.eps)
    # Zero has no exponent; the numbers around it are the closest of all.
    return exponents.clamp_min(smallest).masked_fill(weights == 0, smallest)
