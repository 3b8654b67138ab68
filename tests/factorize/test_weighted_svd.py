"""Truncation in the metric of the loss: optimal in it, and the plain truncated SVD where the metric is the identity."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.factorize import Metric, decompose, truncated_svd, weighted_truncated_svd
from compressor.measure import Precision


def positive_definite(size: int, spread: float) -> Tensor:
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    return basis @ torch.diag(torch.logspace(0, -spread, size, dtype=torch.float64)) @ basis.T


def cost(metric: Metric, change: Tensor) -> float:
    return float((metric.gradients @ change @ metric.inputs * change).sum())


def root(moment: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(moment)
    return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T


@settings(max_examples=60)
@given(
    d_out=st.integers(1, 20),
    d_in=st.integers(1, 20),
    spread=st.floats(0, 6),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_it_is_the_truncated_svd_of_the_weighted_matrix(
    d_out: int, d_in: int, spread: float, *, seed: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(d_out, d_in)))
    torch.manual_seed(seed)
    matrix = torch.randn(d_out, d_in, dtype=torch.float64)
    metric = Metric(positive_definite(d_in, spread), positive_definite(d_out, spread))
    exact = torch.linalg.svdvals(root(metric.gradients) @ matrix @ root(metric.inputs))
    values = torch.tensor(decompose(matrix, metric).values)
    torch.testing.assert_close(values, exact, rtol=1e-6, atol=3e-8 * float(exact[0]))
    pair = weighted_truncated_svd(matrix, rank, metric)
    assert pair.rank == rank
    least = float(exact[rank:].square().sum())
    assert cost(metric, matrix - pair.product()) == pytest.approx(least, rel=1e-6, abs=1e-12 * float(exact[0]) ** 2)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (15, 15)])
def test_no_other_matrix_of_the_rank_costs_less(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    metric = Metric(positive_definite(shape[1], 3), positive_definite(shape[0], 3))
    best = weighted_truncated_svd(matrix, 5, metric)
    least = cost(metric, matrix - best.product())
    for _ in range(50):
        up = best.up + 0.05 * torch.randn_like(best.up)
        down = best.down + 0.05 * best.down.std() * torch.randn_like(best.down)
        assert cost(metric, matrix - up @ down) >= least


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_both_sides_give_the_same_matrix(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    metric = Metric(positive_definite(shape[1], 2), positive_definite(shape[0], 2))
    mirrored = Metric(metric.gradients, metric.inputs)
    one = weighted_truncated_svd(matrix, 4, metric).product()
    other = weighted_truncated_svd(matrix.T, 4, mirrored).product().T
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_the_identity_metric_is_eckart_and_young() -> None:
    torch.manual_seed(0)
    for shape in ((12, 20), (20, 12)):
        matrix = torch.randn(shape)
        metric = Metric(torch.eye(shape[1], dtype=torch.float64), torch.eye(shape[0], dtype=torch.float64))
        weighted = weighted_truncated_svd(matrix, 6, metric).product()
        torch.testing.assert_close(weighted, truncated_svd(matrix, 6).product(), rtol=1e-9, atol=1e-9)


def test_the_factors_keep_their_digits_when_they_are_rounded() -> None:
    torch.manual_seed(0)
    for shape in ((40, 60), (60, 40)):
        matrix = torch.randn(shape, dtype=torch.float64)
        metric = Metric(positive_definite(shape[1], 10), positive_definite(shape[0], 10))
        pair = weighted_truncated_svd(matrix, 20, metric)
        rounded = pair.up.float() @ pair.down.float()
        # One rounding of each factor and one of the sum, whatever the conditioning of the metric.
        assert float((rounded - pair.product()).norm() / pair.product().norm()) < 20 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("rank", [0, 6])
def test_a_rank_that_the_matrix_does_not_have_is_refused(rank: int) -> None:
    metric = Metric(torch.eye(7, dtype=torch.float64), torch.eye(5, dtype=torch.float64))
    with pytest.raises(ValueError, match="outside 1"):
        weighted_truncated_svd(torch.randn(5, 7), rank, metric)


@settings(max_examples=30)
@given(d_out=st.integers(1, 16), d_in=st.integers(1, 16), spread=st.floats(0, 7), seed=st.integers(0, 2**31))
def test_one_decomposition_gives_the_pair_of_every_rank(d_out: int, d_in: int, *, spread: float, seed: int) -> None:
    torch.manual_seed(seed)
    matrix = torch.randn(d_out, d_in, dtype=torch.float64)
    metric = Metric(positive_definite(d_in, spread), positive_definite(d_out, spread))
    found = decompose(matrix, metric)
    parts = found.components(matrix, metric)
    for rank in range(1, min(d_out, d_in) + 1):
        product = found.pair(matrix, rank, metric).product()
        torch.testing.assert_close(product, parts.up[:, :rank] @ parts.down[:rank], rtol=1e-6, atol=1e-7)


@settings(max_examples=60)
@given(
    d_out=st.integers(1, 20),
    d_in=st.integers(1, 20),
    spread=st.floats(0, 14),
    size=st.integers(-30, 30),
    seed=st.integers(0, 2**31),
)
def test_a_basis_is_rounded_where_that_costs_next_to_nothing(
    d_out: int, d_in: int, *, spread: float, size: int, seed: int
) -> None:
    torch.manual_seed(seed)
    matrix = torch.randn(d_out, d_in, dtype=torch.float64)
    metric = Metric(positive_definite(d_in, spread) * 10.0**size, positive_definite(d_out, spread) * 10.0**-size)
    exact = decompose(matrix, metric)
    rounded = exact.rounded(matrix, metric, 1e-6)
    if spread < 6:
        assert rounded.basis.dtype == torch.float32
    total = metric.squared_size(matrix)
    for rank in range(1, min(d_out, d_in) + 1):
        captured = [
            total - metric.squared_size(matrix - each.pair(matrix, rank, metric).product()) for each in (exact, rounded)
        ]
        assert captured[1] >= (1 - 1e-6) * captured[0] - 1e-12 * total


TRIED = Precision(side=1)


def captured(matrix: Tensor, metric: Metric, basis: Tensor) -> Tensor:
    """What the spans of the first 1, 2, .. columns of a basis capture of the matrix in the metric."""
    wide = matrix.shape[0] <= matrix.shape[1]
    rows, own, other = (
        (matrix, metric.gradients, metric.inputs) if wide else (matrix.T, metric.inputs, metric.gradients)
    )
    factor = torch.linalg.cholesky(own)
    spaces, half = torch.linalg.qr(factor.T @ basis.double()).Q, factor.T @ rows
    return (spaces * (half @ other @ half.T @ spaces)).sum(0).cumsum(0)


@settings(max_examples=60)
@given(
    d_out=st.integers(1, 60),
    d_in=st.integers(1, 60),
    spread=st.floats(0, 9),
    size=st.integers(-40, 40),
    seed=st.integers(0, 2**31),
)
def test_float32_loses_no_more_than_it_may(d_out: int, d_in: int, *, spread: float, size: int, seed: int) -> None:
    torch.manual_seed(seed)
    matrix = torch.randn(d_out, d_in, dtype=torch.float64) * torch.logspace(0, -1, d_in) * 2.0**size
    metric = Metric(positive_definite(d_in, spread) * 8.0**size, positive_definite(d_out, spread) * 2.0**-size)
    exact, found = decompose(matrix, metric), decompose(matrix, metric, TRIED)
    if found.basis.dtype == torch.float64:
        assert found.values.tolist() == exact.values.tolist()
        assert torch.equal(found.basis, exact.basis)
    else:
        best, own = (captured(matrix, metric, each.basis) for each in (exact, found))
        assert (own >= (1 - TRIED.loss) * best).all()
        energies = torch.from_numpy(exact.values).square()
        assert (torch.from_numpy(found.values).square() - energies).abs().max() <= 1e-5 * energies[0]


@pytest.mark.parametrize("shape", [(60, 60), (40, 70), (70, 40)])
@pytest.mark.parametrize(
    ("spread", "spike", "loss", "dtype"),
    [
        (1.0, 1.0, 1e-6, torch.float32),
        (7.0, 1.0, 1e-6, torch.float32),
        (7.0, 1.0, 1e-9, torch.float64),
        (1.0, 1e4, 1e-6, torch.float64),
        (12.0, 1.0, 1e-6, torch.float64),
        (1.0, 1.0, 0.0, torch.float64),
    ],
    ids=["well", "ill", "it would lose more", "one direction", "no root", "not asked for"],
)
def test_float64_is_for_metrics_that_float32_does_not_hold(
    shape: tuple[int, int], spread: float, *, spike: float, loss: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    inputs, gradients = (positive_definite(size, spread) for size in reversed(shape))
    ones = torch.ones(shape[1], dtype=torch.float64)
    metric = Metric(inputs + (spike - 1) * torch.outer(ones, ones) / shape[1], gradients)
    assert decompose(matrix, metric, Precision(side=min(shape), loss=loss)).basis.dtype == dtype
    assert decompose(matrix, metric, Precision(side=min(shape) + 1, loss=loss)).basis.dtype == torch.float64


def test_nothing_is_decomposed_in_float32_where_there_is_nothing_to_capture() -> None:
    metric = Metric(positive_definite(6, 1), positive_definite(5, 1))
    found = decompose(torch.zeros(5, 6), metric, TRIED)
    assert found.basis.dtype == torch.float64
    assert not found.values.any()


def test_a_basis_that_float32_does_not_hold_stays_as_it_is() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(12, 20, dtype=torch.float64)
    metric = Metric(positive_definite(20, 2), positive_definite(12, 13))
    assert decompose(matrix, metric).rounded(matrix, metric, 1e-6).basis.dtype == torch.float64
    tiny = Metric(metric.inputs, positive_definite(12, 2) * 1e-90)
    assert decompose(matrix, tiny).rounded(matrix, tiny, 1e-6).basis.dtype == torch.float64


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
def test_a_vector_stands_for_the_diagonal_moment_on_either_side(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    outputs, inputs = (torch.rand(size, generator=generator, dtype=torch.float64) + 0.1 for size in shape)
    vectors, matrices = Metric(inputs, outputs), Metric(torch.diag(inputs), torch.diag(outputs))
    assert vectors.squared_size(matrix) == pytest.approx(matrices.squared_size(matrix), rel=1e-12)
    one, other = decompose(matrix, vectors), decompose(matrix, matrices)
    assert one.values == pytest.approx(other.values, rel=1e-9)
    for rank in (1, 3, 5):
        found, expected = (each.pair(matrix, rank, metric) for each, metric in ((one, vectors), (other, matrices)))
        torch.testing.assert_close(found.product(), expected.product())
    assert one.rounded(matrix, vectors, 1.0).basis.dtype == torch.float32
