"""Pages of results: what is predicted of a layer's time is told apart from what was measured, in 80 columns."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from compressor import TrainingRecipe, inspect
from compressor.evaluation import Latency, TimedWorkload
from compressor.planning import LayerPlan, Times, WorkloadLatency
from compressor.report.html import report_page
from compressor.report.model_card import model_card
from compressor.report.pages import compression_page, inspection_page, plan_page
from compressor.results import Compression
from tests.report.results import compression_of, plan_of

WORKLOADS = ("decode, batch 1", "prefill, batch 32")
seconds = st.floats(1e-6, 1e-2)
times = st.builds(Times, seconds, seconds)
latencies = st.tuples(*(st.builds(WorkloadLatency, st.just(name), times, st.none() | times) for name in WORKLOADS))


def layer(name: str, latency: tuple[WorkloadLatency, ...] | None, rank: int | None = 100) -> LayerPlan:
    form = "dense" if rank is None else "pivoted"
    return LayerPlan(name, (4096, 1024), "linear", rank, form, 10**6, 0.0625, "its share", latency)


def planned(*found: tuple[WorkloadLatency, ...] | None, device: str | None = "h100", **changes: Any) -> Compression:
    layers = tuple(layer(f"model.layers.{i}.self_attention.output_projection", each) for i, each in enumerate(found))
    return compression_of(plan_of(*layers, device=device), **changes)


def timed(workload: str, ratio: float) -> TimedWorkload:
    return TimedWorkload(workload, Latency(1, 2e-3, 2e-3 * ratio, ratio, 7))


@given(st.lists(latencies, min_size=1, max_size=4))
def test_what_was_not_measured_is_said_to_be_predicted(found: list[tuple[WorkloadLatency, ...]]) -> None:
    result = planned(*found)
    text = plan_page(result.plan).text()
    for number, each in enumerate(found):
        measured = [workload.measured.ratio for workload in each if workload.measured is not None]
        shown = f"{max(workload.predicted.ratio for workload in each):.2f}x"
        shown += f" ({max(measured):.2f}x)" if measured else ""
        assert re.search(rf"layers\.{number}\..* {re.escape(shown)}$", text, re.MULTILINE)
    # Of the whole model nothing was measured, whatever was of its layers.
    assert str(result.verdict).endswith("(predicted for its layers on h100)")
    assert all(change.predicted_on == "h100" for change in result.verdict.latency)


@given(st.lists(latencies, min_size=1, max_size=4))
def test_the_predicted_ratio_is_that_of_all_layers_together(found: list[tuple[WorkloadLatency, ...]]) -> None:
    changes = planned(*found).verdict.latency
    for number, (name, change) in enumerate(zip(WORKLOADS, changes, strict=True)):
        chosen = sum(each[number].predicted.chosen for each in found)
        dense = sum(each[number].predicted.dense for each in found)
        assert (change.workload, change.ratio) == (name, pytest.approx(chosen / dense))


@given(latencies, st.floats(0.1, 9))
def test_what_was_measured_of_the_whole_model_replaces_what_is_predicted(
    found: tuple[WorkloadLatency, ...], ratio: float
) -> None:
    result = planned(found, latency=(timed(WORKLOADS[0], ratio),), timed_on="cpu (1 thread)")
    assert str(result.verdict) == f"50 % smaller, {ratio:.2f}x latency"
    text = compression_page(result).text()
    assert f"{ratio:.2f} x the time" in text
    assert "predicted for its layers" not in text
    assert "timed on cpu (1 thread)" in text
    card = model_card(result, name="small", base_model="dense", config=None, original="")
    assert f"**50 % smaller, {ratio:.2f}x latency.**" in card
    assert "Latency was measured on cpu (1 thread)" in card
    assert f"| latency, {WORKLOADS[0]} |" in card


def test_nothing_is_said_of_time_where_speed_was_not_asked_for() -> None:
    result = planned(None, None, device=None)
    for text in (compression_page(result).text(), report_page(result).partition("</style>")[2]):
        assert "latency" not in text
        assert "predicted" not in text
        assert re.search(r"\btime\b", text) is None


def test_the_report_has_both_times_and_what_is_slower_is_red() -> None:
    slow = (WorkloadLatency("batch 1", Times(1.0, 0.7), Times(1.0, 1.4)), WorkloadLatency("batch 32", Times(1.0, 0.9)))
    page = report_page(planned(slow))
    assert '<td class="n">0.90</td><td class="n worse">1.40</td>' in page


def test_no_measured_time_is_spoken_of_where_none_was_measured() -> None:
    predicted = (WorkloadLatency("batch 1", Times(1.0, 0.7)),)
    measured = (WorkloadLatency("batch 1", Times(1.0, 0.7), Times(1.0, 0.8)),)
    for found, spoken in ((planned(predicted), False), (planned(predicted, measured), True)):
        page = report_page(found)
        assert "predicted for h100" in page
        assert ("time measured" in page, "measured for the layer by itself" in page) == (spoken, spoken)
        assert ("in parentheses measured" in " ".join(plan_page(found.plan).text().split())) == spoken


def test_a_table_with_times_fits_a_terminal_of_80_columns() -> None:
    found = (WorkloadLatency("batch 1", Times(1.0, 0.7)),)
    plan = planned(*(found for _ in range(12))).plan
    reasons = tuple(replace(each, reason=f"reason {number}") for number, each in enumerate(plan.layers))
    buffer = io.StringIO()
    Console(file=buffer, force_terminal=True, color_system=None, width=80).print(
        plan_page(replace(plan, layers=reasons))
    )
    lines = buffer.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("0.70x" in line for line in lines) == 12


def test_without_a_recipe_the_memory_of_the_training_is_a_line_that_says_what_is_missing() -> None:
    network = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    recipe = TrainingRecipe(
        optimizer="sgd", learning_rate=0.1, weight_decay=0.01, momentum=0.0, batch_size=1, schedule="constant"
    )
    known, unknown = (inspection_page(inspect(network, recipe=each)).text() for each in (recipe, None))
    assert "eps" in known.partition("Memory of the training")[2]
    _, _, said = unknown.partition("Memory of the training")
    assert said.split("\n\n")[1].startswith("unknown  no window")
    assert "eps" not in said
