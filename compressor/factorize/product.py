"""The SVD of a product that is given by its factors, from these alone.

With QR decompositions of both, of `up = Q_u R_u` and of `down^T = Q_d R_d`, the product is `Q_u (R_u R_d^T) Q_d^T`, and
the SVD of the `r x r` matrix in between is that of the product: `(d_out + d_in) r^2` multiplications instead of `d_out
d_in min(d_out, d_in)`, and never a matrix of the product's size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compressor.factorize.truncated_svd import FactorPair
from compressor.measure import Spectrum
from compressor.measure.scale import power_of_two
from compressor.torch_state import in_float64


@dataclass(frozen=True)
class ProductSVD:
    """The SVD `up diag(values) down` of a product, in float64: orthonormal columns and rows, descending values."""

    up: Tensor
    values: Tensor
    down: Tensor

    @property
    def spectrum(self) -> Spectrum:
        """The singular values; those that are rounding alone are zero."""
        values = np.asarray(self.values.cpu().numpy(), dtype=np.float64)
        noise = len(values) * np.finfo(np.float64).eps * values.max(initial=0.0)
        return np.where(values < noise, 0.0, values)

    def pair(self, rank: int) -> FactorPair:
        """The nearest matrix of this rank; its size is in the rows of `down`, and `up` is orthonormal."""
        if not 1 <= rank <= len(self.values):
            raise ValueError(f"rank {rank} is outside 1 .. {len(self.values)} of the product")
        return FactorPair(
            up=self.up[:, :rank].contiguous(), down=(self.values[:rank, None] * self.down[:rank]).contiguous()
        )

    def even_pair(self, rank: int) -> FactorPair:
        """The same matrix with its size shared evenly by the columns of `up` and the rows of `down`."""
        roots = self.values[:rank].sqrt()
        return FactorPair(up=self.up[:, :rank] * roots, down=roots[:, None] * self.down[:rank])


@dataclass(frozen=True)
class Product:
    """The product of a pair's factors, which is not formed."""

    factors: FactorPair

    @property
    def rank(self) -> int:
        return self.factors.rank

    @property
    def norm(self) -> float:
        """Its Frobenius norm."""
        return product_norm(self.factors)

    def svd(self) -> ProductSVD:
        return product_svd(self.factors)

    def pair(self) -> FactorPair:
        return self.factors


def product_svd(pair: FactorPair) -> ProductSVD:
    """The SVD of `pair.up @ pair.down`, which is not formed."""
    (up, up_scale), (down, down_scale) = (_scaled(each) for each in (pair.up, pair.down))
    left, right = torch.linalg.qr(up), torch.linalg.qr(down.T)
    own, values, other = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    return ProductSVD(left.Q @ own, up_scale * down_scale * values, other @ right.Q.T)


def product_norm(pair: FactorPair) -> float:
    """The Frobenius norm of `pair.up @ pair.down`, which is not formed."""
    (up, up_scale), (down, down_scale) = (_scaled(each) for each in (pair.up, pair.down))
    core = torch.linalg.qr(up, mode="r").R @ torch.linalg.qr(down.T, mode="r").R.T
    return up_scale * down_scale * float(torch.linalg.vector_norm(core))


def product_difference(first: FactorPair, second: FactorPair) -> FactorPair:
    """The difference of two products as one, of the sum of their ranks."""
    up = torch.cat([in_float64(first.up), -in_float64(second.up)], dim=1)
    return FactorPair(up=up, down=torch.cat([in_float64(first.down), in_float64(second.down)]))


def product_bytes(shape: tuple[int, int], rank: int) -> int:
    """Bytes that a `d_out x d_in` product of this rank takes while its rank is lowered, in float64.

    Its factors, those beside their scale, their orthonormal bases and new factors are four times theirs, and the
    difference of both products with its decomposition another six.
    """
    return 10 * torch.float64.itemsize * rank * sum(shape)


def _scaled(factor: Tensor) -> tuple[Tensor, float]:
    """A factor in float64 beside a power of two of its size."""
    scale = power_of_two(factor)
    return in_float64(factor) / scale, scale
