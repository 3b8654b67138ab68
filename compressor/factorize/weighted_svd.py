"""Truncated SVD in the metric of the loss: the second-order cost of changing a layer, and the pair that costs least.

To second order a change D of a layer's `d_out x d_in` matrix costs `1/2 tr(S_g D S_x D^T)` of loss, where `S_x = E[x
x^T]` of the layer's inputs and `S_g = E[g g^T]` of the loss gradient at its outputs (Martens and Grosse, "Optimizing
neural networks with Kronecker-factored approximate curvature", ICML 2015). The best matrix of rank r is the truncated
SVD of `S_g^(1/2) W S_x^(1/2)` mapped back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from compressor.factorize.truncated_svd import FactorPair
from compressor.measure import Precision, Spectrum, singular_basis
from compressor.measure.eigen import eigh
from compressor.measure.scale import power_of_two
from compressor.torch_state import in_float64

# No float32.
EXACT = Precision(loss=0.0)


@dataclass(frozen=True)
class Metric:
    """Two positive definite matrices in float64: `inputs` of `d_in x d_in` and `gradients` of `d_out x d_out`.

    For a layer with a bias `inputs` is the covariance and `mean` the mean of the inputs (`d_in`): the bias compensates
    for the change of the mean output. Without a bias `mean` is None.

    Either may be a vector, which stands for the diagonal matrix. The inputs of an embedding are its tokens, of which
    there is one at a time, and `E[x x^T]` has their frequencies on its diagonal and nothing else; and of a head with
    many classes only the diagonal of `E[g g^T]` is used.
    """

    inputs: Tensor
    gradients: Tensor
    mean: Tensor | None = None

    def squared_size(self, matrix: Tensor) -> float:
        """`tr(S_g D S_x D^T)` of a `d_out x d_in` matrix D: twice the loss that changing a layer by it costs."""
        return max(0.0, float((weighed(_times(matrix, self.inputs), self.gradients) * matrix).sum()))

    @property
    def transposed(self) -> Metric:
        """That of the transposed matrix, of which no mean of the inputs is known."""
        return Metric(self.gradients, self.inputs)

    def mean_output(self, matrix: Tensor) -> Tensor:
        """What a `d_out x d_in` matrix makes of the mean of the inputs, which is known."""
        assert self.mean is not None
        return matrix @ self.mean


@dataclass(frozen=True)
class Decomposition:
    """What gives the best pair of every rank for one `d_out x d_in` matrix in one metric, from one decomposition.

    Without a metric it is that of the matrix itself, in the Frobenius norm.

    Attributes:
        values: Singular values of `S_g^(1/2) W S_x^(1/2)`, descending; the sum of the dropped ones squared is twice the
            loss. Of a tied embedding what takes their place.
        basis: `n x n` for the smaller side n of the matrix: `L^-T U`, where `L L^T` is the moment of this side and U
            has the eigenvectors of the smaller Gram matrix of `S_g^(1/2) W S_x^(1/2)`. The first r columns are the best
            r-dimensional space to project the matrix on.
    """

    values: Spectrum
    basis: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """The decomposition as tensors by name, to be kept."""
        return {"values": torch.from_numpy(self.values.copy()), "basis": self.basis}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Decomposition:
        """The decomposition that was kept as `tensors`."""
        return cls(tensors["values"].cpu().numpy(), tensors["basis"])

    def pair(self, matrix: Tensor, rank: int, metric: Metric | None) -> FactorPair:
        """The rank-`rank` matrix W' that minimizes `tr(S_g (W - W') S_x (W - W')^T)`, in float64.

        The rows of `down` carry the size of W', `up` is orthonormal, so that neither loses digits when it is rounded.
        A basis that was rounded costs next to nothing: the matrix is projected on the space that it spans. Without a
        metric the pair is in the precision of the basis, and one of its factors is a part of it.
        """
        require_rank(matrix, rank)
        if metric is None:
            basis = self.basis[:, :rank]
            wide = matrix.to(basis.dtype)
            if matrix.shape[0] <= matrix.shape[1]:
                return FactorPair(up=basis.contiguous(), down=basis.T @ wide)
            return FactorPair(up=wide @ basis, down=basis.T.contiguous())
        space = torch.linalg.qr(in_float64(self.basis[:, :rank])).Q
        wide = in_float64(matrix)
        if matrix.shape[0] <= matrix.shape[1]:
            return FactorPair(up=space, down=coordinates(space, metric.gradients) @ wide)
        up, triangular = torch.linalg.qr(wide @ coordinates(space, metric.inputs).T)
        return FactorPair(up=up, down=triangular @ space.T)

    def components(self, matrix: Tensor, metric: Metric) -> FactorPair:
        """The pair of full rank whose first r columns of `up` and rows of `down` are the best matrix of rank r."""
        wide, basis = in_float64(matrix), in_float64(self.basis)
        if matrix.shape[0] <= matrix.shape[1]:
            return FactorPair(up=basis, down=_times(basis.T, metric.gradients) @ wide)
        return FactorPair(up=wide @ _times(basis.T, metric.inputs).T, down=basis.T)

    def rounded(self, matrix: Tensor, metric: Metric, largest_loss: float) -> Decomposition:
        """The same with the basis in float32, where that costs no rank more than this share of what it captures.

        In coordinates in which the metric is the identity rounding moves the basis by d in the Frobenius norm. So the
        sines of the angles by which any of the spaces turns have squares that sum to at most `d^2 / (1 - d)^2`, and
        each costs at most the largest eigenvalue, which all of them capture.
        """
        moment = metric.gradients if matrix.shape[0] <= matrix.shape[1] else metric.inputs
        if self.basis.dtype == torch.float32:
            return self
        scale = power_of_two(moment)
        narrow = self.basis.to(torch.float32)
        moved = ((self.basis - narrow) * scale**0.5).to(torch.float32)
        squares = float((_times(moved.T, (moment / scale).to(torch.float32)) * moved.T).sum())
        # Not where they are too large, and not where they are not finite.
        within = squares < 1 and squares / (1 - squares**0.5) ** 2 <= largest_loss
        return replace(self, basis=narrow) if within else self


def decompose(matrix: Tensor, metric: Metric | None, precision: Precision = EXACT) -> Decomposition:
    """Decompose a `d_out x d_in` matrix in a metric, or in none: in float32 where `precision` allows it."""
    if metric is None:
        found = singular_basis(matrix, precision)
        return Decomposition(found.values, found.vectors)
    if min(matrix.shape) >= precision.side and precision.loss > 0:
        narrow = _in_float32(matrix, metric, precision)
        if narrow is not None:
            return narrow
    scale = power_of_two(matrix)
    gram, factor = _weighted_gram(in_float64(matrix) / scale, metric)
    eigenvalues, vectors = eigh(gram)
    values = scale * np.asarray(eigenvalues.clamp_min(0).sqrt().flip(0).cpu().numpy(), dtype=np.float64)
    return Decomposition(values, torch.linalg.solve_triangular(factor.T, vectors.flip(1), upper=True))


def weighted_truncated_svd(matrix: Tensor, rank: int, metric: Metric) -> FactorPair:
    """`Decomposition.pair` of one rank."""
    return decompose(matrix, metric).pair(matrix, rank, metric)


def coordinates(space: Tensor, moment: Tensor) -> Tensor:
    """`(U^T S U)^-1 U^T S` for `n x r` columns U: times U it is the projection on their span in the metric S.

    Both may have a first dimension more, of as many spaces and metrics.
    """
    weighted = _times(space.mT, moment)
    gram = weighted @ space
    solved: Tensor = torch.cholesky_solve(weighted, torch.linalg.cholesky((gram + gram.mT) / 2))
    return solved


def require_rank(matrix: Tensor, rank: int) -> None:
    """Raise ValueError for a rank that a `d_out x d_in` matrix does not have."""
    d_out, d_in = matrix.shape
    if not 1 <= rank <= min(d_out, d_in):
        raise ValueError(f"rank {rank} is outside 1 .. {min(d_out, d_in)} of a {d_out} x {d_in} matrix")


def _weighted_gram(wide: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """`A A^T` or `A^T A` of `A = S_g^(1/2) W S_x^(1/2)`, whichever is smaller, and the Cholesky factor of its side."""
    if wide.shape[0] <= wide.shape[1]:
        factor = _root(metric.gradients)
        half = factor.T @ wide
        return _times(half, metric.inputs) @ half.T, factor
    factor = _root(metric.inputs)
    half = wide @ factor
    return half.T @ weighed(half, metric.gradients), factor


def _in_float32(
    matrix: Tensor, metric: Metric, precision: Precision, *, probes: int = 16, most_of_one: float = 0.9
) -> Decomposition | None:
    """The decomposition in float32; None where it is estimated to lose more than it may.

    What rounding left of the equations of the eigenvectors is looked at in float64, through its products with a few
    random vectors: they take a hundredth of the multiplications.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    rows, own, other = (
        (matrix, metric.gradients, metric.inputs) if wide else (matrix.T, metric.inputs, metric.gradients)
    )
    scale, of_own, of_other = power_of_two(matrix), _power_of_four(own), _power_of_four(other)
    rows, own, other = in_float64(rows) / scale, own / of_own, other / of_other
    factor, failed = _root_in_float32(own)
    if failed:
        return None
    half = factor.T @ rows.to(torch.float32)
    gram = _times(half, other.to(torch.float32)) @ half.T
    # Where one direction has nearly all there is, too few digits are left of the others.
    if not torch.linalg.matrix_norm(gram) < most_of_one * gram.trace():
        return None
    eigenvalues, vectors = eigh(gram)
    basis = torch.linalg.solve_triangular(factor.T, vectors.flip(1), upper=True)
    energies, exact = in_float64(eigenvalues).flip(0).clamp_min(0), in_float64(basis)
    random = torch.randn(len(basis), probes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    random = random.to(exact.device)
    weighted = weighed(exact @ random, own)
    left = rows @ weighed(rows.T @ weighted, other) - exact @ (energies[:, None] * random)
    sizes = (exact.T @ weighed(left, own)).square().mean(1).sqrt()
    basis = basis / of_own**0.5
    if not torch.isfinite(basis).all() or not _loss_by_turns(energies, sizes) <= precision.loss:
        return None
    values = scale * (of_own * of_other) ** 0.5 * energies.sqrt()
    return Decomposition(np.asarray(values.cpu().numpy(), dtype=np.float64), basis)


def _loss_by_turns(energies: Tensor, sizes: Tensor, at_once: int = 512) -> float:
    """An estimate of the largest share, over the ranks, of the best r vectors' energy that the first r do not capture.

    `sizes` are the norms of the rows of what `energies`, descending, leave of the matrix in the basis of the vectors.
    To second order a product h of vectors i <= r < j costs `h^2 / (energy_i - energy_j)`, and at most h. All products
    of j together are taken to be with i = r, from which it differs least: that is no bound, but one to seven times what
    is lost in the metrics of trained networks.
    """
    largest, captured = 0.0, energies.cumsum(0)
    for start in range(0, len(energies), at_once):
        last = energies[start : start + at_once]
        gaps = (last - energies[:, None]).clamp_min_(torch.finfo(torch.float64).tiny)
        lost = (sizes[:, None] * (sizes[:, None] / gaps).clamp_max_(1)).tril_(-1 - start).sum(0)
        worst = float((lost / captured[start : start + at_once]).max())
        if not worst <= largest:  # also where it is no number
            largest = worst
    return largest


def _root_in_float32(moment: Tensor) -> tuple[Tensor, bool]:
    """The Cholesky factor of a moment, and whether there is none to float32's precision."""
    if moment.dim() == 1:
        return torch.diag(moment.sqrt().to(torch.float32)), False
    factor, failed = torch.linalg.cholesky_ex(moment.to(torch.float32))
    return factor, bool(failed)


def _power_of_four(moment: Tensor) -> float:
    """A power of two near the size of a moment, whose root is one too."""
    scale = power_of_two(moment)
    return scale if math.frexp(scale)[1] % 2 else scale / 2


def _root(moment: Tensor) -> Tensor:
    """The Cholesky factor of a moment, which may be given as its diagonal alone."""
    return torch.diag(moment.sqrt()) if moment.dim() == 1 else torch.linalg.cholesky(moment)


def _times(matrix: Tensor, moment: Tensor) -> Tensor:
    """The product of a matrix with a moment, which may be given as its diagonal alone."""
    return matrix * moment if moment.dim() == 1 else matrix @ moment


def weighed(matrix: Tensor, moment: Tensor) -> Tensor:
    """The product of a moment, which may be given as its diagonal alone, with a matrix of as many rows."""
    return moment[:, None] * matrix if moment.dim() == 1 else moment @ matrix
