"""The allocation keeps its budget, spends it to within one rank, and is optimal where that can be checked."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from compressor.planning.allocation import Choices, allocate


@st.composite
def tables(draw: st.DrawFn) -> list[Choices]:
    layers = []
    for _ in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 6))
        cost = draw(st.lists(st.integers(1, 40), min_size=size, max_size=size))
        loss = draw(st.lists(st.floats(0, 1), min_size=size, max_size=size))
        layers.append(Choices(np.array(cost), np.array(loss)))
    return layers


def total(layers: list[Choices], chosen: list[int]) -> tuple[int, float]:
    pairs = list(zip(layers, chosen, strict=True))
    return sum(int(layer.cost[i]) for layer, i in pairs), sum(float(layer.loss[i]) for layer, i in pairs)


@settings(max_examples=300)
@given(tables(), st.integers(1, 160))
@example([Choices(np.array([1, 3]), np.array([5e-324, 0.0]))], 3)
def test_the_budget_is_kept_and_no_single_better_step_is_left_within_it(layers: list[Choices], budget: int) -> None:
    chosen = allocate(layers, budget)
    least = sum(int(layer.cost.min()) for layer in layers)
    assert (chosen is None) == (least > budget)
    if chosen is None:
        return
    cost, _ = total(layers, chosen)
    assert cost <= budget
    for layer, i in zip(layers, chosen, strict=True):
        affordable = layer.cost - layer.cost[i] <= budget - cost
        assert not (affordable & (layer.loss < layer.loss[i])).any()


@settings(max_examples=200)
@given(st.lists(st.lists(st.floats(0.01, 1), min_size=2, max_size=5), min_size=1, max_size=3), st.data())
def test_where_every_step_saves_less_than_the_one_before_it_is_optimal_at_its_own_cost(
    savings: list[list[float]], data: st.DataObject
) -> None:
    layers = []
    for steps in savings:
        falling = np.concatenate([[0.0], np.cumsum(sorted(steps, reverse=True))])
        layers.append(Choices(np.arange(len(falling)) + 1, falling[-1] - falling))
    budget = data.draw(st.integers(len(layers), sum(len(layer.cost) for layer in layers)))
    chosen = allocate(layers, budget)
    assert chosen is not None
    _, loss = total(layers, chosen)
    best = min(
        total(layers, list(options))[1]
        for options in itertools.product(*(range(len(layer.cost)) for layer in layers))
        if total(layers, list(options))[0] <= budget
    )
    assert loss <= best + 1e-9


@pytest.mark.slow
@settings(max_examples=200)
@given(tables(), st.integers(1, 120), st.integers(1, 40))
def test_a_larger_budget_is_never_refused_where_a_smaller_one_was_met(
    layers: list[Choices], budget: int, more: int
) -> None:
    assume(allocate(layers, budget) is not None)
    assert allocate(layers, budget + more) is not None
