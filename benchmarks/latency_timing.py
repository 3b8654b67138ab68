"""Times of calls that are run in turn, so that whatever disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

Call = Callable[[], Any]


class Clock(Protocol):
    """How time is measured: the seconds from one mark to a later one are known once the device has come so far."""

    name: str

    def mark(self) -> Any: ...

    def seconds(self, earlier: Any, later: Any) -> float: ...


class ProcessClock:
    """CPU time of all threads of this process: what other processes do is not in it."""

    name = "CPU time of the process"

    def mark(self) -> float:
        return time.process_time()

    def seconds(self, earlier: float, later: float) -> float:
        return later - earlier


class WallClock:
    """The time that passes: with more than one thread the CPU time is not what a user waits."""

    name = "wall time"

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, earlier: float, later: float) -> float:
        return later - earlier


class CudaClock:
    """Time between events on the GPU's stream, also that in which it waits for the next launch."""

    name = "CUDA events"

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, earlier: torch.cuda.Event, later: torch.cuda.Event) -> float:
        later.synchronize()
        return earlier.elapsed_time(later) / 1e3


@dataclass(frozen=True)
class Repeats:
    """How often calls are timed.

    Attributes:
        warm_ups: Runs of each call that are not counted; one where this takes long.
        fewest: Repeats at least.
        most: Repeats at most.
        enough: Seconds of all calls together after which there are no more repeats.
        least: Seconds for which a call is run at a time, so that the clock's own steps do not matter.
        lead: Runs of a call before it is timed, after another had its turn: its weights are where they stay when a
            network runs again and again.
    """

    warm_ups: int = 3
    fewest: int = 3
    most: int = 15
    enough: float = 2.5
    least: float = 0.004
    lead: int = 0


@dataclass(frozen=True)
class Quartiles:
    """The median of repeated measurements between its quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, median, high)

    def to_dict(self) -> dict[str, float]:
        return {name: float(f"{value:.4g}") for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Timed:
    """Seconds of calls that ran in turn: a row a repeat, a column a call."""

    repeats: list[list[float]]

    def seconds(self, call: int) -> float:
        """The median of one call's seconds."""
        return statistics.median(row[call] for row in self.repeats)

    def ratio(self, call: int) -> Quartiles:
        """One call's seconds, divided by those of the first call in the same repeat."""
        return Quartiles.of([row[call] / row[0] for row in self.repeats])


def timed_in_turn(calls: Sequence[Call], clock: Clock, repeats: Repeats) -> Timed:
    """Time calls one right after the other, again and again, every other time in the opposite order."""
    runs = [max(1, round(repeats.least / max(_warm(call, clock, repeats), 1e-9))) for call in calls]
    rows: list[list[float]] = []
    began = time.perf_counter()
    while len(rows) < repeats.fewest or (len(rows) < repeats.most and time.perf_counter() - began < repeats.enough):
        order = 1 if len(rows) % 2 == 0 else -1
        turn = list(zip(calls, runs, strict=True))[::order]
        rows.append([_seconds(_led(call, repeats), clock, times) for call, times in turn][::order])
    return Timed(rows)


def _warm(call: Call, clock: Clock, repeats: Repeats) -> float:
    """The seconds of the last run of the warm-up."""
    seconds = 0.0
    for _ in range(repeats.warm_ups):
        seconds = _seconds(call, clock, 1)
        if seconds > repeats.enough / 8:
            break
    return seconds


def _led(call: Call, repeats: Repeats) -> Call:
    """The call, after the runs that are not timed."""
    for _ in range(repeats.lead):
        call()
    return call


def _seconds(call: Call, clock: Clock, runs: int) -> float:
    began = clock.mark()
    for _ in range(runs):
        call()
    return clock.seconds(began, clock.mark()) / runs
