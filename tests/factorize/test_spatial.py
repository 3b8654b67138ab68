"""Spatial pairs: the best one without a metric, and in a metric never worse than the best of the nearest product."""

from __future__ import annotations

from itertools import islice, pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.factorize import (
    Metric,
    SpatialPair,
    spatial_errors,
    spatial_matrix,
    spatial_pair,
    weighted_truncated_svd,
)
from compressor.factorize.spatial import alternating_least_squares, nearest_kronecker, whitened

kernels = st.tuples(st.integers(1, 7), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4))


def positive_definite(size: int, spread: float) -> Tensor:
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    return basis @ torch.diag(torch.logspace(0, -spread, size, dtype=torch.float64)) @ basis.T


def metric_of(kernel: Tensor, spread: float) -> Metric:
    return Metric(positive_definite(kernel[0].numel(), spread), positive_definite(len(kernel), spread))


def cost(metric: Metric, kernel: Tensor, pair: SpatialPair | None = None) -> float:
    change = kernel.double().flatten(1) - (0 if pair is None else pair.product())
    return float((metric.gradients @ change @ metric.inputs * change).sum())


def full_rank(kernel: Tensor) -> int:
    return min(spatial_matrix(kernel).shape)


def start_in_the_nearest_product(kernel: Tensor, rank: int, metric: Metric) -> SpatialPair:
    """The best pair in the metric with the inputs' moment replaced by a product: an ordinary weighted SVD."""
    d_out, c, k_h, k_w = kernel.shape
    vertical, horizontal = nearest_kronecker(metric.inputs, k_w)
    replaced = Metric(vertical, torch.kron(metric.gradients, horizontal))
    factors = weighted_truncated_svd(spatial_matrix(kernel), rank, replaced)
    return SpatialPair(factors.up.reshape(d_out, k_w, rank).transpose(1, 2), factors.down.reshape(rank, c, k_h))


@given(kernels, st.integers(0, 2**31))
@settings(max_examples=30)
def test_a_pair_is_the_sum_of_products_of_a_vertical_and_a_horizontal_kernel(
    shape: tuple[int, int, int, int], seed: int
) -> None:
    torch.manual_seed(seed)
    d_out, c, k_h, k_w = shape
    pair = SpatialPair(torch.randn(d_out, 2, k_w), torch.randn(2, c, k_h))
    dense = pair.product().reshape(shape)
    arranged = spatial_matrix(dense)
    for o, channel, i, j in product(*map(range, shape)):
        value = sum(float(pair.up[o, r, j] * pair.down[r, channel, i]) for r in range(2))
        assert float(dense[o, channel, i, j]) == pytest.approx(value, abs=1e-5)
        assert arranged[o * k_w + j, channel * k_h + i] == dense[o, channel, i, j]


@given(kernels, st.integers(0, 2**31), st.data())
@settings(max_examples=60)
def test_without_a_metric_the_error_is_the_least_by_eckart_and_young(
    shape: tuple[int, int, int, int], seed: int, data: st.DataObject
) -> None:
    torch.manual_seed(seed)
    kernel = torch.randn(shape, dtype=torch.float64)
    rank = data.draw(st.integers(1, full_rank(kernel)))
    pair = spatial_pair(kernel, rank)
    # Rows (o, j) and columns (c, i), arranged here by NumPy.
    matrix = np.einsum("ocij->ojci", kernel.numpy()).reshape(shape[0] * shape[3], -1)
    dropped = np.linalg.svd(matrix, compute_uv=False)[rank:]
    error = float((kernel.flatten(1) - pair.product()).square().sum())
    assert error == pytest.approx(float(np.square(dropped).sum()), rel=1e-8, abs=1e-10)


@given(shape=kernels, spread=st.floats(0, 5), seed=st.integers(0, 2**31), data=st.data())
@settings(max_examples=60)
def test_in_a_metric_the_cost_never_rises_from_that_of_the_best_pair_in_the_nearest_product(
    shape: tuple[int, int, int, int], spread: float, seed: int, *, data: st.DataObject
) -> None:
    torch.manual_seed(seed)
    kernel = torch.randn(shape, dtype=torch.float64)
    metric = metric_of(kernel, spread)
    rank = data.draw(st.integers(1, full_rank(kernel)))
    total = cost(metric, kernel)
    start = start_in_the_nearest_product(kernel, rank, metric)
    problem = whitened(kernel, metric)
    down = start.down.flatten(1) @ problem.vertical_root
    costs = [solution.cost for solution in islice(alternating_least_squares(problem, down), 6)]
    rounding = 1e-9 * total
    assert problem.total == pytest.approx(total, rel=1e-9)
    assert costs[0] <= cost(metric, kernel, start) + rounding
    assert all(after <= before + rounding for before, after in pairwise(costs))
    assert cost(metric, kernel, spatial_pair(kernel, rank, metric)) <= costs[0] + rounding


@given(shape=kernels, spread=st.floats(0, 4), seed=st.integers(0, 2**31), data=st.data())
@settings(max_examples=40)
def test_where_the_moment_is_a_product_the_pair_is_the_best_there_is(
    shape: tuple[int, int, int, int], spread: float, seed: int, *, data: st.DataObject
) -> None:
    torch.manual_seed(seed)
    kernel = torch.randn(shape, dtype=torch.float64)
    d_out, c, k_h, k_w = shape
    rank = data.draw(st.integers(1, full_rank(kernel)))
    vertical, horizontal = positive_definite(c * k_h, spread), positive_definite(k_w, spread)
    metric = Metric(torch.kron(vertical, horizontal), positive_definite(d_out, spread))
    roots = [np.linalg.cholesky(each.numpy()) for each in (metric.gradients, horizontal, vertical)]
    weighted = np.kron(roots[0], roots[1]).T @ spatial_matrix(kernel).numpy() @ roots[2]
    least = float(np.square(np.linalg.svd(weighted, compute_uv=False)[rank:]).sum())
    found = cost(metric, kernel, spatial_pair(kernel, rank, metric))
    assert found == pytest.approx(least, rel=1e-6, abs=1e-9 * cost(metric, kernel))


def test_no_other_horizontal_kernels_cost_less_with_the_same_vertical_ones() -> None:
    torch.manual_seed(0)
    kernel = torch.randn(6, 5, 3, 3, dtype=torch.float64)
    metric = metric_of(kernel, 3)
    pair = spatial_pair(kernel, 5, metric)
    least = cost(metric, kernel, pair)
    for _ in range(50):
        other = SpatialPair(pair.up + 0.05 * torch.randn_like(pair.up), pair.down)
        assert cost(metric, kernel, other) >= least


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
@settings(max_examples=40)
def test_the_nearest_kronecker_product_is_that_of_van_loan_and_pitsianis(height: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    moment = positive_definite(height * width, 2)
    vertical, horizontal = nearest_kronecker(moment, width)
    blocks = moment.numpy().reshape(height, width, height, width)
    values = np.linalg.svd(blocks.transpose(1, 3, 0, 2).reshape(width**2, height**2), compute_uv=False)
    distance = float((moment - torch.kron(vertical, horizontal)).square().sum())
    assert distance == pytest.approx(float(np.square(values[1:]).sum()), rel=1e-6, abs=1e-12)
    for each in (vertical, horizontal):
        assert float(torch.linalg.eigvalsh(each)[0]) > 0


@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (3, 8, 2, 5), (1, 1, 2, 2)])
def test_the_errors_are_those_of_the_pairs(shape: tuple[int, int, int, int]) -> None:
    torch.manual_seed(0)
    kernel = torch.randn(shape)
    metric = metric_of(kernel, 3)
    errors = spatial_errors(kernel, metric)
    total = cost(metric, kernel)
    assert len(errors) == full_rank(kernel) + 1
    assert (errors[0], errors[-1]) == (1, 0)
    assert (np.diff(errors) <= 0).all()
    # Below the largest rank at which a pair is smaller, all ranks of so small a kernel are on the grid.
    for rank in range(1, max(1, kernel.numel() // sum(spatial_matrix(kernel).shape)) + 1):
        exact = (cost(metric, kernel, spatial_pair(kernel, rank, metric)) / total) ** 0.5
        assert errors[rank] == pytest.approx(exact, rel=1e-6)
    assert not spatial_errors(torch.zeros(shape), metric).any()


def test_the_factors_keep_their_digits_when_they_are_rounded() -> None:
    torch.manual_seed(0)
    kernel = torch.randn(12, 10, 3, 3, dtype=torch.float64)
    pair = spatial_pair(kernel, 12, metric_of(kernel, 8))
    rounded = SpatialPair(pair.up.float(), pair.down.float()).product()
    assert float((rounded - pair.product()).norm() / pair.product().norm()) < 12 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("rank", [0, 7])
def test_a_rank_that_the_kernel_does_not_have_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=r"outside 1 \.\. 6 .* 5 x 3 x 2 x 4"):
        spatial_pair(torch.randn(5, 3, 2, 4), rank)
