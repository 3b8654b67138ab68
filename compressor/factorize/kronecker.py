"""The SVD of a Kronecker product from those of its two factors: the product is never formed.

With `A = U S V^T` and `B = P T Q^T`, `A (x) B = (U (x) P) (S (x) T) (V (x) Q)^T`: Kronecker products of orthonormal
columns are orthonormal, and the singular values are all products of one of A and one of B (Van Loan 2000, The
ubiquitous Kronecker product).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compressor.factorize.product import ProductSVD, product_norm, product_svd
from compressor.factorize.truncated_svd import FactorPair
from compressor.measure import Spectrum


@dataclass(frozen=True)
class KroneckerSVD:
    """The SVD of the Kronecker product of two matrices, as the SVD of each."""

    first: ProductSVD
    second: ProductSVD

    @property
    def spectrum(self) -> Spectrum:
        """The singular values, descending; those that are rounding alone are zero."""
        return -np.sort(-np.outer(self.first.spectrum, self.second.spectrum).ravel())

    def even_pair(self, rank: int) -> FactorPair:
        """The nearest matrix of this rank, its size shared evenly by the columns of `up` and the rows of `down`."""
        values = torch.outer(self.first.values, self.second.values).flatten()
        kept = torch.argsort(values, descending=True, stable=True)[:rank]
        of_second = len(self.second.values)
        left, right = kept // of_second, kept % of_second
        roots = values[kept].sqrt()
        up = _columnwise(self.first.up[:, left], self.second.up[:, right])
        down = _columnwise(self.first.down[left].T, self.second.down[right].T).T
        return FactorPair(up=up * roots, down=roots[:, None] * down)


@dataclass(frozen=True)
class KroneckerProduct:
    """The Kronecker product of two matrices, each given by its factors."""

    first: FactorPair
    second: FactorPair

    @property
    def rank(self) -> int:
        return self.first.rank * self.second.rank

    @property
    def norm(self) -> float:
        """Its Frobenius norm."""
        return product_norm(self.first) * product_norm(self.second)

    def svd(self) -> KroneckerSVD:
        return KroneckerSVD(product_svd(self.first), product_svd(self.second))

    def pair(self) -> FactorPair:
        """Its factors, the Kronecker products of those of the two."""
        # Of views kron fails.
        first, second = (FactorPair(each.up.contiguous(), each.down.contiguous()) for each in (self.first, self.second))
        return FactorPair(torch.kron(first.up, second.up), torch.kron(first.down, second.down))


def _columnwise(first: Tensor, second: Tensor) -> Tensor:
    """The Kronecker product of each column of one with that of the other (Khatri-Rao)."""
    return (first[:, None, :] * second[None, :, :]).flatten(0, 1)
