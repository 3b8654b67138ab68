"""Truncated SVD of one matrix as a pair of factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.measure.eigen import eigh
from compressor.measure.scale import power_of_two
from compressor.measure.spectrum import smaller_gram
from compressor.torch_state import in_float64


@dataclass(frozen=True)
class FactorPair:
    """`W ~ up @ down`, with `up` of `d_out x r` and `down` of `r x d_in`."""

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def product(self) -> Tensor:
        """The `d_out x d_in` matrix that the pair stands for."""
        return self.up @ self.down

    def scaled(self, factor: float) -> FactorPair:
        """The pair times a positive factor, the root of it in each; itself where that is one."""
        return self if factor == 1 else FactorPair(self.up * factor**0.5, self.down * factor**0.5)


def truncated_svd(matrix: Tensor, rank: int) -> FactorPair:
    """Best rank-`rank` approximation of a `d_out x d_in` matrix in the Frobenius norm, in float64.

    By Eckart and Young (1936) it is the projection on the leading singular vectors of one side: `U_r (U_r^T W)`, with U
    the eigenvectors of `W W^T`, or `(W V_r) V_r^T` when the right side is the smaller. One factor is orthonormal and
    nothing is divided by a singular value, so rank-deficient matrices need no special care.
    """
    d_out, d_in = matrix.shape
    if not 1 <= rank <= min(d_out, d_in):
        raise ValueError(f"rank {rank} is outside 1 .. {min(d_out, d_in)} of a {d_out} x {d_in} matrix")
    basis = eigh(smaller_gram(matrix, power_of_two(matrix)))[1][:, -rank:].flip(1)
    wide = in_float64(matrix)
    if d_out <= d_in:
        return FactorPair(up=basis.contiguous(), down=basis.T @ wide)
    return FactorPair(up=wide @ basis, down=basis.T.contiguous())


def working_bytes(shape: tuple[int, int]) -> int:
    """Bytes that a layer of `d_out x d_in` takes while it is factorized, in float64.

    The matrix, its factors, their product, and what lies between them take `5 d_out d_in` numbers, and the Gram matrix
    of the smaller side, its eigenvectors, and the work space of LAPACK's `syevd` `5 min(d_out, d_in)^2`.
    """
    return 5 * torch.float64.itemsize * (shape[0] * shape[1] + min(shape) ** 2)
