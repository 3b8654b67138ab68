"""The smallest size whose measured drop in quality is allowed, found with few measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from compressor.planning.settings import PLANNING, PlanningSettings


@dataclass(frozen=True)
class Trial:
    """One size that was measured: the `keep` that was asked for, what it stored of the eligible layers, and the drop.

    `parameters` counts stored numbers. `drop` is accuracy lost, as a fraction, or increase in perplexity, and
    `standard_error` that of the difference between the two models on the same examples. A size may be measured twice:
    once more with `refined` factors.
    """

    keep: float
    parameters: int
    drop: float
    standard_error: float
    refined: bool = False

    @property
    def bound(self) -> float:
        """What decides: one standard error above the drop, so that a lucky draw of few examples is not taken for it."""
        return self.drop + self.standard_error


@dataclass(frozen=True)
class DropSearch:
    """How a size was found by its drop in quality: all trials in order.

    `data` and `predictions` say what the drops were measured on; `evaluations` counts the dense model's as well. A size
    is allowed where its drop and one standard error together are at most `limit`. `higher_is_better` is known of the
    caller's own metric alone, whose `predictions` are examples.
    """

    metric: str
    data: str
    predictions: int
    limit: float
    trials: tuple[Trial, ...]
    higher_is_better: bool | None = None

    @property
    def evaluations(self) -> int:
        return 1 + len(self.trials)

    def to_dict(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            **({} if self.higher_is_better is None else {"higher_is_better": self.higher_is_better}),
            "data": self.data,
            "predictions": self.predictions,
            "limit": self.limit,
            "evaluations": self.evaluations,
            "tried": [
                {name: value if math.isfinite(value) else "infinity" for name, value in asdict(trial).items()}
                | {"allowed": within_limit(trial.bound, self.limit)}
                for trial in self.trials
            ],
        }


def within_limit(drop: float, limit: float) -> bool:
    """Whether a drop is at most the limit, up to the rounding of a difference of two fractions."""
    return drop <= limit or math.isclose(drop, limit, rel_tol=1e-9)


def smallest_found(trials: Sequence[Trial], limit: float) -> Trial | None:
    """The smallest size tried whose bound on the drop is at most `limit`, None when there is none.

    Of one size with and without refined factors it is what has the lower bound.
    """
    allowed = (trial for trial in trials if within_limit(trial.bound, limit))
    return min(allowed, key=lambda trial: (trial.parameters, trial.bound, not trial.refined), default=None)


@dataclass(frozen=True)
class Sizes:
    """The sizes that a search may try.

    Attributes:
        eligible: The number of parameters, of which a size is a fraction.
        least: The smallest fraction that can be asked for.
        first: The one to begin with, where they are tried one after another.
        at_once: How many are tried at a time.
    """

    eligible: int
    least: float
    first: float
    at_once: int = 1


def search_by_drop(
    measure: Callable[[Sequence[float]], Sequence[Trial]],
    limit: float,
    sizes: Sizes,
    *,
    settings: PlanningSettings = PLANNING,
) -> tuple[Trial, ...]:
    """Search for the smallest size whose bound is at most `limit`, and return all trials.

    `measure` tries some fractions of the parameters to keep. Dense, a fraction of one, drops nothing. Between the
    largest size that fails and the smallest that holds the next trial is where a line through the logarithm of the two
    bounds nearest to the limit meets it, or in the middle where there are not two; several at once divide this range
    evenly. A size that stores as much as one before counts as that one, so two trials never do.
    """
    trials: dict[int, Trial] = {}
    keeps = [sizes.first] if sizes.at_once == 1 else _sections(sizes.least, 1.0, sizes.at_once)
    for _ in range(settings.rounds(sizes.at_once)):
        if not keeps:
            break
        for keep, trial in zip(keeps, measure(keeps), strict=True):
            # Of one size the most that was asked for is kept, for asking for less may lead to it again.
            known = trials.get(trial.parameters, trial)
            trials[trial.parameters] = replace(known, keep=max(known.keep, keep))
        keeps = _next_keeps(trials, limit, sizes, settings=settings)
    return tuple(trials.values())


def _next_keeps(
    trials: Mapping[int, Trial], limit: float, sizes: Sizes, *, settings: PlanningSettings
) -> Sequence[float]:
    """The next fractions to try, none when the bracket is narrow enough."""
    found = smallest_found(tuple(trials.values()), limit)
    # Asking for less than a trial stored leads to another model; asking for less than it was asked for may not.
    upper = 1.0 if found is None else found.parameters / sizes.eligible
    lower = max((t.keep for t in trials.values() if not within_limit(t.bound, limit) and t.keep < upper), default=None)
    if lower is None:
        below = _sections(0.0, upper, sizes.at_once) if upper > sizes.least else []
        return sorted({max(sizes.least, keep) for keep in below})
    width = upper - lower
    if width <= settings.drop_resolution * upper:
        return []
    wanted = _where_the_drop_is(limit, trials) if sizes.at_once == 1 else None
    if wanted is None:
        return _sections(lower, upper, sizes.at_once)
    margin = settings.drop_margin * width
    return [min(max(wanted, lower + margin), upper - margin)]


def _sections(lower: float, upper: float, count: int) -> Sequence[float]:
    """The ends of equal sections of a range, without its own."""
    return [lower + (upper - lower) * number / (count + 1) for number in range(1, count + 1)]


def _where_the_drop_is(limit: float, trials: Mapping[int, Trial]) -> float | None:
    """The fraction at which the bound would be `limit` if its logarithm were linear between the two trials nearest it.

    None without two trials that have a logarithm and lose less where they keep more.
    """
    if limit <= 0:
        return None
    known = [(math.log(t.bound) - math.log(limit), t.keep) for t in trials.values() if 0 < t.bound < math.inf]
    if len(known) < 2:
        return None
    (above, keep), (other, further) = sorted(known, key=lambda point: abs(point[0]))[:2]
    if (above - other) * (keep - further) >= 0:
        return None
    return keep - above * (keep - further) / (above - other)
