"""Grouped pairs: the best ones of every group by itself, and singular values that say what all drop together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.factorize import (
    GroupedMetric,
    decompose_grouped,
    grouped_truncated_svd,
    grouped_values,
    weighted_truncated_svd,
)

# Groups, rows of each, and columns.
shapes = st.tuples(st.integers(2, 5), st.integers(1, 7), st.integers(1, 9))


def positive_definite(count: int, size: int) -> Tensor:
    vectors = torch.randn(count, size, 2 * size + 1, dtype=torch.float64)
    return vectors @ vectors.mT


def metric_of(groups: int, rows: int, columns: int) -> GroupedMetric:
    return GroupedMetric(positive_definite(groups, columns), positive_definite(groups, rows))


def block_diagonal(blocks: Tensor) -> Tensor:
    return torch.block_diag(*blocks)


@given(shapes, st.integers(0, 2**31))
@settings(max_examples=40)
def test_every_group_has_its_truncated_svd(shape: tuple[int, int, int], seed: int) -> None:
    groups, rows, columns = shape
    torch.manual_seed(seed)
    matrix = torch.randn(groups * rows, columns, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix.reshape(shape), full_matrices=False)
    for rank in range(1, min(rows, columns) + 1):
        pair = grouped_truncated_svd(matrix, rank, groups)
        expected = (left[..., :rank] * values[:, None, :rank]) @ right[:, :rank]
        torch.testing.assert_close(pair.product(), expected.flatten(0, 1), rtol=1e-9, atol=1e-9)
        assert pair.rank == rank


@given(shapes, st.booleans(), st.integers(0, 2**31))
@settings(max_examples=40)
def test_the_values_from_a_rank_on_are_what_is_dropped(shape: tuple[int, int, int], in_metric: bool, seed: int) -> None:
    groups, rows, columns = shape
    torch.manual_seed(seed)
    matrix = torch.randn(groups * rows, columns, dtype=torch.float64)
    metric = metric_of(*shape) if in_metric else None
    found = decompose_grouped(matrix, groups, metric)
    total = np.square(found.values).sum()
    if metric is None:
        np.testing.assert_allclose(grouped_values(matrix, groups), found.values, rtol=1e-9, atol=1e-9)
    for rank in range(1, min(rows, columns) + 1):
        change = matrix - grouped_truncated_svd(matrix, rank, groups, metric=metric, decomposition=found).product()
        cost = float(change.square().sum()) if metric is None else metric.squared_size(change)
        assert cost == pytest.approx(float(np.square(found.values[rank:]).sum()), rel=1e-6, abs=1e-12 * total)


@given(shapes, st.integers(0, 2**31))
@settings(max_examples=40)
def test_the_metric_is_that_of_the_block_diagonal_matrix(shape: tuple[int, int, int], seed: int) -> None:
    groups, rows, columns = shape
    torch.manual_seed(seed)
    matrix, metric = torch.randn(groups * rows, columns, dtype=torch.float64), metric_of(*shape)
    whole, inputs, gradients = map(block_diagonal, (matrix.reshape(shape), metric.inputs, metric.gradients))
    expected = float((gradients @ whole @ inputs * whole).sum())
    assert metric.squared_size(matrix) == pytest.approx(expected, rel=1e-9)


def test_pairs_in_a_metric_are_those_of_each_group() -> None:
    torch.manual_seed(0)
    matrix, metric = torch.randn(12, 7, dtype=torch.float64), metric_of(3, 4, 7)
    pair = grouped_truncated_svd(matrix, 2, 3, metric=metric)
    for block, own, of_group in zip(matrix.chunk(3), metric.blocks, pair.pairs, strict=True):
        expected = weighted_truncated_svd(block, 2, own).product()
        torch.testing.assert_close(of_group.product(), expected, rtol=1e-9, atol=1e-9)


def test_the_mean_output_is_that_of_each_group() -> None:
    torch.manual_seed(0)
    matrix, mean = torch.randn(6, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    metric = GroupedMetric(positive_definite(3, 4), positive_definite(3, 2), mean)
    expected = block_diagonal(matrix.reshape(3, 2, 4)) @ mean.flatten()
    torch.testing.assert_close(metric.mean_output(matrix), expected)


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e160])
def test_values_of_any_size_are_added_up(scale: float) -> None:
    matrix = scale * torch.diag(torch.tensor([3.0, 4.0], dtype=torch.float64))
    np.testing.assert_allclose(grouped_values(matrix, 2), [5 * scale], rtol=1e-12)


def test_groups_of_zeros_have_no_values() -> None:
    np.testing.assert_array_equal(grouped_values(torch.zeros(6, 4), 3), [0, 0])


@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_that_no_group_has_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        grouped_truncated_svd(torch.randn(6, 4), rank, 3)
