"""What training wrote as a choice: from rank 0 on, never at a loss, and only where a layer's start is known."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compressor.choices import FormRequest
from compressor.errors import BadInput
from compressor.initial import Start
from compressor.latency import LayerUse, Workload
from compressor.network import Layer
from compressor.planning import Budget, LayerLatency, MeasuredLayer, Plan, PlanningSettings, choose_ranks, read_plan
from compressor.planning.allocation import even_shares
from compressor.planning.edits import apply_edits
from compressor.planning.layer_choices import layer_choices
from compressor.planning.rules import plan_by_tolerance
from compressor.planning.size import plan_by_size
from tests.planning.profiles import charging

SHARE, WRITTEN = 0.9, 0.3


def started(
    name: str = "a", sides: tuple[int, int] = (40, 30), rank: int = 3, *, size: float = WRITTEN
) -> MeasuredLayer:
    """A linear layer of full rank of which training wrote a matrix of a rank, of so much of its norm."""
    layer = Layer(name, name, f"{name}.weight", None, "linear", sides, sides)
    whole = np.linspace(2.0, 1.0, min(sides))
    written = np.where(np.arange(min(sides)) < rank, 1.0, 0.0)
    written *= size * np.linalg.norm(whole) / max(np.linalg.norm(written), 1e-300)
    own = {"initial+plain": written, "initial+pivoted": written}
    start = Start(0.95, 30.0, SHARE, SHARE + 0.01, SHARE, size)
    return MeasuredLayer(layer, whole, itemsize=4, own_values=own, start=start)


def unstarted(m: MeasuredLayer) -> MeasuredLayer:
    return replace(m, own_values={}, start=None)


def no_files(_: object) -> int:
    raise AssertionError("the size of files was asked for")


def test_errors_are_relative_to_the_whole_matrix() -> None:
    errors = started().errors("initial+plain")
    assert errors[0] == pytest.approx(WRITTEN)
    assert errors[3] == 0
    assert errors[1] == pytest.approx(WRITTEN * math.sqrt(2 / 3))


def test_nothing_but_the_seed_is_a_choice() -> None:
    choices = layer_choices(started(), "auto", "bytes")
    smallest = int(choices.choices.cost.argmin())
    assert (choices.choices.cost[smallest], choices.ranks[smallest]) == (0, 0)
    assert choices.forms[smallest] == "initial+plain"
    assert choices.errors[smallest] == pytest.approx(WRITTEN)
    (layer,) = choose_ranks([started()], Budget("keep", 0.01), "auto", file_bytes=no_files)
    assert (layer.rank, layer.parameters, layer.share) == (0, 0, SHARE)


def test_a_tolerance_is_met_by_what_training_wrote() -> None:
    at_once, exact = (plan_by_tolerance([started()], limit, "auto")[0] for limit in (0.31, 0.05))
    assert (at_once.form, at_once.rank) == ("initial+plain", 0)
    assert (exact.form, exact.rank, exact.share) == ("initial+plain", 3, SHARE)
    (without,) = plan_by_tolerance([unstarted(started())], 0.05, "auto")
    assert (without.form, without.share) == ("dense", None)


@given(
    sides=st.tuples(st.integers(4, 40), st.integers(4, 40)),
    rank=st.integers(0, 4),
    size=st.floats(0, 1.2),
    keep=st.floats(0.05, 0.95),
)
@example(sides=(4, 4), rank=4, size=1.0, keep=0.25)
@settings(max_examples=50)
def test_a_start_loses_no_more(sides: tuple[int, int], rank: int, *, size: float, keep: float) -> None:
    m = started("a", sides, rank, size=size)
    budget = int(keep * m.layer.parameters)
    with_start, without = (plan_by_size([each], budget, "auto", unit="parameters") for each in (m, unstarted(m)))
    if with_start is None:
        assert without is None
        assert not layer_choices(m, "auto", "parameters").started.any(), "nothing but the seed is within every budget"
        return
    assert with_start[0].parameters <= budget
    assert without is None or with_start[0].error <= without[0].error


@pytest.mark.parametrize(
    ("request_", "forms"),
    [("auto", {"initial+plain", "initial+pivoted"}), ("plain", {"initial+plain"}), ("pivoted", {"initial+pivoted"})],
)
def test_the_form_that_is_asked_for_is_that_of_what_training_wrote(request_: FormRequest, forms: set[str]) -> None:
    assert {form for form in layer_choices(started(), request_, "bytes").forms if "initial" in form} == forms


def test_forms_can_be_excluded() -> None:
    settings = PlanningSettings(excluded_forms=("initial+plain", "initial+pivoted"))
    assert not any(
        "initial" in form for form in layer_choices(replace(started(), settings=settings), "auto", "bytes").forms
    )


def test_for_speed_it_is_a_choice_only_where_a_size_is_asked_for() -> None:
    use = LayerUse(rows=64)
    latency = LayerLatency(charging(), torch.float32, (Workload("batch 1", 1),), (use,))
    m = replace(started(), latency=latency)
    (by_tolerance,) = plan_by_tolerance([m], 0.35, "auto")
    assert "initial" not in by_tolerance.form
    choices = layer_choices(m, "auto", "parameters")
    own = [index for index, form in enumerate(choices.forms) if form == "initial+plain"]
    assert len(own) > 3
    assert np.allclose(choices.seconds[:, own], latency.dense(m.layer)[:, None])


def document(layers: list[dict[str, Any]]) -> dict[str, Any]:
    return Plan("m", None, Budget("plan"), ()).to_dict() | {"layers": layers}


def test_a_plan_comes_back_from_its_document(tmp_path: Path) -> None:
    measured = [started("a"), started("b", size=0.2), unstarted(started("c"))]
    layers = choose_ranks(measured, Budget("keep", 0.4), "auto", file_bytes=no_files)
    assert any(layer.share is not None for layer in layers)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(Plan("m", None, Budget("keep", 0.4), layers).to_dict()))
    again = apply_edits(read_plan(path), measured, "the plan")
    for one, other in zip(layers, again, strict=True):
        assert replace(one, reason="") == replace(other, reason="")


def test_a_document_without_a_start_is_what_it_was() -> None:
    (layer,) = choose_ranks([unstarted(started())], Budget("keep", 0.4), "auto", file_bytes=no_files)
    assert "share" not in layer.to_dict()


def edited(tmp_path: Path, m: MeasuredLayer, **entry: Any) -> Any:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(document([{"name": "a", **entry}])))
    return apply_edits(read_plan(path), [m], "the plan")[0]


def test_an_edited_share_is_taken_and_a_missing_one_is_the_measured(tmp_path: Path) -> None:
    given_share = edited(tmp_path, started(), rank=0, form="initial+plain", share=0.8)
    measured_share = edited(tmp_path, started(), rank=2, form="initial+pivoted")
    assert (given_share.share, measured_share.share) == (0.8, SHARE)
    assert edited(tmp_path, started(), rank=2, form="plain", share=0.8).share is None


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"rank": 0, "form": "plain"}, "not a positive whole number"),
        ({"rank": -1, "form": "initial+plain"}, "not a whole number"),
        ({"rank": 1, "form": "initial+plain", "share": "much"}, "not a number"),
        ({"rank": 1, "form": "initial+plain", "share": math.nan}, "not a number"),
        ({"rank": 31, "form": "initial+plain"}, "does not exist"),
        ({"rank": 1, "form": "initial+channel"}, "does not exist"),
    ],
)
def test_entries_that_cannot_be_are_refused(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        edited(tmp_path, started(), **entry)


def test_without_a_start_the_form_is_refused_and_the_remedy_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="`initial`"):
        edited(tmp_path, unstarted(started()), rank=1, form="initial+plain")


@pytest.mark.parametrize("size", [1.0, 0.995])
def test_a_start_that_gains_nothing_is_no_choice(size: float) -> None:
    m = started(size=size)
    values = m.singular_values * size
    forgotten = replace(m, own_values=dict.fromkeys(m.own_values, values))
    assert not any("initial" in form for form in layer_choices(forgotten, "auto", "bytes").forms)
    (plan,) = plan_by_tolerance([forgotten], 0.05, "auto")
    assert plan == plan_by_tolerance([unstarted(m)], 0.05, "auto")[0]


def decaying(name: str, sides: tuple[int, int], ranks: float, *, size: float = 1.0) -> MeasuredLayer:
    """A layer whose spectrum falls over so many ranks, and of which training wrote all of it but for its size."""
    values = np.exp(-np.arange(min(sides)) / ranks)
    return replace(started(name, sides), singular_values=values, own_values={"initial+plain": size * values})


def test_a_layer_is_not_given_up_because_it_may_be_nothing_but_its_seed() -> None:
    """An even share leaves small layers nothing but their seed: that loss is not what they are measured by."""
    lenient = PlanningSettings(most_started_loss=1)
    layers = [
        replace(decaying(name, (rows, 60), ranks, size=0.95), settings=lenient)
        for name, rows, ranks in (("small", 10, 2), ("large", 60, 1))
    ]
    budget = int(0.07 * sum(m.layer.parameters for m in layers))
    choices = [layer_choices(m, "plain", "parameters") for m in layers]
    even = even_shares([each.choices for each in choices], budget)
    assert choices[0].ranks[even[0]] == 0
    all_unstarted = [unstarted(m) for m in layers]
    plans, without = (plan_by_size(each, budget, "plain", unit="parameters") for each in (layers, all_unstarted))
    assert plans is not None
    assert without is not None
    for plan, other in zip(plans, without, strict=True):
        assert plan.error < other.error, plan


def test_the_last_error_of_a_layer_that_nearly_is_its_start_is_not_worth_others() -> None:
    """What training wrote of a large layer falls steeply: an even share of the size leaves next to no error there."""
    written = 0.1 * np.exp(-np.arange(60) / 0.3)
    large = replace(started("large", (60, 60)), singular_values=np.ones(60), own_values={"initial+plain": written})
    small = decaying("small", (10, 60), 4, size=0.9)
    budget = int(0.1 * (600 + 3600))

    def errors(**settings: Any) -> list[float]:
        layers = [replace(m, settings=PlanningSettings(**settings)) for m in (large, small)]
        plans = plan_by_size(layers, budget, "plain", unit="parameters")
        assert plans is not None
        return [plan.error for plan in plans]

    (of_large, of_small), (_, before) = errors(), errors(least_started_loss=0)
    assert of_small < before / 2
    assert of_large < 0.02


@pytest.mark.parametrize(("size", "taken"), [(0.6, True), (0.8, False)])
def test_without_data_starts_are_taken_only_where_they_are_predicted_to_lose_clearly_less(
    size: float, *, taken: bool
) -> None:
    layers = [decaying("a", (40, 60), 8, size=size), decaying("b", (60, 60), 8, size=size)]
    budget = int(0.3 * sum(m.layer.parameters for m in layers))
    plans = plan_by_size(layers, budget, "plain", unit="parameters")
    without = plan_by_size([unstarted(m) for m in layers], budget, "plain", unit="parameters")
    assert plans is not None
    assert any("initial" in plan.form for plan in plans) == taken
    assert (plans == without) != taken


def test_a_size_below_that_of_all_pairs_is_met_by_starts_that_gain_little() -> None:
    layers = [decaying("a", (40, 60), 8, size=0.9), decaying("b", (60, 60), 8, size=0.9)]
    assert plan_by_size([unstarted(m) for m in layers], 99, "plain", unit="parameters") is None
    plans = plan_by_size(layers, 99, "plain", unit="parameters")
    assert plans is not None
    assert all(plan.rank == 0 for plan in plans)
