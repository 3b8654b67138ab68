"""Choices for speed: the fastest form, only where it is faster than dense, and budgets of time."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import BadInput
from compressor.forms import predicted_seconds
from compressor.latency import Amount, DeviceProfile, Kernel, LayerUse, Workload
from compressor.network import Layer
from compressor.planning import (
    Budget,
    LayerLatency,
    LayerPlan,
    MeasuredLayer,
    Plan,
    PlanningSettings,
    TimeLimit,
    Times,
    choose_ranks,
    dense_seconds,
    read_plan,
    size_curve,
    with_latency,
)
from compressor.planning.layer_choices import layer_choices
from tests.planning.profiles import Charges, charging

WORKLOADS = (Workload("batch 1", 1), Workload("batch 32", 32))


def layer(
    name: str, sides: tuple[int, int], profile: DeviceProfile | None = None, *, decay: float = 0.9, **known: Any
) -> MeasuredLayer:
    known_as = Layer(name, name, f"{name}.weight", None, "linear", sides, sides)
    uses = (LayerUse(rows=1), LayerUse(rows=32))
    latency = None if profile is None else LayerLatency(profile, torch.float32, WORKLOADS, uses)
    values = decay ** np.arange(min(sides))
    return MeasuredLayer(known_as, values, itemsize=4, **{"latency": latency, **known})


def chosen(layers: list[MeasuredLayer], budget: Budget, limit: TimeLimit | None = None) -> tuple[LayerPlan, ...]:
    return choose_ranks(layers, budget, "auto", file_bytes=lambda _: 0, limit=limit)


def unlimited(ratio: float, *, rest: float = 0.0) -> TimeLimit:
    return TimeLimit(ratio, (rest,) * len(WORKLOADS))


BUDGETS = [Budget("keep", 0.5), Budget("tolerance", 0.2), Budget("window-rule")]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_where_only_arithmetic_costs_the_form_with_less_of_it_is_fastest(budget: Budget) -> None:
    [plan] = chosen([layer("a", (64, 64), charging())], budget)
    assert plan.form == "pivoted"


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_where_moving_numbers_is_slow_the_plain_form_is_fastest_though_it_is_larger(budget: Budget) -> None:
    [plan] = chosen([layer("a", (64, 64), charging(byte=1e-8))], budget)
    assert plan.form == "plain"
    [smallest] = chosen([layer("a", (64, 64))], budget)
    assert smallest.form == "pivoted"


@pytest.mark.parametrize("budget", [Budget("tolerance", 0.2), Budget("window-rule")], ids=str)
def test_where_a_kernel_costs_more_than_a_layer_the_layer_stays_dense_and_the_reason_names_the_device(
    budget: Budget,
) -> None:
    [plan] = chosen([layer("a", (64, 64), charging(kernel=1.0))], budget)
    assert plan.rank is None
    assert "would not be faster on stopwatch" in plan.reason


def test_a_size_is_shared_among_the_layers_that_become_faster() -> None:
    # One product of 64 x 64 costs less than a further kernel, one of 256 x 256 more.
    device = charging(kernel=2 * 100 * 100 * 1e-9)
    small, large = layer("small", (64, 64), device), layer("large", (256, 256), device)
    plans = chosen([small, large], Budget("keep", 0.5))
    assert [plan.rank is None for plan in plans] == [True, False]
    assert plans[0].reason == "every pair that saves bytes would be slower, or hardly faster, on stopwatch"


def test_a_size_that_cannot_be_met_faster_names_the_least_and_the_preference_that_can() -> None:
    slow = layer("slow", (64, 64), charging(kernel=1.0))
    with pytest.raises(BadInput, match=r"allow at least 1: .* faster on stopwatch, or .* `prefer='size'`"):
        chosen([slow], Budget("keep", 0.5))
    with pytest.raises(BadInput, match=r"allow at least 0\.\d+") as refused:
        chosen([slow, layer("fast", (64, 64), charging())], Budget("keep", 0.2))
    assert refused.value.option == "keep"


def test_an_embedding_is_compressed_though_it_is_no_faster() -> None:
    table = Layer("e", "e", "e.weight", None, "embedding", (512, 16), (16, 512))
    latency = LayerLatency(charging(kernel=1.0), torch.float32, WORKLOADS, (LayerUse(rows=1), LayerUse(rows=32)))
    measured = MeasuredLayer(table, 0.5 ** np.arange(16), itemsize=4, latency=latency)
    [plan] = chosen([measured], Budget("keep", 0.5))
    assert plan.rank is not None


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_every_pair_saves_the_least_time_in_every_workload(share: float) -> None:
    m = layer("a", (96, 48), charging(kernel=1e-6, byte=1e-9), settings=PlanningSettings(least_time_saving=share))
    table = layer_choices(m, "auto", "parameters")
    pairs = [index for index, form in enumerate(table.forms) if form != "dense"]
    assert pairs
    assert (table.seconds[:, pairs] <= (1 - share) * dense_seconds([m])[:, None]).all()
    assert m.latency is not None
    for index in pairs[:: max(1, len(pairs) // 5)]:
        form, rank = table.forms[index], int(table.ranks[index])
        for use, found in zip(m.latency.uses, table.seconds[:, index], strict=True):
            assert use is not None
            expected = predicted_seconds(
                m.latency.profile, m.layer, form, rank=np.array([rank]), use=use, dtype=torch.float32
            )
            assert found == expected


def test_a_layer_that_no_workload_uses_is_chosen_by_its_size() -> None:
    m = layer("a", (64, 64), charging(kernel=1.0))
    assert m.latency is not None
    [plan] = chosen([replace(m, latency=replace(m.latency, uses=(None, None)))], Budget("keep", 0.5))
    assert plan.rank is not None


@pytest.mark.parametrize("budget", [*BUDGETS, Budget("max-size", 20_000)], ids=str)
@pytest.mark.parametrize("profile", [None, charging()], ids=["size", "speed"])
def test_ranks_are_multiples_and_none_loses_more_than_without(budget: Budget, profile: DeviceProfile | None) -> None:
    known = {"above_edge": 9, "surviving_share": 0.1}
    layers = [layer(name, (96, 64), profile, decay=decay, **known) for name, decay in (("a", 0.9), ("b", 0.95))]
    free, rounded = (
        choose_ranks(
            [replace(m, rank_multiple=multiple) for m in layers],
            budget,
            "auto",
            file_bytes=lambda plans: 4 * sum(plan.parameters for plan in plans),
        )
        for multiple in (1, 8)
    )
    assert any(plan.rank for plan in rounded)
    assert all(plan.rank % 8 == 0 for plan in rounded if plan.rank)
    if budget.kind in ("tolerance", "window-rule"):
        for each, other in zip(rounded, free, strict=True):
            assert other.rank is not None
            assert each.rank in (-(-other.rank // 8) * 8, None)
            assert each.error <= other.error


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 16), st.floats(0.2, 0.8))
def test_what_rounding_loses_goes_back_to_the_budget(multiple: int, keep: float) -> None:
    layers = [layer(str(i), (48, 64), decay=0.8 + 0.05 * i, rank_multiple=multiple) for i in range(3)]
    try:
        plans = chosen(layers, Budget("keep", keep))
    except BadInput:
        return
    budget = int(keep * sum(m.layer.parameters for m in layers))
    left = budget - sum(plan.parameters for plan in plans)
    assert left >= 0
    for m, plan in zip(layers, plans, strict=True):
        table = layer_choices(m, "auto", "parameters")
        fits = table.choices.cost <= plan.parameters + left
        assert not (fits & (table.errors < plan.error)).any()


def test_a_multiple_beyond_the_layer_leaves_it_dense() -> None:
    for budget in (Budget("tolerance", 0.2), Budget("window-rule")):
        [plan] = chosen([layer("a", (4, 8), rank_multiple=16)], budget)
        assert plan.rank is None
    capped = layer("a", (8, 40), rank_multiple=16, rank_cap=2)
    assert layer_choices(capped, "auto", "parameters").forms == ["dense"]


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("rest", [0.0, 1e-4])
def test_a_latency_is_kept_in_every_workload_and_nothing_better_is_left_within_it(ratio: float, rest: float) -> None:
    device = charging(kernel=1e-7)
    layers = [layer(str(i), (96, 64), device, decay=0.85 + 0.04 * i) for i in range(3)]
    limit = unlimited(ratio, rest=rest)
    allowed = limit.allowed(dense_seconds(layers))
    if (allowed <= 0).any():
        with pytest.raises(BadInput, match=r"allow at least 0\.\d\d\dx"):
            chosen(layers, Budget("max-latency", ratio), limit)
        return
    plans = with_latency(layers, chosen(layers, Budget("max-latency", ratio), limit))
    taken = np.array([[each.predicted.chosen for each in plan.latency or ()] for plan in plans])
    assert (taken.sum(axis=0) <= allowed * (1 + 1e-9)).all()
    for m, plan, own in zip(layers, plans, taken, strict=True):
        table = layer_choices(m, "auto", "parameters")
        fits = (table.seconds <= (allowed - taken.sum(axis=0) + own)[:, None] * (1 - 1e-9)).all(axis=0)
        assert not (fits & (table.errors < plan.error)).any()


def test_the_least_latency_that_is_named_can_be_met_and_less_cannot() -> None:
    layers = [layer(str(i), (96, 64), charging(kernel=1e-6)) for i in range(2)]
    with pytest.raises(BadInput, match="allow at least") as refused:
        chosen(layers, Budget("max-latency", 0.01), unlimited(0.01))
    assert refused.value.option == "max_latency"
    least = float(str(refused.value).partition("allow at least ")[2].removesuffix("x"))
    assert chosen(layers, Budget("max-latency", least), unlimited(least))
    with pytest.raises(BadInput):
        chosen(layers, Budget("max-latency", least - 0.002), unlimited(least - 0.002))


def test_what_the_rest_takes_is_to_be_saved_by_the_layers() -> None:
    layers = [layer(str(i), (96, 64), charging()) for i in range(2)]
    dense = dense_seconds(layers)
    # Where the rest takes as long as the layers, 0.8 of the whole is 0.6 of the layers.
    limit = TimeLimit(0.8, tuple(dense.tolist()))
    assert limit.allowed(dense) == pytest.approx(0.6 * dense)
    assert limit.ratios(dense, 0.6 * dense) == pytest.approx(np.full(2, 0.8))


@pytest.mark.parametrize(("keep", "ratio"), [(0.5, 0.3), (0.3, 0.5), (0.4, 0.4), (0.9, 0.2)])
def test_a_size_and_a_latency_are_both_kept_at_nearly_the_least_loss_of_all(keep: float, ratio: float) -> None:
    # So few ranks that all plans can be tried.
    device = charging(kernel=2e-7)
    layers = [
        layer("a", (64, 64), device, rank_multiple=4, weighted_values=3 * 0.93 ** np.arange(64)),
        layer("b", (96, 64), device, rank_multiple=4, weighted_values=0.9 ** np.arange(64)),
        layer("c", (48, 160), device, rank_multiple=4, weighted_values=2 * 0.96 ** np.arange(48)),
    ]
    budget, limit = Budget("keep", keep, max_latency=ratio), unlimited(ratio)
    found = choose_ranks(layers, budget, "auto", file_bytes=lambda _: 0, exponent=0.0, limit=limit)
    plans = with_latency(layers, found)
    allowed, total = limit.allowed(dense_seconds(layers)), sum(m.layer.parameters for m in layers)
    taken = sum(np.array([each.predicted.chosen for each in plan.latency or ()]) for plan in plans)
    assert (taken <= allowed * (1 + 1e-9)).all()
    assert sum(plan.parameters for plan in plans) <= keep * total
    tables = [layer_choices(m, "auto", "parameters") for m in layers]
    losses = [m.total * np.square(table.errors) for m, table in zip(layers, tables, strict=True)]
    least = min(
        sum(loss[i] for loss, i in zip(losses, choice, strict=True))
        for choice in itertools.product(*(range(len(table.forms)) for table in tables))
        if sum(table.choices.cost[i] for table, i in zip(tables, choice, strict=True)) <= keep * total
        and (sum(table.seconds[:, i] for table, i in zip(tables, choice, strict=True)) <= allowed).all()
    )
    lost = sum(m.total * plan.error**2 for m, plan in zip(layers, plans, strict=True))
    dropped = sum(m.total for m in layers)
    assert least <= lost * (1 + 1e-9)
    assert lost - least <= 0.02 * dropped


def test_a_latency_that_the_size_meets_anyway_changes_nothing() -> None:
    layers = [layer(str(i), (96, 64), charging(), decay=0.8 + 0.05 * i) for i in range(3)]
    assert chosen(layers, Budget("keep", 0.4, max_latency=0.9), unlimited(0.9)) == chosen(layers, Budget("keep", 0.4))


def test_a_file_size_and_a_latency_are_both_kept() -> None:
    layers = [layer(str(i), (96, 64), charging(kernel=1e-7), decay=0.8 + 0.05 * i) for i in range(3)]

    def file_bytes(plans: tuple[LayerPlan, ...]) -> int:
        return 100 + sum(4 * plan.parameters + 1000 for plan in plans)

    limit = unlimited(0.4)
    plans = choose_ranks(
        layers, Budget("max-size", 50_000, max_latency=0.4), "auto", file_bytes=file_bytes, limit=limit
    )
    taken = sum(
        np.array([each.predicted.chosen for each in plan.latency or ()]) for plan in with_latency(layers, plans)
    )
    assert file_bytes(plans) <= 50_000
    assert (taken <= limit.allowed(dense_seconds(layers)) * (1 + 1e-9)).all()


def test_the_curve_over_sizes_begins_at_the_smallest_size_that_is_faster() -> None:
    device = charging(kernel=2 * 100 * 100 * 1e-9)
    layers = [layer("small", (64, 64), device), layer("large", (256, 256), device)]
    curve = size_curve(layers, "auto")
    assert curve.parameters[0] >= layers[0].layer.parameters
    assert curve.losses[-1] == 0


def test_the_plan_states_seconds_and_reads_back_without_them(tmp_path: Path) -> None:
    layers = [layer("a", (64, 64), charging()), layer("b", (64, 64))]
    planned = with_latency(
        layers, chosen([layers[0]], Budget("tolerance", 0.2)) + chosen(layers[1:], Budget("tolerance", 0.2))
    )
    plan = Plan("model", None, Budget("tolerance", 0.2), planned)
    first, second = plan.to_dict()["layers"]
    assert [each["workload"] for each in first["latency"]] == ["batch 1", "batch 32"]
    assert first["latency"][0]["predicted"]["dense"] == 2 * 64 * 64 * 1e-9
    assert first["latency"][0]["measured"] is None
    assert "latency" not in second
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.to_dict()))
    assert [(each.rank, each.form, each.latency) for each in read_plan(path).layers] == [
        (each.rank, each.form, None) for each in planned
    ]


def test_a_form_that_is_corrected_again_is_predicted_as_it_was_measured_last() -> None:
    m = layer("a", (64, 64), charging())
    assert m.latency is not None
    latency = m.latency
    for measured, rank in ((1.2, 16), (1.1, 8), (0.9, 4)):
        known = latency.of(m.layer, "plain", rank)
        # The second workload was not timed the second time.
        timed = [replace(known[0], measured=Times(2.0, 2.0 * measured)), known[1]]
        latency = latency.corrected("plain", timed)
        first, _ = latency.of(m.layer, "plain", rank)
        assert first.predicted.ratio == pytest.approx(measured)
    _, second = latency.of(m.layer, "plain", 4)
    assert second.predicted.ratio == pytest.approx(4 * 128 / 64**2)


@dataclass(frozen=True)
class Counting(Charges):
    """A device that notes what it is asked for."""

    asked: list[Kernel] = field(default_factory=list)

    def seconds(self, kernel: Kernel, dtype: torch.dtype) -> Amount:
        self.asked.append(kernel)
        return super().seconds(kernel, dtype)


def test_a_device_is_asked_once_about_a_layer_and_again_where_it_is_used_otherwise() -> None:
    device = Counting(**vars(charging()))
    one = layer("one", (16, 24), device)
    first = layer_choices(one, "auto", "parameters")
    asked = len(device.asked)
    again = layer_choices(replace(one, rank_multiple=1), "auto", "bytes", exponent=0.5)
    assert len(device.asked) == asked
    assert np.array_equal(first.seconds, again.seconds)
    assert one.latency is not None
    longer = replace(one.latency, uses=(LayerUse(rows=2), LayerUse(rows=64)))
    assert np.array_equal(longer.dense(one.layer), 2 * one.latency.dense(one.layer))
    other = Layer("other", "other", "other.weight", None, "linear", (32, 48), (32, 48))
    assert np.array_equal(one.latency.dense(other), 4 * one.latency.dense(one.layer))
