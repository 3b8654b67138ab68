"""Grouped pairs: one pair of the same rank for every group of a grouped convolution.

The matrix of the layer is `d_out x d_in`, where `d_in` has the channels of one group. Its first `d_out / g` rows are of
the first group, and so on: as one matrix of all inputs it is block diagonal. The best pairs of rank r are those of the
blocks, each by itself (Eckart and Young, 1936), and what they drop together are the squares of the blocks' singular
values from the r-th on. So the singular values of the layer are taken to be the roots of the sums of the squares of the
blocks' first, second, .. values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compressor.factorize.truncated_svd import FactorPair, truncated_svd
from compressor.factorize.weighted_svd import Decomposition, Metric, decompose
from compressor.measure import Spectrum, singular_values
from compressor.torch_state import in_float64


@dataclass(frozen=True)
class GroupedPair:
    """The pairs of all groups, of the same rank."""

    pairs: tuple[FactorPair, ...]

    @property
    def rank(self) -> int:
        return self.pairs[0].rank

    def product(self) -> Tensor:
        """The `d_out x d_in` matrix that the pairs stand for, the rows of a group after those of the one before."""
        return torch.cat([pair.product() for pair in self.pairs])


@dataclass(frozen=True)
class GroupedMetric(Metric):
    """The metric of a matrix whose groups of rows have inputs of their own.

    `inputs` is `g x d_in x d_in`, `gradients` is `g x d_out/g x d_out/g`, and `mean` is `g x d_in`: the blocks on the
    diagonals of the moments of all inputs and of all gradients. What inputs or gradients of different groups have to do
    with each other is left out, so that the groups come apart.
    """

    @property
    def blocks(self) -> tuple[Metric, ...]:
        """The metric of each group."""
        means = [None] * len(self.inputs) if self.mean is None else self.mean
        return tuple(map(Metric, self.inputs, self.gradients, means))

    def squared_size(self, matrix: Tensor) -> float:
        blocks = self.blocks
        return sum(metric.squared_size(block) for metric, block in zip(blocks, matrix.chunk(len(blocks)), strict=True))

    def mean_output(self, matrix: Tensor) -> Tensor:
        assert self.mean is not None
        return torch.cat([block @ mean for block, mean in zip(matrix.chunk(len(self.mean)), self.mean, strict=True)])


def grouped_values(matrix: Tensor, groups: int) -> Spectrum:
    """The singular values of a `d_out x d_in` matrix of so many groups, descending; of one group its own."""
    if groups == 1:
        return singular_values(matrix)
    return _together([singular_values(block) for block in matrix.chunk(groups)])


def grouped_truncated_svd(
    matrix: Tensor,
    rank: int,
    groups: int,
    *,
    metric: GroupedMetric | None = None,
    decomposition: Decomposition | None = None,
) -> GroupedPair:
    """The best pairs of a rank for the groups of a `d_out x d_in` matrix, in float64.

    Args:
        matrix: The matrix.
        rank: The rank of every pair.
        groups: How many groups its rows have.
        metric: The metric of the loss; by default the Frobenius norm.
        decomposition: What `decompose_grouped` gives in the metric, where it is known.
    """
    blocks = matrix.chunk(groups)
    if metric is None and decomposition is None:
        return GroupedPair(tuple(truncated_svd(block, rank) for block in blocks))
    found = decomposition or decompose_grouped(matrix, groups, metric)
    parts = zip(blocks, _of_groups(metric, groups), found.basis, strict=True)
    return GroupedPair(tuple(Decomposition(found.values, basis).pair(block, rank, own) for block, own, basis in parts))


def decompose_grouped(matrix: Tensor, groups: int, metric: GroupedMetric | None = None) -> Decomposition:
    """The decomposition of a `d_out x d_in` matrix in a metric, or in the Frobenius norm: the values of all groups
    together, and a basis for each."""
    blocks = zip(matrix.chunk(groups), _of_groups(metric, groups), strict=True)
    found = [decompose(in_float64(block), own) for block, own in blocks]
    return Decomposition(_together([each.values for each in found]), torch.stack([each.basis for each in found]))


def _of_groups(metric: GroupedMetric | None, groups: int) -> Sequence[Metric | None]:
    return [None] * groups if metric is None else metric.blocks


def _together(values: Sequence[Spectrum]) -> Spectrum:
    """The roots of the sums of squares of the groups' values, without squares that leave the range of float64."""
    largest = max(float(each.max()) for each in values)
    if not 0 < largest < np.inf:
        return np.asarray(sum(values), dtype=np.float64)
    return np.asarray(largest * np.sqrt(np.square(np.stack(values) / largest).sum(axis=0)), dtype=np.float64)
