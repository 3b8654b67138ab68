"""The allocation keeps its budget, spends it to within one rank, and is optimal where that can be checked."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from compressor.planning.allocation import Choices, ExchangeSettings, LimitedChoices, allocate, allocate_within


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


@settings(max_examples=300)
@given(tables(), st.integers(1, 160))
def test_of_few_layers_no_combination_within_the_budget_loses_less(layers: list[Choices], budget: int) -> None:
    chosen = allocate(layers, budget)
    assume(chosen is not None)
    assert chosen is not None
    every = (total(layers, list(each)) for each in itertools.product(*(range(len(layer.cost)) for layer in layers)))
    least = min(loss for cost, loss in every if cost <= budget)
    assert total(layers, chosen)[1] <= least / (1 - ExchangeSettings().gap) + 1e-9


def test_of_too_many_combinations_the_choices_are_never_worse_than_without_exchanges() -> None:
    generator = np.random.default_rng(0)
    better = 0
    for _ in range(50):
        layers = [
            Choices(np.cumsum(generator.integers(1, 90, 12)), np.sort(generator.random(12))[::-1]) for _ in range(8)
        ]
        budget = int(sum(generator.choice(layer.cost) for layer in layers))
        plain = allocate(layers, budget, exchange=ExchangeSettings(gap=np.inf))
        chosen = allocate(layers, budget, exchange=ExchangeSettings(combinations=64))
        assert plain is not None
        assert chosen is not None
        cost, loss = total(layers, chosen)
        assert cost <= budget
        assert loss <= total(layers, plain)[1]
        better += loss < total(layers, plain)[1]
    assert better > 10


@pytest.mark.slow
@settings(max_examples=200)
@given(tables(), st.integers(1, 120), st.integers(1, 40))
def test_a_larger_budget_is_never_refused_where_a_smaller_one_was_met(
    layers: list[Choices], budget: int, more: int
) -> None:
    assume(allocate(layers, budget) is not None)
    assert allocate(layers, budget + more) is not None


@st.composite
def limited(draw: st.DrawFn, *, convex: bool = False) -> tuple[list[LimitedChoices], np.ndarray]:
    """Layers whose costs all rise with the rank, as sizes and times do, and a limit for each cost."""
    kinds = draw(st.integers(2, 3))
    layers = []
    for _ in range(draw(st.integers(1, 3))):
        size = draw(st.integers(2, 6))
        rises = st.lists(st.floats(0.1, 5), min_size=size, max_size=size)
        costs = np.cumsum([draw(rises) for _ in range(kinds)], axis=1)
        falls = draw(st.lists(st.floats(0.01, 1), min_size=size - 1, max_size=size - 1))
        loss = np.cumsum([0.0, *(sorted(falls) if convex else falls)])[::-1]
        layers.append(LimitedChoices(costs, loss))
    largest = np.sum([layer.costs.max(axis=1) for layer in layers], axis=0)
    return layers, largest * np.array([draw(st.floats(0.2, 1.0)) for _ in range(kinds)])


def total_within(layers: list[LimitedChoices], chosen: list[int]) -> tuple[np.ndarray, float]:
    pairs = list(zip(layers, chosen, strict=True))
    return np.sum([layer.costs[:, i] for layer, i in pairs], axis=0), sum(float(layer.loss[i]) for layer, i in pairs)


def least_loss(layers: list[LimitedChoices], limits: np.ndarray) -> float | None:
    every = itertools.product(*(range(len(layer.loss)) for layer in layers))
    totals = (total_within(layers, list(options)) for options in every)
    return min((loss for costs, loss in totals if (costs <= limits).all()), default=None)


@settings(max_examples=200, deadline=None)
@given(limited())
def test_all_limits_are_kept_and_no_single_better_step_is_left_within_them(
    drawn: tuple[list[LimitedChoices], np.ndarray],
) -> None:
    layers, limits = drawn
    chosen = allocate_within(layers, limits)
    assert (chosen is None) == (least_loss(layers, limits) is None)
    if chosen is None:
        return
    costs, _ = total_within(layers, chosen)
    assert (costs <= limits * (1 + 1e-9)).all()
    for layer, i in zip(layers, chosen, strict=True):
        fits = (costs[:, None] + layer.costs - layer.costs[:, [i]] <= limits[:, None] * (1 - 1e-9)).all(axis=0)
        assert not (fits & (layer.loss < layer.loss[i])).any()


@settings(max_examples=200, deadline=None)
@given(limited(convex=True))
def test_within_several_limits_no_more_is_lost_than_the_least_and_a_step_for_each(
    drawn: tuple[list[LimitedChoices], np.ndarray],
) -> None:
    layers, limits = drawn
    chosen = allocate_within(layers, limits)
    least = least_loss(layers, limits)
    assert (chosen is None) == (least is None)
    if chosen is not None and least is not None:
        step = max(float(-np.diff(layer.loss).min()) for layer in layers)
        assert total_within(layers, chosen)[1] <= least + len(limits) * step + 1e-9


@pytest.mark.parametrize("limits", [(0.3, 0.9), (0.9, 0.3), (0.5, 0.5), (0.4, 0.6)])
def test_two_limits_with_many_small_steps_come_close_to_the_least_loss_by_duality(limits: tuple[float, float]) -> None:
    generator = np.random.default_rng(0)
    layers = []
    for _ in range(12):
        rank = np.arange(1, 201)
        size, time = generator.uniform(0.5, 2), generator.uniform(0.2, 3)
        costs = np.stack([size * rank, generator.uniform(1, 40) + time * rank])
        layers.append(LimitedChoices(costs, generator.uniform(1, 9) * np.exp(-rank / generator.uniform(10, 90))))
    allowed = np.array(limits) * np.sum([layer.costs.max(axis=1) for layer in layers], axis=0)
    chosen = allocate_within(layers, allowed)
    assert chosen is not None
    _, loss = total_within(layers, chosen)
    # For any prices of the costs, no plan within the limits loses less than this (weak duality).
    prices = np.geomspace(1e-4, 1e-1, 40)
    bound = max(
        sum(float((layer.loss + np.array(price) @ layer.costs).min()) for layer in layers) - np.array(price) @ allowed
        for price in itertools.chain(itertools.product([0.0, *prices], repeat=2))
    )
    assert bound <= loss <= 1.01 * bound
