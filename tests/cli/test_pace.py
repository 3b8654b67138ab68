"""The estimate of a whole command, on a pretended clock: on runs as they were recorded, and on made-up ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.cli.pace import Estimate, Pace
from compressor.progress import Step

# What two runs announced, and their progress with its seconds, in processor time; single layers are left out.
RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "recorded_runs.json").read_text())
QUARTERS = (0.25, 0.5, 0.75)

Event = tuple[str, int, int, float]


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def estimates(steps: Sequence[Step], events: Sequence[Event]) -> Iterator[tuple[float, Estimate | None]]:
    clock = Clock()
    pace = Pace(clock)
    pace.expect(steps)
    for name, done, total, at in events:
        clock.now = at
        pace.note(name, done, total)
        yield at, pace.estimate()


def at_quarters(steps: Sequence[Step], events: Sequence[Event], whole: float) -> list[tuple[float, Estimate | None]]:
    """The true seconds left and the estimate, at the first event after each quarter."""
    seen = list(estimates(steps, events))
    first = [next((at, found) for at, found in seen if at >= quarter * whole) for quarter in QUARTERS]
    return [(whole - at, found) for at, found in first]


def near(found: Estimate | None, left: float, factor: float = 1.5) -> bool:
    return found is not None and left / factor <= found.seconds <= left * factor


@pytest.fixture(params=RECORDED)
def run(request: pytest.FixtureRequest) -> tuple[list[Step], list[Event], float]:
    recorded = RECORDED[request.param]
    steps = [Step(name, tuple(costs), certain, number) for name, costs, certain, number in recorded["steps"]]
    return steps, [tuple(event) for event in recorded["events"]], recorded["seconds"]


def test_the_time_left_of_a_recorded_run_is_near_the_truth(run: tuple[list[Step], list[Event], float]) -> None:
    steps, events, whole = run
    found = at_quarters(steps, events, whole)
    assert all(near(estimate, left) for left, estimate in found), found


def test_the_share_of_a_recorded_run_grows_to_the_whole(run: tuple[list[Step], list[Event], float]) -> None:
    steps, events, _ = run
    shown = [estimate for _, estimate in estimates(steps, events) if estimate is not None]
    shares = [estimate.share for estimate in shown]
    assert shares == sorted(shares)
    assert (shares[-1], shown[-1].seconds, shown[-1].at_most) == (1.0, 0.0, False)
    assert shown[0].at_most


def test_no_time_is_told_while_what_was_measured_disagrees_about_what_is_to_come() -> None:
    """One kind of step took eight times what the other took for its cost, and most of the work is of a third."""
    steps = [Step("measure", (10.0,)), Step("calibrate", (10.0,)), Step("refine", (40.0,) * 5)]
    events: list[Event] = [("measure", 1, 1, 20.0), ("calibrate", 1, 1, 180.0), ("refine", 3, 5, 300.0)]
    found = [estimate for _, estimate in estimates(steps, events)]
    assert found[1] is None
    assert found[2] is not None
    assert 80 <= found[2].seconds <= 160


kinds = st.dictionaries(st.sampled_from("abcdef"), st.floats(0.8, 1.25), min_size=2)


@pytest.mark.slow
@given(kinds, st.data())
def test_costs_that_are_nearly_right_give_a_time_that_is(paces: dict[str, float], data: st.DataObject) -> None:
    """Steps of some kinds, each as much slower or faster than announced each time, on a machine of any speed."""
    speed = data.draw(st.floats(0.01, 100))
    names = data.draw(st.lists(st.sampled_from(sorted(paces)), min_size=1, max_size=8))
    steps = [Step(name, tuple(data.draw(st.lists(st.floats(0.5, 1), min_size=40, max_size=40)))) for name in names]
    scale = 100 / sum(step.cost for step in steps)  # a hundred seconds or so
    events, now = list[Event](), 0.0
    for step in steps:
        for done, cost in enumerate(step.costs, start=1):
            now += cost * scale * paces[step.name]
            events.append((step.name, done, len(step.costs), now))
    told = [Step(step.name, tuple(cost * speed for cost in step.costs)) for step in steps]
    found = at_quarters(told, events, now)
    assert all(near(estimate, left, 1.6) for left, estimate in found), found


def test_within_a_step_the_cost_counts_and_not_the_number() -> None:
    steps = [Step("measure", (1.0, 1.0, 8.0))]
    (_, first), (_, second) = estimates(steps, [("measure", 1, 3, 5.0), ("measure", 2, 3, 10.0)])
    assert first is not None
    assert second is not None
    assert first.seconds == pytest.approx(45)
    assert (second.share, second.seconds) == (pytest.approx(0.2), pytest.approx(40))


def test_steps_that_are_left_out_make_the_time_fall() -> None:
    """Of five trials two are made; until the search is over the time is told as the most."""
    trials = [Step("search", (10.0,), certain=number == 1, number=number) for number in range(1, 6)]
    fits = [Step("fit", (2.0,) * 5, certain=number == 1) for number in range(1, 6)]
    steps = [step for trial in zip(fits, trials, strict=True) for step in trial]
    events: list[Event] = [("fit", 5, 5, 10.0), ("search", 1, 5, 20.0), ("fit", 5, 5, 30.0), ("search", 2, 5, 40.0)]
    found = list(estimates([*steps, Step("evaluate", (5.0, 5.0))], [*events, ("evaluate", 1, 2, 45.0)]))
    told = [(each.seconds, each.at_most) for _, each in found if each is not None]
    assert [at_most for _, at_most in told] == [True] * 4 + [False]
    assert [seconds for seconds, _ in told] == [pytest.approx(seconds) for seconds in (100, 90, 80, 70, 5)]


def test_trials_without_other_steps_between_them_are_counted() -> None:
    trials = [Step("search", (10.0,), certain=number == 1, number=number) for number in range(1, 6)]
    found = list(estimates(trials, [("search", 1, 5, 10.0), ("search", 2, 5, 20.0), ("search", 5, 5, 20.0)]))
    assert [each.seconds for _, each in found if each is not None] == [pytest.approx(each) for each in (40, 30, 0)]


def test_a_step_that_comes_again_is_the_next_of_its_name() -> None:
    steps = [Step("fit", (1.0, 1.0)), Step("measure", (1.0,)), Step("fit", (1.0, 1.0))]
    found = list(
        estimates(steps, [("fit", 2, 2, 4.0), ("measure", 1, 1, 6.0), ("fit", 1, 2, 8.0), ("fit", 2, 2, 10.0)])
    )
    assert [each.seconds for _, each in found if each is not None] == [pytest.approx(each) for each in (6, 4, 2, 0)]


def test_time_that_passes_within_a_part_is_counted_and_never_makes_less_than_nothing_left() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.expect([Step("measure", (1.0,) * 10)])
    clock.now = 10.0
    pace.note("measure", 5, 10)
    left = []
    for clock.now in (10.0, 14.0, 100.0):
        estimate = pace.estimate()
        assert estimate is not None
        left.append(estimate.seconds)
    assert left == [pytest.approx(10), pytest.approx(6), 0]


def test_nothing_is_estimated_before_two_seconds_and_a_twentieth_of_the_whole() -> None:
    steps = [Step("measure", (1.0,) * 100)]
    quick = list(estimates(steps, [("measure", 50, 100, 1.0), ("measure", 80, 100, 2.5)]))
    assert [each is None for _, each in quick] == [True, False]
    slow = list(estimates(steps, [("measure", 2, 100, 60.0), ("measure", 6, 100, 180.0)]))
    assert [each is None for _, each in slow] == [True, False]
    assert list(estimates([], [("measure", 1, 2, 10.0)])) == [(10.0, None)]
