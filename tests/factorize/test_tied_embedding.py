"""The pair of a tied embedding: its cost is the quadratic form's, and alternating least squares only lowers it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.factorize import (
    FactorizationSettings,
    Metric,
    TiedMetric,
    decompose,
    decompose_tied,
    tied_truncated_svd,
    truncated_svd,
    weighted_truncated_svd,
)
from compressor.factorize.tied_embedding import nearest_kronecker_metric


def positive_definite(size: int, spread: float) -> Tensor:
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    return basis @ torch.diag(torch.logspace(0, -spread, size, dtype=torch.float64)) @ basis.T


def frequencies(tokens: int, spread: float) -> Tensor:
    return torch.logspace(0, -spread, tokens, dtype=torch.float64)[torch.randperm(tokens)]


def tied_metric(d: int, tokens: int, spread: float) -> TiedMetric:
    return TiedMetric(
        lookup=Metric(frequencies(tokens, spread), positive_definite(d, spread)),
        head=Metric(frequencies(tokens, spread), positive_definite(d, spread)),
    )


def whole(metric: TiedMetric) -> Tensor:
    """The quadratic form on all numbers of the matrix at once, token after token: what is never formed."""
    return sum(
        (torch.kron(torch.diag(term.inputs), term.gradients) for term in (metric.lookup, metric.head)),
        start=torch.zeros((), dtype=torch.float64),
    )


def brute_cost(metric: TiedMetric, change: Tensor) -> float:
    flat = change.T.flatten()
    return float(flat @ whole(metric) @ flat)


sizes = st.tuples(st.integers(1, 9), st.integers(1, 12))


@settings(max_examples=60)
@given(sizes, st.floats(0, 4), st.integers(0, 2**31))
def test_the_cost_is_the_quadratic_form(size: tuple[int, int], spread: float, seed: int) -> None:
    torch.manual_seed(seed)
    metric, change = tied_metric(*size, spread), torch.randn(*size, dtype=torch.float64)
    assert metric.squared_size(change) == pytest.approx(brute_cost(metric, change), rel=1e-9)


@settings(max_examples=60)
@given(sizes, st.floats(0, 4), st.integers(0, 2**31))
def test_the_start_is_the_nearest_kronecker_product(size: tuple[int, int], spread: float, seed: int) -> None:
    torch.manual_seed(seed)
    d, tokens = size
    metric = tied_metric(d, tokens, spread)
    near = nearest_kronecker_metric(metric)
    assert float(near.inputs.min()) > 0
    assert float(torch.linalg.eigvalsh(near.gradients)[0]) > 0
    # The rearrangement of Van Loan and Pitsianis, and by Eckart and Young the distance to its best rank-one matrix.
    rearranged = whole(metric).reshape(tokens, d, tokens, d).permute(0, 2, 1, 3).reshape(tokens**2, d**2)
    values = torch.linalg.svdvals(rearranged)
    distance = (whole(metric) - torch.kron(torch.diag(near.inputs), near.gradients)).norm()
    assert float(distance) == pytest.approx(float(values[1:].norm()), rel=1e-6, abs=1e-7 * float(values[0]))


@settings(max_examples=60)
@given(size=sizes, spread=st.floats(0, 4), seed=st.integers(0, 2**31), data=st.data())
def test_it_costs_no_more_than_its_start_and_what_is_planned_with(
    size: tuple[int, int], spread: float, seed: int, *, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(size)))
    torch.manual_seed(seed)
    metric, matrix = tied_metric(*size, spread), torch.randn(*size, dtype=torch.float64)
    total = brute_cost(metric, matrix)
    start = weighted_truncated_svd(matrix, rank, nearest_kronecker_metric(metric))
    pair = tied_truncated_svd(matrix, rank, metric)
    assert pair.rank == rank
    cost = brute_cost(metric, matrix - pair.product())
    assert cost <= brute_cost(metric, matrix - start.product()) + 1e-12 * total
    planned = decompose_tied(matrix, metric).values
    assert planned.shape == (min(size),)
    assert float((planned**2).sum()) == pytest.approx(total, rel=1e-9)
    assert float((planned[:rank] ** 2).sum()) <= total - cost + 1e-9 * total


def test_what_is_planned_with_is_the_exact_cost_of_the_start() -> None:
    torch.manual_seed(0)
    metric, matrix = tied_metric(8, 30, 1), torch.randn(8, 30, dtype=torch.float64)
    planned = decompose_tied(matrix, metric).values
    for rank in range(1, 9):
        start = weighted_truncated_svd(matrix, rank, nearest_kronecker_metric(metric))
        exact = brute_cost(metric, matrix - start.product())
        assert float((planned[rank:] ** 2).sum()) == pytest.approx(exact, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("size", [(8, 30), (12, 5)])
def test_no_other_factor_costs_less_than_alternating_least_squares_found(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    metric, matrix = tied_metric(*size, 2), torch.randn(*size, dtype=torch.float64)
    pair = tied_truncated_svd(matrix, 3, metric, settings=FactorizationSettings(tied_gain=1e-10, tied_sweeps=2000))
    least = brute_cost(metric, matrix - pair.product())
    # Least squares on all numbers of one factor at once, with the other as it is.
    d, tokens = size
    root = torch.linalg.cholesky(whole(metric)).T
    target = (root @ matrix.T.flatten())[:, None]
    identities = [torch.eye(side, dtype=torch.float64) for side in (tokens, d)]
    for design in (
        torch.kron(identities[0], pair.up.contiguous()),
        torch.kron(pair.down.T.contiguous(), identities[1]),
    ):
        solution = torch.linalg.lstsq(root @ design, target).solution
        best = float((root @ design @ solution - target).square().sum())
        assert least == pytest.approx(best, rel=1e-6)


def test_every_sweep_lowers_the_cost() -> None:
    torch.manual_seed(0)
    metric, matrix = tied_metric(16, 60, 3), torch.randn(16, 60, dtype=torch.float64)
    costs = []
    for sweeps in range(8):
        pair = tied_truncated_svd(matrix, 6, metric, settings=FactorizationSettings(tied_sweeps=sweeps))
        costs.append(brute_cost(metric, matrix - pair.product()))
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.99 * costs[0], "the start was not the best"


def test_two_proportional_uses_are_one() -> None:
    torch.manual_seed(0)
    lookup = Metric(frequencies(20, 2), positive_definite(9, 2))
    matrix = torch.randn(9, 20, dtype=torch.float64)
    metric = TiedMetric(lookup, Metric(3 * lookup.inputs, 2 * lookup.gradients))
    expected = weighted_truncated_svd(matrix, 4, lookup).product()
    torch.testing.assert_close(tied_truncated_svd(matrix, 4, metric).product(), expected, rtol=1e-8, atol=1e-8)
    values = torch.tensor(decompose(matrix, lookup).values) * 7**0.5
    torch.testing.assert_close(torch.tensor(decompose_tied(matrix, metric).values), values, rtol=1e-5, atol=1e-8)


def test_equal_weights_are_eckart_and_young() -> None:
    torch.manual_seed(0)
    ones = Metric(torch.ones(20, dtype=torch.float64), torch.eye(9, dtype=torch.float64))
    matrix = torch.randn(9, 20, dtype=torch.float64)
    expected = truncated_svd(matrix, 4).product()
    torch.testing.assert_close(tied_truncated_svd(matrix, 4, TiedMetric(ones, ones)).product(), expected)


@pytest.mark.parametrize("size", [(6, 20), (20, 6)])
def test_a_row_of_zeros_and_a_matrix_of_low_rank_are_kept(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    metric = tied_metric(*size, 3)
    matrix = torch.randn(size[0], 2, dtype=torch.float64) @ torch.randn(2, size[1], dtype=torch.float64)
    matrix[:, 3] = 0
    for rank in (2, 4):
        pair = tied_truncated_svd(matrix, rank, metric)
        torch.testing.assert_close(pair.product(), matrix, rtol=1e-6, atol=1e-6)
    if size[0] < size[1]:
        assert torch.count_nonzero(tied_truncated_svd(matrix, 1, metric).down[:, 3]) == 0
    nothing = tied_truncated_svd(torch.zeros(size), 2, metric)
    assert torch.count_nonzero(nothing.product()) == 0
