"""The smallest size whose measured drop in quality is allowed, found with few measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

# With the dense model's, a search takes eight evaluations at most.
MOST_TRIALS = 7

# The search ends when the largest size that failed is this close to the smallest that holds, relative to the latter.
RESOLUTION = 0.02

# No trial is closer to an end of the bracket than this share of its width, so that every trial narrows it.
MARGIN = 1 / 8


@dataclass(frozen=True)
class Trial:
    """One size that was measured: the `keep` that was asked for, what it stored of the eligible layers, and the drop.

    `parameters` counts stored numbers. `drop` is accuracy lost, as a fraction, or increase in perplexity.
    """

    keep: float
    parameters: int
    drop: float


@dataclass(frozen=True)
class DropSearch:
    """How a size was found by its drop in quality: every trial in the order in which they were made.

    `data` and `predictions` say what the drops were measured on; `evaluations` counts the dense model's as well.
    """

    metric: Literal["accuracy", "perplexity"]
    data: str
    predictions: int
    trials: tuple[Trial, ...]

    @property
    def evaluations(self) -> int:
        return 1 + len(self.trials)

    def to_dict(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "data": self.data,
            "predictions": self.predictions,
            "evaluations": self.evaluations,
            "tried": [
                asdict(trial) | {"drop": trial.drop if math.isfinite(trial.drop) else "infinity"}
                for trial in self.trials
            ],
        }


def holds(drop: float, limit: float) -> bool:
    """Whether a drop is at most the limit; the last digits of a difference of two fractions are rounding."""
    return drop <= limit or math.isclose(drop, limit, rel_tol=1e-9)


def smallest_found(trials: Sequence[Trial], limit: float) -> Trial | None:
    """The smallest size tried whose drop is at most `limit`, None when there is none."""
    return min((t for t in trials if holds(t.drop, limit)), key=lambda t: t.parameters, default=None)


def search_by_drop(
    measure: Callable[[float], tuple[int, float]], limit: float, *, eligible: int, least: float, first: float
) -> tuple[Trial, ...]:
    """Sizes tried on the way to the smallest one whose drop is at most `limit`, in at most `MOST_TRIALS` trials.

    `measure` gives, for a fraction of the `eligible` parameters to keep, the number stored and the drop. `least` is the
    smallest fraction that can be asked for and `first` the one to begin with; dense, a fraction of one, drops nothing.
    Between the largest size that fails and the smallest that holds the next trial is where a line through the logarithm
    of the two drops nearest to the limit meets it, or in the middle where there are not two. A size that stores as much
    as one before counts as that one, so two trials never do.
    """
    trials: dict[int, Trial] = {}
    keep: float | None = first
    for _ in range(MOST_TRIALS):
        if keep is None:
            break
        parameters, drop = measure(keep)
        known = trials.get(parameters)
        trials[parameters] = Trial(keep, parameters, drop) if known is None else _asked_for_more(known, keep)
        keep = _next_keep(trials, limit, eligible, least)
    return tuple(trials.values())


def _asked_for_more(trial: Trial, keep: float) -> Trial:
    return Trial(max(trial.keep, keep), trial.parameters, trial.drop)


def _next_keep(trials: Mapping[int, Trial], limit: float, eligible: int, least: float) -> float | None:
    """The next fraction to try, None when the bracket is narrow enough."""
    found = smallest_found(tuple(trials.values()), limit)
    # Asking for less than a trial stored leads to another model; asking for less than it was asked for may not.
    upper = 1.0 if found is None else found.parameters / eligible
    lower = max((t.keep for t in trials.values() if not holds(t.drop, limit) and t.keep < upper), default=None)
    if lower is None:
        return max(least, upper / 2) if upper > least else None
    width = upper - lower
    if width <= RESOLUTION * upper:
        return None
    wanted = _where_the_drop_is(limit, trials)
    if wanted is None:
        return (lower + upper) / 2
    return min(max(wanted, lower + MARGIN * width), upper - MARGIN * width)


def _where_the_drop_is(limit: float, trials: Mapping[int, Trial]) -> float | None:
    """The fraction at which the drop would be `limit` if its logarithm were linear between the two trials nearest it.

    None without two trials that have a logarithm and lose less where they keep more.
    """
    if limit <= 0:
        return None
    known = [(math.log(t.drop) - math.log(limit), t.keep) for t in trials.values() if 0 < t.drop < math.inf]
    if len(known) < 2:
        return None
    (above, keep), (other, further) = sorted(known, key=lambda point: abs(point[0]))[:2]
    if (above - other) * (keep - further) >= 0:
        return None
    return keep - above * (keep - further) / (above - other)
