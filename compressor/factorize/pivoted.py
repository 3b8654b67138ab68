"""Pivoted pairs: a rank-r matrix as r of its own rows and the coefficients of the others in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.factorize.truncated_svd import FactorPair
from compressor.measure.scale import power_of_two
from compressor.torch_state import in_float64

# A swap of two rows is worth its cost while it enlarges the volume of the chosen rows by more than this factor;
# afterwards no coefficient is larger.
LARGEST_COEFFICIENT = 2.0


@dataclass(frozen=True)
class PivotedPair:
    """`W = concatenate(down, up @ down)[order]`: `r * (d_out + d_in - r)` numbers and the order of the rows.

    `down` is `r x d_in`, `up` is `(d_out - r) x r`, and `order` of `d_out` int32 says where each row of W is found.
    """

    up: Tensor
    down: Tensor
    order: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def product(self) -> Tensor:
        """The `d_out x d_in` matrix that the pair stands for."""
        return torch.cat([self.down, self.up @ self.down])[self.order.long()]


def pivoted_pair(pair: FactorPair) -> PivotedPair:
    """The same matrix as `pair.product()`, stored as r of its rows and coefficients, all at most 2 in size.

    The rows are those of (nearly) maximal volume: the pivots of an LU decomposition of an orthonormal basis of the
    column space, improved by swaps until no coefficient exceeds `LARGEST_COEFFICIENT` (Goreinov, Oseledets,
    Savostyanov, Tyrtyshnikov and Zamarashkin, "How to find a good submatrix", 2010). The storage is that of PIFA (Zhao
    et al., ICML 2025). The arithmetic is in float64; in float32 for a pair in float32, such as those of truncated SVDs,
    whose columns are orthogonal.
    """
    d_out, rank = pair.up.shape
    basis = _orthonormal(pair.up)
    permutation = torch.linalg.lu_factor(basis).pivots
    rows = _apply_transpositions(permutation, d_out)
    coefficients = torch.linalg.solve(basis[rows[:rank]], basis[rows[rank:]], left=False)
    swapped = False
    while coefficients.numel():
        flat = int(coefficients.abs().argmax())
        i, j = divmod(flat, rank)
        pivot = coefficients[i, j].clone()
        if pivot.abs() <= LARGEST_COEFFICIENT:
            break
        # Exchange chosen row j with left-out row i: a rank-one update of the coefficients (Sherman and Morrison).
        row, column = coefficients[i].clone(), coefficients[:, j].clone()
        row[j] -= 1
        column[i] += 1
        coefficients.sub_(torch.outer(column, row) / pivot)
        rows[j], rows[rank + i] = rows[rank + i].clone(), rows[j].clone()
        swapped = True
    if swapped:  # their rounding is shed by solving once more for the rows they ended at
        coefficients = torch.linalg.solve(basis[rows[:rank]], basis[rows[rank:]], left=False)
    order = torch.empty(d_out, dtype=torch.int32, device=rows.device)
    order[rows] = torch.arange(d_out, dtype=torch.int32, device=rows.device)
    return PivotedPair(up=coefficients, down=pair.up[rows[:rank]] @ pair.down, order=order)


def _orthonormal(up: Tensor) -> Tensor:
    """An orthonormal basis of the columns; of those of a pair in float32 it is taken that they are orthogonal."""
    if up.dtype == torch.float32:
        columns: Tensor = up / torch.linalg.vector_norm(up, dim=0).clamp_min(torch.finfo(up.dtype).tiny)
        return columns
    basis: Tensor = torch.linalg.qr(in_float64(up) / power_of_two(up)).Q
    return basis


def _apply_transpositions(pivots: Tensor, size: int) -> Tensor:
    """LAPACK's sequence of row swaps (counted from one) as a permutation of `size` rows."""
    rows = list(range(size))
    for i, j in enumerate((pivots - 1).tolist()):
        rows[i], rows[j] = rows[j], rows[i]
    return torch.tensor(rows, dtype=torch.long, device=pivots.device)
