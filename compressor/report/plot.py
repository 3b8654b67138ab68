"""Plots as HTML: places in percent, so that labels keep their size on any screen and keys reach the points."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Shape = Literal["circle", "square", "diamond", "up", "down"]

# Paths in a view box of 16 by 16.
SHAPES: dict[Shape, str] = {
    "circle": "M8 3a5 5 0 1 0 .01 0z",
    "square": "M4 4h8v8h-8z",
    "diamond": "M8 2l6 6l-6 6l-6-6z",
    "up": "M8 3l5.5 10h-11z",
    "down": "M8 13l5.5-10h-11z",
}


@dataclass(frozen=True)
class Tick:
    """A labeled place of an axis, in percent of its length."""

    place: float
    label: str


@dataclass(frozen=True)
class Axis:
    """An axis: its title with the unit, its ends, and its ticks; a logarithmic one has no zero."""

    title: str
    low: float
    high: float
    ticks: tuple[Tick, ...]
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value is, in percent of the length; what lies outside is at the end."""
        return _place(value, self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Mark:
    """A point with what is said of it where it is pointed at; one that was not measured is hollow.

    `name` stands beside it; `group` is the class of its color.
    """

    x: float
    y: float
    shape: Shape
    words: str
    measured: bool
    group: Literal["ours", "others"] = "ours"
    name: str = ""


@dataclass(frozen=True)
class Plot:
    """Points, and a line where there is one, over two axes; `level` is a value of y that is drawn as a dashed line."""

    label: str
    x: Axis
    y: Axis
    marks: tuple[Mark, ...]
    line: tuple[tuple[float, float], ...] = ()
    level: float | None = None

    @property
    def path(self) -> str:
        """The line as the path of an SVG with a view box of 1000 by 1000."""
        points = (f"{10 * self.x.place(x):.0f} {1000 - 10 * self.y.place(y):.0f}" for x, y in self.line)
        return "M" + "L".join(points)


def linear_axis(title: str, ends: tuple[float, float], words: Callable[[float], str], *, most: int = 5) -> Axis:
    """An axis with ticks at multiples of 1, 2, or 5 times a power of ten."""
    low, high = ends
    high = high if high > low else low + 1.0
    step = _step((high - low) / most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    values = [step * number for number in range(first, last + 1)]
    return Axis(title, low, high, tuple(Tick(_place(each, low, high, log=False), words(each)) for each in values))


def log_axis(title: str, low: float, high: float, *, most: int = 6) -> Axis:
    """A logarithmic axis with ticks at powers of ten, and between them where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / most))
    parts: Sequence[int] = (1,) if last - first > 3 else (1, 3) if last - first > 1 else (1, 2, 3, 5)
    values = [part * 10.0**power for power in range(first, last + 1, every) for part in parts]
    inside = [each for each in values if low <= each <= high]
    return Axis(title, low, high, tuple(Tick(_place(each, low, high, log=True), f"{each:g}") for each in inside), True)


def _step(least: float) -> float:
    """The smallest of 1, 2, 5, 10, .. that is not below."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(part * power for part in (1, 2, 5, 10) if part * power >= least * (1 - 1e-9))


def _place(value: float, low: float, high: float, *, log: bool) -> float:
    if log:
        value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
    return round(100 * min(max((value - low) / (high - low), 0.0), 1.0), 2)
