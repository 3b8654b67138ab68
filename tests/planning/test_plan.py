"""Plans: what each budget promises, and that an edited plan is checked before it is used."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import BadInput
from compressor.forms import stored_bytes, stored_parameters
from compressor.measure import truncation_errors
from compressor.network import Layer
from compressor.planning import (
    PLANNING,
    Budget,
    LayerPlan,
    MeasuredLayer,
    Plan,
    PlanningSettings,
    apply_edits,
    checked_budget,
    choose_ranks,
    default_budget,
    rank_caps,
    read_plan,
)
from compressor.planning.size import plan_by_file_size, plan_by_size


def measured(name: str, d_out: int, d_in: int, *, decay: float = 0.9, **known: Any) -> MeasuredLayer:
    layer = Layer(name, name, f"{name}.weight", None, "linear", (d_out, d_in), (d_out, d_in))
    return MeasuredLayer(layer, decay ** np.arange(min(d_out, d_in)), itemsize=4, **known)


def no_files(_: object) -> int:
    raise AssertionError("the size of files was asked for")


def forms_of(request: Any) -> tuple[Any, ...]:
    return ("plain", "pivoted") if request == "auto" else (request,)


@st.composite
def models(draw: st.DrawFn) -> list[MeasuredLayer]:
    sides = st.integers(2, 40)
    return [
        measured(str(i), draw(sides), draw(sides), decay=draw(st.floats(0.3, 1.0)))
        for i in range(draw(st.integers(1, 4)))
    ]


def saves_enough(m: MeasuredLayer, form: str, rank: int) -> bool:
    """Whether a pair is clearly smaller than the dense layer in bytes, and smaller in numbers."""
    fewer = stored_parameters(m.layer, form, rank) < m.layer.parameters
    return fewer and stored_bytes(m.layer, form, rank, itemsize=m.itemsize) <= 0.95 * m.layer.parameters * m.itemsize


@settings(max_examples=100)
@given(models(), st.floats(0.05, 1.0), st.sampled_from(["auto", "plain", "pivoted"]))
def test_keep_is_never_exceeded_and_met_to_within_one_rank(layers: list[MeasuredLayer], keep: float, form: Any) -> None:
    total = sum(m.layer.parameters for m in layers)
    try:
        plans = choose_ranks(layers, Budget("keep", keep), form, file_bytes=no_files)
    except BadInput:
        smallest = sum(
            min(m.layer.parameters, *(stored_parameters(m.layer, f, 1) for f in forms_of(form))) for m in layers
        )
        assert smallest > keep * total
        return
    after = sum(plan.parameters for plan in plans)
    assert after <= keep * total
    for m, plan in zip(layers, plans, strict=True):
        if plan.rank is None:
            assert plan.parameters == m.layer.parameters
            continue
        assert saves_enough(m, plan.form, plan.rank)
        larger = [
            stored_parameters(m.layer, stored, rank)
            for rank in range(plan.rank + 1, min(m.layer.shape) + 1)
            for stored in forms_of(form)
            if saves_enough(m, stored, rank)
        ]
        cheapest = min([*larger, m.layer.parameters])
        assert after - plan.parameters + cheapest > keep * total or truncation_errors(m.singular_values)[plan.rank] == 0


@settings(max_examples=100)
@given(models(), st.floats(0.01, 0.9))
def test_a_tolerance_holds_in_every_layer_with_the_smallest_rank(layers: list[MeasuredLayer], tolerance: float) -> None:
    for m, plan in zip(
        layers, choose_ranks(layers, Budget("tolerance", tolerance), "auto", file_bytes=no_files), strict=True
    ):
        errors = truncation_errors(m.singular_values)
        if plan.rank is None:
            assert plan.error == 0
        else:
            assert plan.error == errors[plan.rank] <= tolerance
            assert plan.rank == 1 or errors[plan.rank - 1] > tolerance


@settings(max_examples=100)
@given(models(), st.integers(0, 3000), st.integers(100, 20000))
def test_a_file_size_is_never_exceeded_whatever_else_the_file_holds(
    layers: list[MeasuredLayer], header: int, limit: int
) -> None:
    def file_bytes(plans: Any) -> int:
        numbers = sum(
            stored_bytes(m.layer, plan.form, plan.rank or 0, itemsize=4) for m, plan in zip(layers, plans, strict=True)
        )
        return header + sum(len(plan.form) + len(str(plan.rank)) for plan in plans) + numbers

    plans = plan_by_file_size(layers, limit, "auto", file_bytes=file_bytes)
    if plans is not None:
        assert file_bytes(plans) <= limit
        return
    # Refused only where rank one everywhere is too much, but for the few bytes by which plans differ in the header.
    smallest = sum(
        min(4 * m.layer.parameters, *(stored_bytes(m.layer, f, 1, itemsize=4) for f in forms_of("auto")))
        for m in layers
    )
    assert header + smallest + 10 * len(layers) > limit


def test_a_tolerance_finer_than_the_dtype_keeps_the_layer_dense() -> None:
    layers = [measured("a", 60, 60, decay=0.8, precision=0.008)]
    [coarse] = choose_ranks(layers, Budget("tolerance", 0.01), "auto", file_bytes=no_files)
    assert coarse.rank is not None
    assert coarse.error <= (0.01**2 - 0.008**2) ** 0.5
    [fine] = choose_ranks(layers, Budget("tolerance", 0.008), "auto", file_bytes=no_files)
    assert (fine.rank, "rounding" in fine.reason) == (None, True)


def test_the_window_rule_takes_the_smaller_rank_and_says_which() -> None:
    by_spectrum = measured("spectrum", 60, 60, decay=0.5, above_edge=50, surviving_share=0.1)
    by_edge = measured("edge", 60, 60, decay=0.99, above_edge=7, surviving_share=0.13)
    by_bound = measured("bound", 60, 60, decay=0.99, above_edge=30, surviving_share=0.1, rank_bound=5)
    plans = choose_ranks([by_spectrum, by_edge, by_bound], Budget("window-rule"), "auto", file_bytes=no_files)
    assert [plan.rank for plan in plans] == [4, 7, 5]  # 0.5^k <= 0.1 from k = 4
    assert "relative error" in plans[0].reason
    assert "edge" in plans[1].reason
    assert "memory window at epsilon 0.1" in plans[2].reason


@pytest.mark.parametrize(
    "known",
    [{}, {"above_edge": 0, "surviving_share": 0.1}, {"above_edge": 7, "surviving_share": 0.14}, {"above_edge": 7}],
)
def test_where_too_little_is_forgotten_or_known_the_window_rule_gives_way_to_a_safe_tolerance(
    known: dict[str, Any],
) -> None:
    [plan] = choose_ranks(
        [measured("a", 60, 60, decay=0.8, **known)], Budget("window-rule"), "auto", file_bytes=no_files
    )
    assert 0 < plan.error <= PLANNING.safe_tolerance
    assert "relative error" in plan.reason


def test_the_settings_say_how_much_of_the_start_may_survive_and_what_a_layer_may_lose() -> None:
    known = {"above_edge": 40, "surviving_share": 0.3}
    strict = measured("a", 60, 60, decay=0.8, **known)
    lenient = measured("a", 60, 60, decay=0.8, **known, settings=PlanningSettings(largest_surviving_share=0.5))
    coarse = replace(lenient, settings=replace(lenient.settings, window_rule_tolerance=0.3))
    assert (strict.window_rule_applies, lenient.window_rule_applies) == (False, True)
    ranks = [
        choose_ranks([m], Budget("window-rule"), "auto", file_bytes=no_files)[0].rank for m in (strict, lenient, coarse)
    ]
    assert ranks == [14, 11, 6]  # 0.8^k <= 0.05, 0.1 and 0.3
    safe = default_budget([strict], "sgd", PlanningSettings(safe_tolerance=0.2))
    assert (safe.kind, safe.value) == ("tolerance", 0.2)


def test_a_layer_saves_as_much_as_the_settings_want() -> None:
    for saving, dense in ((0.05, False), (0.9, True)):
        layer = measured("a", 60, 60, decay=0.5, settings=PlanningSettings(least_layer_saving=saving))
        [chosen] = choose_ranks([layer], Budget("tolerance", 0.01), "auto", file_bytes=no_files)
        assert (chosen.rank is None) == dense


def test_what_applies_when_nothing_is_asked() -> None:
    known, unknown = measured("a", 9, 9, above_edge=3, surviving_share=0.1), measured("b", 9, 9)
    assert default_budget([known], "sgd").kind == "window-rule"
    assert default_budget([unknown], "sgd").kind == "tolerance"
    assert default_budget([known], "adaptive").kind == "tolerance"
    assert default_budget([known], None).kind == "tolerance"


def test_a_pair_that_would_not_be_smaller_stays_dense() -> None:
    [plan] = choose_ranks([measured("a", 10, 10, decay=1.0)], Budget("tolerance", 0.05), "plain", file_bytes=no_files)
    assert (plan.rank, plan.form, plan.parameters, plan.error) == (None, "dense", 100, 0.0)


@pytest.mark.parametrize(
    "budget",
    [
        {"keep": 0.0},
        {"keep": -1.0},
        {"keep": 1.01},
        {"keep": float("nan")},
        {"max_size": 0},
        {"max_drop": -0.01},
        {"max_drop": float("nan")},
        {"max_drop": float("inf")},
        {"tolerance": 0.0},
        {"tolerance": 1.0},
        {"tolerance": float("inf")},
    ],
)
def test_impossible_budgets_are_refused(budget: dict[str, float]) -> None:
    [(option, value)] = budget.items()
    with pytest.raises(BadInput, match="out of range") as refused:
        checked_budget(Budget(option.replace("_", "-"), value))
    assert refused.value.option == option


LAYERS = [measured("a", 20, 30), measured("b", 12, 12)]


def written(folder: Path, **changes: Any) -> Path:
    layers = choose_ranks(LAYERS, Budget("keep", 0.5), "auto", file_bytes=no_files)
    document = Plan("model", "0" * 64, Budget("keep", 0.5), layers).to_dict()
    document["layers"][0] |= changes
    path = folder / "plan.json"
    path.write_text(json.dumps(document))
    return path


def test_a_plan_survives_its_json(tmp_path: Path) -> None:
    path = written(tmp_path)
    applied = apply_edits(read_plan(path), LAYERS, "plan.json")
    original = choose_ranks(LAYERS, Budget("keep", 0.5), "auto", file_bytes=no_files)
    assert [(p.name, p.rank, p.form, p.parameters, p.error) for p in applied] == [
        (p.name, p.rank, p.form, p.parameters, p.error) for p in original
    ]


def test_an_edited_rank_counts_and_is_measured_anew(tmp_path: Path) -> None:
    [first, _] = apply_edits(read_plan(written(tmp_path, rank=3, form="plain")), LAYERS, "plan.json")
    assert (first.rank, first.parameters) == (3, 3 * 50)
    assert first.error == truncation_errors(LAYERS[0].singular_values)[3]
    assert first.reason == "asked for by the plan"
    [first, _] = apply_edits(read_plan(written(tmp_path, rank=20, form="plain")), LAYERS, "plan.json")
    assert "larger than the layer" in first.reason
    [first, _] = apply_edits(read_plan(written(tmp_path, rank=None)), LAYERS, "plan.json")
    assert (first.rank, first.form) == (None, "dense")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "c"}, "c, which is not an eligible layer"),
        ({"name": "b"}, "twice"),
        ({"rank": 5, "form": "dense"}, "contradict"),
        ({"rank": 21}, "rank 21 of a does not exist"),
        ({"rank": 0}, "rank 0"),
        ({"rank": 2.5}, "rank 2.5"),
        ({"rank": True}, "rank True"),
        ({"form": "spiral"}, "spiral"),
        ({"form": "channel", "rank": 2}, "channel"),
        ({"shape": [30, 20]}, "30 x 20"),
        ({"name": 7}, "no name"),
    ],
)
def test_a_plan_that_does_not_fit_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        apply_edits(read_plan(written(tmp_path, **changes)), LAYERS, "plan.json")
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"layers": 3}', "\x00", '{"schema_version": 9, "layers": []}'])
def test_what_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(BadInput):
        read_plan(tmp_path / "plan.json")
    with pytest.raises(BadInput):
        read_plan(tmp_path / "missing.json")


@st.composite
def models_of_known_start(draw: st.DrawFn) -> list[MeasuredLayer]:
    """Layers to some of which the window rule applies, in all dtypes."""
    layers = []
    for m in draw(models()):
        full = min(m.layer.shape)
        known = {
            "above_edge": draw(st.none() | st.integers(0, full)),
            "surviving_share": draw(st.sampled_from([None, 0.0, 0.1, 0.9])),
            "rank_bound": draw(st.none() | st.integers(1, full)),
            "stays_dense": draw(st.sampled_from([None, None, None, "it was not reached"])),
            "itemsize": draw(st.sampled_from([2, 4, 8])),
        }
        layers.append(replace(m, **known))
    return layers


@pytest.mark.slow
@settings(max_examples=200)
@given(
    layers=models_of_known_start(),
    keep=st.floats(0.05, 1.0),
    form=st.sampled_from(["auto", "plain", "pivoted"]),
    unit=st.sampled_from("pb"),
)
def test_under_the_window_rules_caps_no_rank_is_above_them_and_every_size_that_can_be_met_is(
    layers: list[MeasuredLayer], keep: float, form: Any, *, unit: str
) -> None:
    def allocated(layers: list[MeasuredLayer]) -> tuple[LayerPlan, ...] | None:
        if unit == "b":
            size = sum(m.layer.parameters * m.itemsize for m in layers)
            return plan_by_size(layers, int(keep * size), form, unit="bytes")
        return plan_by_size(layers, int(keep * sum(m.layer.parameters for m in layers)), form, unit="parameters")

    caps = rank_caps(layers, "sgd")
    applies = [m for m in layers if m.above_edge and m.surviving_share is not None and m.surviving_share < 0.13]
    assert caps == {m.layer.name: min(m.above_edge or 0, m.rank_bound or m.layer.parameters) for m in applies}
    under_caps, free = [replace(m, rank_cap=caps.get(m.layer.name)) for m in layers], allocated(layers)
    plans = allocated(under_caps)
    assert (plans is None) == (free is None)
    for m, plan in zip(under_caps, plans or (), strict=bool(plans)):
        if m.rank_cap is not None and m.stays_dense is None and smaller_at_its_cap(m, form):
            assert plan.rank is not None
            assert plan.rank <= m.rank_cap


def smaller_at_its_cap(m: MeasuredLayer, form: Any) -> bool:
    """Whether the pair of as few numbers as possible at the cap saves enough bytes of the dense layer."""
    (d_out, d_in), rank = m.layer.shape, m.rank_cap or 0
    numbers = {"plain": rank * (d_out + d_in), "pivoted": rank * (d_out + d_in - rank) + 2 * d_out}
    chosen = form if form != "auto" else min(numbers, key=lambda each: (numbers[each], each == "pivoted"))
    indices = d_out if chosen == "pivoted" else 0
    in_bytes = (numbers[chosen] - 2 * indices) * m.itemsize + 4 * indices
    return numbers[chosen] < d_out * d_in and in_bytes <= (1 - PLANNING.least_layer_saving) * d_out * d_in * m.itemsize


@pytest.mark.parametrize("unit", ["parameters", "bytes"])
def test_a_cap_whose_pair_is_smaller_in_numbers_but_not_in_bytes_is_none(unit: Any) -> None:
    # 33 x 47 numbers of two bytes and 40 indices of four, instead of 40 x 40 numbers.
    layer = replace(measured("a", 40, 40), rank_cap=33, itemsize=2)
    assert plan_by_size([layer], 3200, "pivoted", unit=unit) == plan_by_size(
        [replace(layer, rank_cap=None)], 3200, "pivoted", unit=unit
    )


@pytest.mark.slow
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("request_", ["plain", "pivoted", "auto"])
@given(d_out=st.integers(2, 40), d_in=st.integers(2, 40), share=st.floats(0.02, 1.0))
def test_a_layer_is_factorized_only_where_that_saves_a_twentieth_of_its_bytes(
    request_: Any, itemsize: int, d_out: int, *, d_in: int, share: float
) -> None:
    layer = replace(measured("a", d_out, d_in), itemsize=itemsize)
    dense = itemsize * d_out * d_in
    budgets = [(Budget("keep", share), no_files), (Budget("tolerance", min(share, 0.99)), no_files)]
    for budget, files in budgets:
        try:
            [chosen] = choose_ranks([layer], budget, request_, file_bytes=files)
        except BadInput:
            continue
        if chosen.rank is not None:
            assert stored_bytes(layer.layer, chosen.form, chosen.rank, itemsize=itemsize) <= 0.95 * dense
        elif budget.kind == "tolerance":
            assert "would save less than 5%" in chosen.reason or "would not be smaller" in chosen.reason


def test_a_plan_that_is_given_is_obeyed_where_it_saves_next_to_nothing() -> None:
    layer = measured("a", 40, 40)
    edit = LayerPlan("a", (40, 40), "linear", 39, "plain", 0, math.nan, "")
    [chosen] = apply_edits(Plan("m", None, Budget("plan"), (edit,)), [layer], "plan.json")
    assert chosen.rank == 39


@pytest.mark.parametrize("family", ["adaptive", None])
def test_the_window_rule_caps_no_rank_of_another_optimizer(family: Any) -> None:
    layer = measured("a", 60, 60, above_edge=5, surviving_share=0.1)
    assert rank_caps([layer], "sgd") == {"a": 5}
    assert rank_caps([layer], family) == {}
