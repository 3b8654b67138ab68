"""Singular values and vectors of a weight matrix from the smaller of its two Gram matrices."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from compressor.measure.effective_rank import Spectrum
from compressor.measure.eigen import eigh, eigvalsh
from compressor.measure.scale import power_of_two
from compressor.torch_state import float64_device, in_float64


def smaller_gram(matrix: Tensor, scale: float = 1.0) -> Tensor:
    """`W W^T` or `W^T W`, whichever is smaller, of `matrix / scale`, accumulated in float64.

    The weight is converted a few rows at a time, so that there is never a float64 copy of it.
    """
    d_out, d_in = matrix.shape
    tall = matrix.T if d_out <= d_in else matrix  # n x d with n >= d, and the Gram matrix is d x d
    d = tall.shape[1]
    gram = torch.zeros(d, d, dtype=torch.float64, device=float64_device(matrix.device))
    rows = max(1, 2**22 // d)
    for block in torch.split(tall, rows):
        wide = in_float64(block) / scale
        gram.addmm_(wide.T, wide)
    return gram


def singular_values(matrix: Tensor) -> Spectrum:
    """Singular values of a `d_out x d_in` matrix of any floating dtype, descending, in float64.

    Accurate to about 1e-7 of the largest (the square root of float64's precision, since the Gram matrix squares the
    spectrum; smaller values are returned as zero): finer than the rounding of float32 weights, at a fraction of the
    cost of a singular value decomposition. A matrix times a power of two has the same singular values times it, in
    every digit.
    """
    scale = power_of_two(matrix)
    return _roots(eigvalsh(smaller_gram(matrix, scale)).flip(0), scale)


def _roots(eigenvalues: Tensor, scale: float) -> Spectrum:
    """Singular values from the eigenvalues of a Gram matrix, descending, of the matrix beside `scale`."""
    # What is left of a zero eigenvalue is rounding, not rank.
    noise = len(eigenvalues) * torch.finfo(torch.float64).eps * float(eigenvalues[0])
    kept = torch.where(eigenvalues < noise, 0.0, eigenvalues)
    return scale * np.asarray(kept.sqrt().cpu().numpy(), dtype=np.float64)


@dataclass(frozen=True)
class Precision:
    """What float32 may cost a decomposition of a matrix, and where it is tried.

    Attributes:
        loss: Share of the energy that the best pair captures, at any rank, that float32 may lose.
        side: The smaller side of a matrix from which on it is tried: below float64 takes no time to speak of.
        graded: Ratio to the largest eigenvalue below which eigenvalues are found in a Gram matrix of their own, because
            that of the whole matrix has only a few digits of them.
    """

    loss: float = 1e-6
    side: int = 512
    graded: float = 1e-2


@dataclass(frozen=True)
class SingularBasis:
    """Singular values of a matrix, descending, and the singular vectors of its smaller side as columns."""

    values: Spectrum
    vectors: Tensor


def singular_basis(matrix: Tensor, precision: Precision) -> SingularBasis:
    """Singular values and vectors of the smaller side of a `d_out x d_in` matrix, from one decomposition.

    The vectors are in float32 where its loss, which is estimated from the products of all vectors with the matrix, is
    within `precision`; else in float64, with the values of `singular_values` up to rounding.
    """
    if matrix.dtype != torch.float64 and min(matrix.shape) >= precision.side and precision.loss > 0:
        found = _in_float32(matrix, precision)
        if found is not None:
            return found
    scale = power_of_two(matrix)
    eigenvalues, vectors = eigh(smaller_gram(matrix, scale))
    return SingularBasis(_roots(eigenvalues.flip(0), scale), vectors.flip(1))


def _in_float32(matrix: Tensor, precision: Precision) -> SingularBasis | None:
    """The basis in float32; None where it might lose more than it may, or where a value may as well be zero."""
    scale = power_of_two(matrix)
    rows = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    size = len(rows)
    gram = torch.zeros(size, size, device=matrix.device)
    columns = torch.split(rows, max(1, 2**24 // size), dim=1)
    for block in columns:
        _add_products(gram, block.to(torch.float32) / scale)
    _mirror(gram)
    total = float(gram.trace())
    vectors = eigh(gram)[1].flip(1)
    # The Gram matrix in its own eigenvectors: what is off the diagonal they failed to separate.
    rotated = torch.zeros_like(gram)
    _add_products(rotated, vectors.T.contiguous(), gram @ vectors)
    energies = in_float64(rotated.diagonal())
    large = int((energies >= precision.graded * energies[0]).sum())
    if large < size:
        rest, tail = vectors[:, large:].T.contiguous(), torch.zeros(size - large, size - large, device=matrix.device)
        for block in columns:
            _add_products(tail, rest @ (block.to(torch.float32) / scale))
        if large >= size / 2:  # else that takes as long as the decomposition itself
            _mirror(tail)
            turn = eigh(tail)[1].flip(1)
            vectors[:, large:], rotated[:large, large:] = vectors[:, large:] @ turn, rotated[:large, large:] @ turn
            tail = turn.T @ (tail @ turn)
        rotated[large:, large:] = tail
        energies[large:] = in_float64(tail.diagonal())
    _mirror(rotated)
    order = energies.argsort(descending=True).to(rows.device)
    energies, vectors = energies[order.to(energies.device)], vectors[:, order].contiguous()
    lost = _loss_by_exchanges(rotated[order][:, order], energies)
    off = abs(float(energies.sum()) - total)
    least = float(energies[-1]) / float(energies[0]) if float(energies[0]) > 0 else 0.0
    certain = lost <= precision.loss and off <= precision.loss * total
    if not certain or not least > size * torch.finfo(torch.float32).eps ** 2:
        return None
    return SingularBasis(_roots(energies, scale), vectors)


def _add_products(products: Tensor, rows: Tensor, columns: Tensor | None = None, *, parts: int = 8) -> None:
    """Add `rows @ columns`, or `rows @ rows.T`, to the upper triangle, in blocks of which those below are left out."""
    columns = rows.T if columns is None else columns
    size = len(products)
    edges = [size * part // parts for part in range(parts + 1)]
    for start, end in pairwise(edges):
        products[start:end, start:].addmm_(rows[start:end], columns[:, start:])


def _mirror(upper: Tensor, *, parts: int = 8) -> None:
    """Make a matrix symmetric of which `_add_products` made the upper triangle."""
    size = len(upper)
    edges = [size * part // parts for part in range(parts + 1)]
    for start, end in pairwise(edges):
        upper[end:, start:end] = upper[start:end, end:].T


def _loss_by_exchanges(rotated: Tensor, energies: Tensor) -> float:
    """An estimate of the largest share, over the ranks, of what the first r vectors capture that the best r would add.

    `rotated` is the Gram matrix in the basis of the vectors, and `energies` its diagonal, descending. An exchange
    between vectors i <= r < j with the product h gains at most `h^2 / (energy_i - energy_j)`, and at most h; that the
    gains of all exchanges add up holds to second order, so this is no bound.
    """
    gained = rotated.abs()
    sizes = energies.to(gained)
    gaps = (sizes[:, None] - sizes[None, :]).clamp_min_(torch.finfo(torch.float32).tiny)
    gained.mul_(torch.div(gained, gaps, out=gaps).clamp_max_(1)).triu_(1)
    lost = (in_float64(gained.sum(1)) - in_float64(gained.sum(0))).cumsum(0)
    return float((lost / energies.cumsum(0)).max())
