"""Planned layers timed beside dense ones, by a timer that counts what a module stores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.engine import Fingerprint, Journal, Run
from compressor.evaluation import PairTimer, TimingSettings, count_parameters, unfilled_module
from compressor.forms import DENSE, FORMS
from compressor.latency import LayerUse, Workload
from compressor.lowrank import Rewriting
from compressor.model import layer_uses, measured_layers, open_model
from compressor.model.measurements import inspect_layers
from compressor.planning import Budget, LayerLatency, MeasuredLayer, Plan, choose_ranks, with_latency
from tests.planning.profiles import charging

CPU = torch.device("cpu")


def by_size(model: nn.Module, call: Callable[[], Any], _: torch.device) -> float:
    """Seconds as if each stored number took a microsecond; the call is made, so that what does not run fails."""
    call()
    return 1e-6 * count_parameters(model)


COUNTED = TimingSettings(timer=by_size)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.wide, self.again, self.out = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).mean((-1, -2))
        return self.out(torch.relu(self.wide(x)) + self.again(torch.relu(x)))


def planned(model: nn.Module, keep: float) -> tuple[Rewriting, list[MeasuredLayer]]:
    subject = open_model(model)
    inspected = inspect_layers(subject, 0.1, Run(CPU))
    measured = measured_layers(subject, inspected)
    uses = layer_uses(subject, [m.layer for m in measured], {"x": torch.zeros(1, 3, 6, 6)}, device=CPU)
    latency = LayerLatency(charging(), torch.float32, (Workload("batch 1", 1),), ())
    measured = [replace(m, latency=replace(latency, uses=(uses[m.layer.name],))) for m in measured]
    layers = choose_ranks(measured, Budget("keep", keep), "auto", file_bytes=lambda _: 0)
    plan = Plan("it", None, Budget("keep", keep), with_latency(measured, layers))
    return Rewriting(subject.checkpoint, subject.recipe, subject.layers, plan), measured


def test_a_model_with_random_factors_has_the_shapes_of_the_plan_and_runs() -> None:
    model = Network()
    rewriting, _ = planned(model, 0.5)
    unfilled = unfilled_module(rewriting, model, CPU)
    for plan in rewriting.plan.layers:
        kept = type(unfilled.get_submodule(plan.name))
        assert (kept in (nn.Linear, nn.Conv2d)) == (plan.form == DENSE)
        assert plan.form == DENSE or kept in FORMS[plan.form].classes
    assert unfilled(torch.randn(2, 3, 6, 6)).isfinite().all()
    assert {type(module) for module in model.children()} == {nn.Conv2d, nn.Linear}


def test_random_factors_keep_the_size_of_activations_through_many_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(40)))
    subject = open_model(model)
    measured = measured_layers(subject, inspect_layers(subject, 0.1, Run(CPU)))
    plan = Plan(
        "it", None, Budget("keep", 0.5), choose_ranks(measured, Budget("keep", 0.5), "auto", file_bytes=lambda _: 0)
    )
    unfilled = unfilled_module(Rewriting(subject.checkpoint, subject.recipe, subject.layers, plan), model, CPU)
    assert all(type(each) is not nn.Linear for each in unfilled)
    assert 1e-4 < unfilled(torch.randn(8, 32)).std() < 1e4


def test_pairs_are_timed_beside_their_dense_layers_once_for_each_shape() -> None:
    model = Network()
    rewriting, measured = planned(model, 0.5)
    timer = PairTimer(model, CPU, COUNTED)
    plans = {plan.name: plan for plan in timer.timed(rewriting, measured)}
    pairs = [plan for plan in plans.values() if plan.rank is not None]
    assert pairs
    for plan in pairs:
        assert plan.latency is not None
        [latency] = plan.latency
        assert latency.measured is not None
        dense = model.get_submodule(plan.name)
        assert latency.measured.dense == 1e-6 * count_parameters(dense)
        assert latency.measured.chosen < latency.measured.dense
    assert len(timer.found) == len({(plan.shape, plan.rank, plan.form) for plan in pairs})
    before = timer.spent
    assert timer.timed(rewriting, measured) == tuple(plans.values())
    assert timer.spent == before


def test_layers_that_are_not_in_memory_are_timed_with_random_weights() -> None:
    model = Network()
    rewriting, measured = planned(model, 0.5)
    expected = PairTimer(model, CPU, COUNTED).timed(rewriting, measured)
    assert PairTimer(Network().to("meta"), CPU, COUNTED).timed(rewriting, measured) == expected


def test_what_an_interrupted_run_has_timed_is_not_timed_again(tmp_path: Path) -> None:
    model = Network()
    rewriting, measured = planned(model, 0.5)

    def never(*_: object) -> float:
        raise AssertionError

    timers = []
    for timing in (COUNTED, replace(COUNTED, timer=never)):
        journal = Journal.open(tmp_path / "work", Fingerprint(), option="work_dir")
        timer = PairTimer(model, CPU, timing, journal=journal)
        timers.append((timer.timed(rewriting, measured), timer.found, timer.spent))
        journal.close()
    assert timers[0] == timers[1]
    assert timers[0][1]


def test_no_further_layer_is_timed_when_the_time_is_over_and_the_longest_came_first() -> None:
    model = Network()
    rewriting, measured = planned(model, 0.5)
    timed = PairTimer(model, CPU, replace(COUNTED, layer_seconds=1e-3)).timed(rewriting, measured)
    known = [plan for plan in timed if plan.latency and plan.latency[0].measured is not None]
    assert len(known) == 1
    demand = {plan.name: plan.latency[0].predicted.dense for plan in timed if plan.latency and plan.rank is not None}
    assert demand[known[0].name] == max(demand.values())


def test_a_layer_that_is_called_twice_takes_twice_as_long() -> None:
    model = Network()
    rewriting, measured = planned(model, 0.5)
    twice = [
        replace(m, latency=replace(m.latency, uses=(LayerUse(calls=2, rows=1),))) if m.layer.name == "wide" else m
        for m in measured
        if m.latency is not None
    ]
    plans = {plan.name: plan for plan in PairTimer(model, CPU, COUNTED).timed(rewriting, twice)}
    assert plans["wide"].latency is not None
    measured_times = plans["wide"].latency[0].measured
    assert measured_times is not None
    assert measured_times.dense == 2e-6 * count_parameters(model.wide)


def test_a_layer_that_would_take_longer_than_there_is_time_is_not_timed() -> None:
    model = Network()
    rewriting, measured = planned(model, 0.5)
    timed = PairTimer(model, CPU, replace(COUNTED, layer_seconds=1e-6)).timed(rewriting, measured)
    assert all(each.measured is None for plan in timed for each in plan.latency or ())
