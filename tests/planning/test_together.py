"""Layers that run together have one rank: the best within the budget, or the largest that any of them needs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.planning import Budget, LayerPlan, MeasuredLayer, choose_ranks
from compressor.planning.layer_choices import layer_choices
from tests.planning.test_plan import measured, no_files


@st.composite
def blocks(draw: st.DrawFn) -> list[MeasuredLayer]:
    """Two kinds of layers of several experts each, and a layer that is alone."""
    found = [measured("alone", 20, 30, decay=draw(st.floats(0.5, 0.95)))]
    for role in ("up", "down"):
        sides = draw(st.integers(12, 40)), draw(st.integers(12, 40))
        found += [
            measured(f"{number}.{role}", *sides, decay=draw(st.floats(0.5, 0.95)), together=f"*.{role}")
            for number in range(draw(st.integers(1, 4)))
        ]
    return found


def by_role(layers: list[MeasuredLayer], plans: tuple[LayerPlan, ...]) -> list[set[tuple[str, int | None]]]:
    roles = {m.together for m in layers} - {None}
    return [
        {(plan.form, plan.rank) for m, plan in zip(layers, plans, strict=True) if m.together == role} for role in roles
    ]


@settings(max_examples=60, deadline=None)
@given(blocks(), st.floats(0.3, 1.0))
def test_within_a_size_they_have_one_rank(layers: list[MeasuredLayer], keep: float) -> None:
    plans = choose_ranks(layers, Budget("keep", keep), "plain", file_bytes=no_files)
    assert all(len(kinds) == 1 for kinds in by_role(layers, plans))
    assert sum(plan.parameters for plan in plans) <= keep * sum(m.layer.parameters for m in layers)
    # No role has a larger rank that would still fit.
    left = keep * sum(m.layer.parameters for m in layers) - sum(plan.parameters for plan in plans)
    for role in {m.together for m in layers} - {None}:
        own = [(m, plan) for m, plan in zip(layers, plans, strict=True) if m.together == role]
        m, plan = own[0]
        if plan.rank is not None:
            choices = layer_choices(m, "plain", "parameters")
            larger = [int(cost) for cost in choices.choices.cost if cost > plan.parameters]
            assert not larger or len(own) * (min(larger) - plan.parameters) > left


@settings(max_examples=60, deadline=None)
@given(blocks(), st.floats(0.05, 0.6))
def test_for_a_tolerance_they_have_the_largest_rank_of_any(layers: list[MeasuredLayer], tolerance: float) -> None:
    budget = Budget("tolerance", tolerance)
    alone = choose_ranks([replace(m, together=None) for m in layers], budget, "plain", file_bytes=no_files)
    plans = choose_ranks(layers, budget, "plain", file_bytes=no_files)
    for role in {m.together for m in layers} - {None}:
        needed = [plan.rank for m, plan in zip(layers, alone, strict=True) if m.together == role]
        found = {plan.rank for m, plan in zip(layers, plans, strict=True) if m.together == role}
        assert found == {None if None in needed else max(rank for rank in needed if rank is not None)}
    assert all(plan.error <= tolerance for plan in plans)


def test_a_layer_that_must_stay_dense_shares_no_rank() -> None:
    layers = [measured(f"{number}.up", 30, 30, decay=0.7, together="*.up") for number in range(3)]
    layers[1] = replace(layers[1], stays_dense="calibration did not reach it")
    plans = choose_ranks(layers, Budget("keep", 0.7), "plain", file_bytes=no_files)
    assert plans[1].rank is None
    assert plans[0].rank == plans[2].rank is not None


@pytest.mark.parametrize("keep", [0.4, 0.7])
def test_layers_that_are_alike_lose_nothing_by_it(keep: float) -> None:
    layers = [measured(f"{number}.up", 32, 32, decay=0.8) for number in range(4)]
    apart = choose_ranks(layers, Budget("keep", keep), "plain", file_bytes=no_files)
    together = choose_ranks(
        [replace(m, together="*.up") for m in layers], Budget("keep", keep), "plain", file_bytes=no_files
    )
    assert {plan.rank for plan in together} == {min(plan.rank or 0 for plan in apart)}
