"""Weights put together: whatever form the parts are stored in, the matrix is the one that blocks of dense ones make."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.factorize import FactorPair, PivotedPair, pivoted_pair
from compressor.merging import joined
from compressor.merging.weights import Weight, as_pair, dense, scaled

FORMS = ("dense", "pair", "pivoted")


def weight(form: str, d_out: int, d_in: int, *, rank: int, seed: int, kernel: tuple[int, ...] = ()) -> Weight:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if form == "dense":
        return normal(d_out, d_in, *kernel)
    pair = FactorPair(up=normal(d_out, rank, *(1 for _ in kernel)), down=normal(rank, d_in, *kernel))
    return pair if form == "pair" else pivoted_pair(pair)


def matrix(each: Weight) -> Tensor:
    """What a weight stands for, by the classes' own definition."""
    return each if isinstance(each, Tensor) else each.product()


@given(data=st.data())
@settings(max_examples=30)
def test_the_matrix_is_that_of_the_parts_in_blocks(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 3))
    shared_inputs, shared_outputs = data.draw(st.booleans()), data.draw(st.booleans())
    same = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    parts = []
    for seed in range(count):
        d_out = same[0] if shared_outputs else data.draw(st.integers(1, 9))
        d_in = same[1] if shared_inputs else data.draw(st.integers(1, 9))
        rank = data.draw(st.integers(1, min(d_out, d_in)))
        parts.append(weight(data.draw(st.sampled_from(FORMS)), d_out, d_in, rank=rank, seed=seed))
    found = matrix(joined(parts, shared_inputs=shared_inputs, shared_outputs=shared_outputs))
    blocks = [matrix(part) for part in parts]
    if shared_inputs and shared_outputs:
        expected = torch.stack(blocks).sum(0)
    elif shared_inputs:
        expected = torch.cat(blocks, dim=0)
    else:
        expected = torch.cat(blocks, dim=1) if shared_outputs else torch.block_diag(*blocks)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("shared_inputs", "shared_outputs"), [(True, True), (True, False), (False, True), (False, False)]
)
def test_pairs_become_a_pair_of_the_ranks_together(shared_inputs: bool, shared_outputs: bool) -> None:
    parts = [weight("pair", 40, 30, rank=rank, seed=rank) for rank in (3, 5)]
    found = joined(parts, shared_inputs=shared_inputs, shared_outputs=shared_outputs)
    assert isinstance(found, FactorPair)
    assert found.rank == 8


def test_pivoted_pairs_stay_pivoted_where_each_has_outputs_of_its_own() -> None:
    parts = [weight("pivoted", 20, 12, rank=rank, seed=rank) for rank in (3, 5)]
    for shared_inputs in (True, False):
        found = joined(parts, shared_inputs=shared_inputs, shared_outputs=False)
        assert isinstance(found, PivotedPair)
        assert found.rank == 8
        assert found.order.dtype == torch.int32
        assert sorted(found.order.tolist()) == list(range(40))


@given(rank=st.integers(1, 6))
def test_a_pivoted_pair_and_its_plain_pair_are_one_matrix(rank: int) -> None:
    pivoted = weight("pivoted", 9, 7, rank=rank, seed=rank)
    assert isinstance(pivoted, PivotedPair)
    torch.testing.assert_close(as_pair(pivoted).product(), pivoted.product())


def test_a_sum_of_pairs_is_never_larger_than_the_matrix() -> None:
    found = joined(
        [weight("pair", 10, 10, rank=4, seed=seed) for seed in (0, 1)], shared_inputs=True, shared_outputs=True
    )
    assert isinstance(found, Tensor)


def test_convolutions_side_by_side_convolve_as_each_alone() -> None:
    parts = [weight(form, 6, 4, rank=2, seed=seed, kernel=(3, 3)) for seed, form in enumerate(("pair", "pair"))]
    whole = joined(parts, shared_inputs=False, shared_outputs=False)
    assert isinstance(whole, FactorPair)
    images = torch.randn(2, 8, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = torch.conv2d(torch.conv2d(images, whole.down), whole.up)
    alone = [torch.conv2d(images[:, 4 * i : 4 * i + 4], dense(part)) for i, part in enumerate(parts)]
    torch.testing.assert_close(found, torch.cat(alone, dim=1))


@pytest.mark.parametrize("form", FORMS)
def test_scaling_scales_the_matrix(form: str) -> None:
    part = weight(form, 6, 5, rank=2, seed=1)
    torch.testing.assert_close(matrix(scaled(part, -1.5)), -1.5 * matrix(part))


def test_shapes_are_known_without_values() -> None:
    """What is announced to a writer is computed by the same code, on tensors without memory."""
    pairs = [weight("pivoted", 8, 6, rank=rank, seed=rank) for rank in (2, 3)]
    for pair in pairs:
        assert isinstance(pair, PivotedPair)
    empty = [
        PivotedPair(up=p.up.to("meta"), down=p.down.to("meta"), order=p.order.to("meta"))
        for p in pairs
        if isinstance(p, PivotedPair)
    ]
    for shared_outputs in (True, False):
        found = joined(pairs, shared_inputs=False, shared_outputs=shared_outputs)
        planned = joined(empty, shared_inputs=False, shared_outputs=shared_outputs)
        assert type(found) is type(planned)
        assert dense(found).shape == dense(planned).shape
