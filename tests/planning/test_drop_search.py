"""The search for the smallest size whose drop and its standard error are allowed, on curves that are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.planning import (
    PLANNING,
    DropSearch,
    PlanningSettings,
    Sizes,
    Trial,
    search_by_drop,
    smallest_found,
    within_limit,
)

ELIGIBLE = 100_000
LEAST = 0.02


def search(
    drop: Callable[[float], float], limit: float, first: float, *, share: float = 0.0, at_once: int = 1
) -> tuple[tuple[Trial, ...], int]:
    """What was tried on a curve of the bound over the fraction stored, and in how many rounds.

    `share` of the bound is standard error.
    """
    rounds = 0

    def tried(keep: float) -> Trial:
        stored = int(keep * ELIGIBLE)
        bound = drop(stored / ELIGIBLE)
        return Trial(keep, stored, (1 - share) * bound, share * bound)

    def measure(keeps: Sequence[float]) -> list[Trial]:
        nonlocal rounds
        rounds += 1
        assert 1 <= len(keeps) <= at_once
        assert all(LEAST <= keep <= 1 for keep in keeps)
        return [tried(keep) for keep in keeps]

    return search_by_drop(measure, limit, Sizes(ELIGIBLE, LEAST, first, at_once)), rounds


falling = st.floats(0.5, 40).flatmap(lambda rate: st.floats(0.01, 50).map(lambda scale: (scale, rate)))


@given(
    curve=falling, limit=st.floats(0, 1), first=st.floats(LEAST, 0.95), share=st.floats(0, 1), at_once=st.integers(1, 9)
)
def test_what_is_found_holds_and_every_smaller_size_that_was_tried_does_not(
    curve: tuple[float, float], limit: float, first: float, *, share: float, at_once: int
) -> None:
    scale, rate = curve

    def drop(kept: float) -> float:
        return scale * (math.exp(-rate * kept) - math.exp(-rate))

    trials, rounds = search(drop, limit, first, share=share, at_once=at_once)
    assert rounds <= PLANNING.rounds(at_once)
    assert len(trials) <= rounds * at_once
    assert len({trial.parameters for trial in trials}) == len(trials)
    assert all(trial.parameters >= int(LEAST * ELIGIBLE) for trial in trials)
    found = smallest_found(trials, limit)
    smaller = [t for t in trials if found is None or t.parameters < found.parameters]
    assert not any(within_limit(trial.bound, limit) for trial in smaller)
    if found is not None:
        assert within_limit(found.bound, limit)
        assert found.bound == found.drop + found.standard_error


@pytest.mark.slow
@given(curve=falling, limit=st.floats(0.001, 0.5), first=st.floats(LEAST, 0.95), at_once=st.integers(1, 9))
def test_it_comes_within_a_tenth_of_the_eligible_parameters_of_the_smallest_size_there_is(
    curve: tuple[float, float], limit: float, first: float, *, at_once: int
) -> None:
    scale, rate = curve

    def drop(kept: float) -> float:
        return scale * (math.exp(-rate * kept) - math.exp(-rate))

    smallest = next(
        (k for k in range(int(LEAST * ELIGIBLE), ELIGIBLE) if within_limit(drop(k / ELIGIBLE), limit)), ELIGIBLE
    )
    found = smallest_found(search(drop, limit, first, at_once=at_once)[0], limit)
    assert (ELIGIBLE if found is None else found.parameters) - smallest <= ELIGIBLE / 10


@given(
    sizes=st.integers(2, 60),
    examples=st.integers(0, 200),
    limit=st.floats(0, 0.3),
    first=st.floats(LEAST, 0.95),
    random=st.randoms(),
)
def test_a_ragged_curve_of_few_sizes_is_searched_as_honestly(
    sizes: int, examples: int, limit: float, *, first: float, random: object
) -> None:
    drops = [random.randint(-2, examples) / (examples + 1) for _ in range(sizes + 1)]  # type: ignore[attr-defined]

    def measure(keeps: Sequence[float]) -> list[Trial]:
        steps = [math.floor(keep * sizes) for keep in keeps]
        return [Trial(keep, step * 10, drops[step], 0.0) for keep, step in zip(keeps, steps, strict=True)]

    trials = search_by_drop(measure, limit, Sizes(sizes * 10, 1 / sizes, max(first, 1 / sizes)))
    assert len({trial.parameters for trial in trials}) == len(trials) <= PLANNING.most_trials
    found = smallest_found(trials, limit)
    assert found is None or within_limit(found.bound, limit)
    assert not any(within_limit(t.bound, limit) for t in trials if found is None or t.parameters < found.parameters)


def test_on_a_straight_logarithm_three_trials_bracket_the_root_closely() -> None:
    """The curve the interpolation is exact for: two trials fix the line, the third is on its root."""
    limit, rate = 0.1, 15.0
    root = 1 - math.log(10) / rate  # exp(rate * (1 - kept)) = 10 limit / limit
    trials, _ = search(lambda kept: limit / 10 * math.exp(rate * (1 - kept)), limit, 0.5)
    assert abs(trials[2].parameters / ELIGIBLE - root) < 0.005


@pytest.mark.parametrize(("at_once", "rounds"), [(1, 7), (2, 5), (3, 4), (7, 3), (127, 1)])
def test_several_at_a_time_narrow_the_range_as_far_in_fewer_rounds(at_once: int, rounds: int) -> None:
    """Each round divides the range by one more than are tried, and bisection halves it."""
    assert PlanningSettings().rounds(at_once) == rounds
    assert (1 + at_once) ** rounds >= 2**7
    trials, needed = search(lambda kept: 1 - kept, 0.5003, 0.5, at_once=at_once)
    found = smallest_found(trials, 0.5003)
    assert found is not None
    assert needed <= rounds
    assert found.parameters / ELIGIBLE - 0.4997 <= PLANNING.drop_resolution


@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_where_everything_holds_the_smallest_size_is_found(at_once: int) -> None:
    trials, _ = search(lambda _: 0.0, 0.01, 0.5, at_once=at_once)
    found = smallest_found(trials, 0.01)
    assert found is not None
    assert found.parameters == int(LEAST * ELIGIBLE)


def test_where_nothing_holds_sizes_near_dense_were_tried() -> None:
    trials, _ = search(lambda _: 0.5, 0.01, 0.5)
    assert smallest_found(trials, 0.01) is None
    assert max(trial.keep for trial in trials) > 0.95


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(0, n))))
def test_accuracies_that_differ_by_exactly_the_limit_hold(counts: tuple[int, int, int]) -> None:
    count, before, after = counts
    lost = before - after
    assert within_limit(before / count - after / count, lost / count)
    assert not within_limit(before / count - after / count, (lost - 1) / count)


@pytest.mark.parametrize("drop", [0.25, math.inf])
def test_a_search_as_a_document(drop: float) -> None:
    trials = (Trial(0.5, 50, drop, drop), Trial(0.75, 75, 0.125, 0.0625), Trial(0.8, 80, 0.125, 0.03125, refined=True))
    search = DropSearch("perplexity", "text.txt", 7, 0.16, trials)
    document = search.to_dict()
    infinite = drop if drop < math.inf else "infinity"
    assert (document["evaluations"], document["limit"]) == (4, 0.16)
    sizes = [
        {"keep": 0.5, "parameters": 50, "drop": infinite, "standard_error": infinite},
        {"keep": 0.75, "parameters": 75, "drop": 0.125, "standard_error": 0.0625},
        {"keep": 0.8, "parameters": 80, "drop": 0.125, "standard_error": 0.03125},
    ]
    verdicts = [(False, False), (False, False), (True, True)]
    assert document["tried"] == [
        size | {"refined": refined, "allowed": allowed}
        for size, (refined, allowed) in zip(sizes, verdicts, strict=True)
    ]
