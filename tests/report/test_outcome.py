"""What was asked, what came out, and whether that meets it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from compressor.evaluation import Cost, Evaluation
from compressor.planning import Budget, LayerPlan, Times, WorkloadLatency
from compressor.report.outcome import Outcome, outcomes
from compressor.results import BeforeAfter, Compression
from tests.report.results import compression_of, plan_of


def layer(**changes: object) -> LayerPlan:
    plan = LayerPlan("a", (10, 10), "linear", 2, "plain", 40, 0.05, "its share")
    return replace(plan, **changes)  # type: ignore[arg-type]


def asked(budget: Budget, *layers: LayerPlan) -> Compression:
    plan = replace(plan_of(*(layers or (layer(),))), budget=budget)
    return compression_of(plan, bytes=BeforeAfter(400, 200))


def evaluated(drop: float) -> Evaluation:
    return Evaluation(
        metric="accuracy",
        baseline=0.9,
        compressed=0.9 - drop,
        drop=drop,
        baseline_loss=None,
        compressed_loss=None,
        count=100,
        data="test.jsonl",
        task="image-classification",
        device="cpu",
        baseline_cost=None,
        compressed_cost=Cost(100, 200, None, None),
        latency=(),
    )


@pytest.mark.parametrize(
    ("budget", "got", "met"),
    [
        (Budget("keep", 0.4), "40.0 %", True),
        (Budget("keep", 0.39), "40.0 %", False),
        (Budget("max-size", 200), "200 bytes", True),
        (Budget("max-size", 199), "200 bytes", False),
        (Budget("tolerance", 0.05), "0.05 at most", True),
        (Budget("tolerance", 0.04), "0.05 at most", False),
        (Budget("bits", 4), "0 of 1 layers", False),
        (Budget("rank", 2), "rank 2 at most", True),
        (Budget("window-rule"), "1 of 1 eligible layers factorized", None),
    ],
)
def test_every_kind_of_limit_has_its_own_measure(budget: Budget, got: str, met: bool | None) -> None:
    [found] = outcomes(asked(budget))
    assert (found.got, found.met) == (got, met)


def test_each_part_of_a_budget_is_told_by_itself() -> None:
    slow = (WorkloadLatency("batch 1", Times(1.0, 0.7)), WorkloadLatency("batch 32", Times(1.0, 0.9)))
    result = asked(Budget("keep", 0.5, max_latency=0.8, max_drop=0.01), layer(latency=slow))
    result = replace(result, plan=replace(result.plan, device="h100"), evaluation=evaluated(0.02))
    size, time, drop = outcomes(result)
    assert size.met
    assert time == Outcome("at most 0.8x the time of the dense model", "0.90x, predicted", False)
    assert (drop.got, drop.met) == ("2.00 points on test.jsonl", False)


@pytest.mark.parametrize(("time", "met"), [(2.05, True), (2.07, False)])
def test_a_time_has_the_room_of_its_noise_as_where_a_slower_model_is_refused(time: float, met: bool) -> None:
    timed = layer(latency=(WorkloadLatency("batch 1", Times(1.0, time)),))
    result = asked(Budget("keep", 0.5, max_latency=2.0), timed)
    _, found = outcomes(replace(result, plan=replace(result.plan, device="h100")))
    assert found.met is met


def test_what_was_not_measured_is_neither_met_nor_missed() -> None:
    for found in outcomes(asked(Budget("max-latency", 0.5, max_drop=0.1))):
        assert (found.got, found.met) == ("", None)
