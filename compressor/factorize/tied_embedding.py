"""The pair of an embedding with a tied output head: one matrix that affects the loss in two places.

A tied `d_out x d_in` matrix W, with `d_out` the length of its vectors and `d_in` the number of its tokens, is used
twice. It looks vectors up, where a change D costs `1/2 tr(S_ge D F D^T)` to second order (F has the frequencies of the
tokens on its diagonal, `S_ge` is the moment of the gradient at the vectors); and it makes logits `W^T h`, where D costs
`1/2 tr(S_h D G_h D^T)` (`S_h` is the moment of the hidden states and `G_h` that of the gradient at the logits, of which
only the diagonal is used). The best matrix of a rank in the sum of the two has no closed form. It is begun at the best
one in a single metric close to the sum and improved by alternating least squares, of which every step is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from compressor.factorize.settings import DEFAULTS, FactorizationSettings
from compressor.factorize.truncated_svd import FactorPair
from compressor.factorize.weighted_svd import Decomposition, Metric, decompose
from compressor.measure.eigen import eigh
from compressor.measure.moments import oas_shrinkage
from compressor.measure.scale import power_of_two
from compressor.measure.token_frequencies import EmbeddingMoments
from compressor.torch_state import in_float64


@dataclass(frozen=True)
class TiedMetric:
    """The sum of the metrics of the two uses of one matrix, each with how often a prediction makes that use folded in.

    Both have a vector of d_in as `inputs` and a `d_out x d_out` matrix as `gradients`. For the head, which applies the
    matrix from its other side, these are `G_h` and `S_h`.
    """

    lookup: Metric
    head: Metric

    def squared_size(self, matrix: Tensor) -> float:
        """Twice the loss per prediction that changing the `d_out x d_in` matrix by this one costs to second order."""
        return self.lookup.squared_size(matrix) + self.head.squared_size(matrix)


def embedding_metric(found: EmbeddingMoments) -> tuple[Metric | TiedMetric, float]:
    """The metric of the loss for an embedding, and its uses per prediction, which are folded into a tied one's."""
    lookup = Metric(found.frequencies, oas_shrinkage(found.gradients, found.positions))
    if found.head is None:
        return lookup, found.uses
    head = Metric(found.head.uses * found.head.logits, oas_shrinkage(found.head.hidden, found.head.positions))
    return TiedMetric(Metric(found.uses * lookup.inputs, lookup.gradients), head), 1.0


def nearest_kronecker_metric(metric: TiedMetric) -> Metric:
    """The single metric that is nearest in the Frobenius norm to the sum of the two, as `d_out d_in` square matrices.

    The sum of two Kronecker products `i x G` is, rearranged, the matrix `sum_t i_t vec(G_t)^T` of rank two, and the
    nearest single product its leading singular pair (Van Loan and Pitsianis, "Approximation with Kronecker products",
    1993, section 2). Its singular vectors are combinations of the two terms, so a 2 x 2 problem gives them; its entries
    are not negative, so neither are the combinations (Perron), and the metric is positive definite as the two are.
    """
    terms = (metric.lookup, metric.head)
    rows = torch.stack([term.inputs / term.inputs.norm() for term in terms])
    columns = torch.stack([(term.gradients / term.gradients.norm()).flatten() for term in terms])
    sizes = torch.stack([term.inputs.norm() * term.gradients.norm() for term in terms])
    # With the terms as unit vectors the rearranged matrix is R = rows^T diag(sizes) columns, and rows^T a is its left
    # singular vector where a is an eigenvector of the product below.
    back = sizes[:, None] * (rows @ rows.T)
    # Four numbers, for which not every accelerator has an algorithm.
    eigenvalues, vectors = torch.linalg.eig((sizes[:, None] * (columns @ columns.T) @ back).cpu())
    mixture = vectors[:, eigenvalues.real.argmax()].real.abs().to(back.device)
    inputs = mixture @ rows
    gradients = (back @ mixture @ columns) / inputs.square().sum()
    return Metric(inputs=inputs, gradients=gradients.view_as(metric.lookup.gradients))


def decompose_tied(matrix: Tensor, metric: TiedMetric) -> Decomposition:
    """Decompose a `d_out x d_in` matrix in the single metric that `tied_truncated_svd` starts in.

    Its `values` take the place of the singular values that the sum of two metrics does not have, and need not descend:
    the squares from the r-th on sum to twice the loss at which `tied_truncated_svd` starts for rank r, exact in the sum
    of both metrics and for all ranks in one go. What it ends at costs no more.
    """
    scale = power_of_two(matrix)
    wide, single = in_float64(matrix) / scale, nearest_kronecker_metric(metric)
    found = decompose(wide, single)
    parts = found.components(wide, single)
    products = sum(
        (parts.up.T @ term.gradients @ parts.up) * ((parts.down * term.inputs) @ parts.down.T)
        for term in (metric.lookup, metric.head)
    )
    assert isinstance(products, Tensor)
    # Entry r: the sum over all pairs of components from the r-th on.
    costs = products.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0).cpu().numpy()
    # A lower rank can be stored as well.
    costs = np.minimum.accumulate(np.append(costs, 0.0).clip(min=0))
    return replace(found, values=scale * np.asarray(np.sqrt(costs[:-1] - costs[1:]), dtype=np.float64))


def tied_truncated_svd(
    matrix: Tensor,
    rank: int,
    metric: TiedMetric,
    *,
    start: Decomposition | None = None,
    settings: FactorizationSettings = DEFAULTS,
) -> FactorPair:
    """A matrix of rank `rank` that is close to a `d_out x d_in` one in the sum of both metrics, in float64.

    Not always the closest, but none that differs in one factor only is closer by more than `settings.tied_gain`.
    Columns of zeros, such as a padding token's, stay zero. `start` is what `decompose_tied` gives, where it is known.
    """
    scale = power_of_two(matrix)
    wide = in_float64(matrix) / scale
    single = nearest_kronecker_metric(metric)
    pair = (start or decompose(wide, single)).pair(wide, rank, single)
    cost = metric.squared_size(wide - pair.product())
    vectors = _diagonalizing(metric.lookup.gradients, metric.head.gradients)
    for _ in range(settings.tied_sweeps):
        better = _best_down(wide, _best_up(wide, pair.down, metric, vectors=vectors), metric)
        lower = metric.squared_size(wide - better.product())
        if lower >= cost:  # by rounding: no exact step raises it
            break
        gain, pair, cost = 1 - lower / cost, better, lower
        if gain < settings.tied_gain:
            break
    return FactorPair(up=pair.up, down=scale * pair.down)


def _best_up(wide: Tensor, down: Tensor, metric: TiedMetric, *, vectors: Tensor) -> Tensor:
    """An orthonormal basis of the columns of the best `up` for the rows of `down`: least squares in the whole metric.

    The normal equations `sum_t G_t up N_t = sum_t G_t W diag(i_t) basis^T`, with `N_t = basis diag(i_t) basis^T`, come
    apart into single numbers when `G_t` and `N_t` are diagonalized, each two together.
    """
    basis: Tensor = torch.linalg.qr(down.T).Q.T
    terms = (metric.lookup, metric.head)
    moments = [(basis * term.inputs) @ basis.T for term in terms]
    ours = _diagonalizing(*moments)
    right = sum(term.gradients @ ((wide * term.inputs) @ basis.T) for term in terms)
    left = sum(
        torch.outer(_diagonal(vectors, term.gradients), _diagonal(ours, moment))
        for term, moment in zip(terms, moments, strict=True)
    )
    up: Tensor = vectors @ ((vectors.T @ right @ ours) / left) @ ours.T
    orthonormal: Tensor = torch.linalg.qr(up).Q
    return orthonormal


def _best_down(wide: Tensor, up: Tensor, metric: TiedMetric) -> FactorPair:
    """The pair of an orthonormal `up` with its best `down`: least squares for every token on its own."""
    terms = (metric.lookup, metric.head)
    moments = [up.T @ term.gradients @ up for term in terms]
    ours = _diagonalizing(*moments)
    right = sum(ours.T @ (up.T @ term.gradients @ wide) * term.inputs for term in terms)
    left = sum(torch.outer(_diagonal(ours, moment), term.inputs) for term, moment in zip(terms, moments, strict=True))
    return FactorPair(up=up, down=ours @ (right / left))


def _diagonalizing(first: Tensor, second: Tensor) -> Tensor:
    """T such that `T^T A T` is diagonal for both positive definite matrices A."""
    second = second * (first.trace() / second.trace())
    factor = torch.linalg.cholesky(first + second)
    whitened = torch.linalg.solve_triangular(factor, first, upper=False)
    whitened = torch.linalg.solve_triangular(factor, whitened.T, upper=False)
    _, vectors = eigh((whitened + whitened.T) / 2)
    diagonalizing: Tensor = torch.linalg.solve_triangular(factor.T, vectors, upper=True)
    return diagonalizing


def _diagonal(vectors: Tensor, moment: Tensor) -> Tensor:
    """The diagonal of `T^T A T`."""
    return ((moment @ vectors) * vectors).sum(0)
