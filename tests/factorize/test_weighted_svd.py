"""Truncation in the metric of the loss: optimal in it, and the plain truncated SVD where the metric is the identity."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.factorize import Metric, truncated_svd, weighted_singular_values, weighted_truncated_svd


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
    values = torch.tensor(weighted_singular_values(matrix, metric))
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
