"""Estimates the remaining time of a command from its announced steps and the time spent so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from compressor.progress import Step

# An estimate needs two seconds and a twentieth of the whole behind it: a shorter measurement is none.
SHORTEST_SECONDS, SMALLEST_SHARE = 2.0, 0.05

# The share of a step after which its own pace counts as much as the pace of all steps so far.
OWN_PACE_FROM = 0.2

# Where steps that have not come yet might be over three times as slow as they might be fast, no time is told. How fast
# is told by the steps that took a tenth of the time.
WIDEST, COUNTS_FROM = 3.0, 0.1


@dataclass(frozen=True)
class Estimate:
    """How much of a command is behind, as a share of its time, and the seconds left.

    With `at_most` steps are among these that may be left out.
    """

    share: float
    seconds: float
    at_most: bool


@dataclass
class _Work:
    """The work done so far: its announced cost, and the seconds that it took."""

    cost: float = 0.0
    seconds: float = 0.0


class Pace:
    """Turns progress and a clock into an estimate of the whole.

    A kind of step that took longer than announced is expected to take as much longer again. One that has not come yet
    is expected at the pace of the others.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.expect(())

    def expect(self, steps: Sequence[Step]) -> None:
        """Set the steps of the command, before any of them begins."""
        self._steps = tuple(steps)
        self._at, self._done, self._share_done = 0, 0, 0.0
        self._of_kind: dict[str, _Work] = {}
        self._began = self._noted = self._clock()
        self._shown = 0.0

    def note(self, name: str, done: int, total: int) -> int | None:
        """Take how far a step is, and return its place among those announced; before it all are over, or left out."""
        at = self._place(name, done)
        if at is None:
            return None
        now, step = self._clock(), self._steps[at]
        share = step.share(done, total)
        cost = step.cost * (share - (self._share_done if at == self._at else 0.0))
        work = self._of_kind.setdefault(name, _Work())
        work.cost += cost
        work.seconds += now - self._noted
        self._at, self._done, self._share_done, self._noted = at, done, share, now
        return at

    def _place(self, name: str, done: int) -> int | None:
        """The step that this is about: the present one where it goes on, else the next of its name."""
        for at, step in enumerate(self._steps[self._at :], start=self._at):
            later = at > self._at or done >= self._done
            if step.name == name and later and (step.number is None or done <= step.number):
                return at
        return None

    def estimate(self) -> Estimate | None:
        """None while too little was measured, or what was measured does not agree about what is to come."""
        now = self._clock()
        taken = now - self._began
        if not any(work.cost > 0 and work.seconds > 0 for work in self._of_kind.values()):
            return None
        ahead = [(self._steps[self._at], 1.0 - self._share_done)] if self._steps else []
        ahead += [(step, 1.0) for step in self._steps[self._at + 1 :]]
        seconds = sum(step.cost * share * self._seconds_for_one(step) for step, share in ahead)
        unknown = sum(step.cost * share for step, share in ahead if step.name not in self._of_kind)
        known = seconds - unknown * self._pace_of_all()
        slowest, fastest = self._extreme_paces()
        if known + unknown * slowest > WIDEST * (known + unknown * fastest):
            return None
        # What is going on now has taken some of it since it was last heard of.
        seconds = max(0.0, seconds - (now - self._noted))
        share = taken / (taken + seconds) if taken + seconds > 0 else 1.0
        if taken < SHORTEST_SECONDS or share < SMALLEST_SHARE:
            return None
        self._shown = max(self._shown, share)
        return Estimate(self._shown, seconds, not all(step.certain for step, share in ahead if share > 0))

    def _extreme_paces(self) -> tuple[float, float]:
        """The slowest and the fastest pace among the kinds of steps that took long."""
        works = [work for work in self._of_kind.values() if work.cost > 0 and work.seconds > 0]
        least = COUNTS_FROM * sum(work.seconds for work in works)
        paces = [work.seconds / work.cost for work in works if work.seconds >= least]
        return max(paces), min(paces)

    def _pace_of_all(self) -> float:
        """The geometric mean over kinds of steps, by announced cost: one that took much longer has no say in others."""
        known = [work for work in self._of_kind.values() if work.cost > 0 and work.seconds > 0]
        logarithms = sum(work.cost * math.log(work.seconds / work.cost) for work in known)
        return math.exp(logarithms / sum(work.cost for work in known))

    def _seconds_for_one(self, step: Step) -> float:
        """The seconds per unit of cost in such a step."""
        own, weight = self._of_kind.get(step.name, _Work()), OWN_PACE_FROM * step.cost
        of_all = self._pace_of_all()
        known = own.cost + weight
        return (own.seconds + weight * of_all) / known if known > 0 else of_all
