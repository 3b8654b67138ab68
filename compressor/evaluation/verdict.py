"""What became of a model in one line, and of each of its quantities: better, the same, or worse."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

Change = Literal["better", "same", "worse"]


def judged(increase: float, noise: float = 0.0) -> Change:
    """What an increase is of a quantity that should be small: bytes, seconds, what a metric lost.

    An increase or a decrease of at most `noise` is none.
    """
    if increase > noise:
        return "worse"
    return "better" if increase < -noise else "same"


@dataclass(frozen=True)
class Remark:
    """A part of a verdict in words, and what the change is that it tells; None where there is nothing to compare."""

    words: str
    change: Change | None


@dataclass(frozen=True)
class SizeChange:
    """The bytes of the weight files before and after."""

    before: int
    after: int

    @property
    def change(self) -> Change:
        return judged(self.after - self.before)

    @property
    def words(self) -> str:
        if self.change == "same":
            return "same size"
        share = 100 * abs(self.after - self.before) / self.before if self.before else math.inf
        # Two thirds of a percent are not none, and 99.7 % are not all.
        shown = f"{share:.0f}" if 0.95 <= share < 99.5 or share >= 100 else f"{share:.1f}"
        shown = "less than 0.1" if shown == "0.0" else shown
        return f"{shown} % {'smaller' if self.change == 'better' else 'larger'}"


@dataclass(frozen=True)
class LatencyChange:
    """The latency of a workload, such as `batch 1`, as a ratio to the dense model's.

    It was measured, unless `predicted_on` names a device: then it is that of the layers alone, by what is known of the
    device. A ratio that is within `noise` of one is no change.
    """

    workload: str
    ratio: float
    predicted_on: str | None = None
    noise: float = 0.03

    @property
    def change(self) -> Change:
        return judged(self.ratio - 1, self.noise)

    @property
    def words(self) -> str:
        return f"{self.ratio:.2f}x" if self.ratio < 10 else f"{self.ratio:.0f}x"


@dataclass(frozen=True)
class QualityChange:
    """A metric before and after: `drop` is how much worse it is, with the standard error of that, where it is known."""

    metric: str
    before: float | None
    after: float
    drop: float | None = None
    drop_error: float | None = None
    higher_is_better: bool | None = None

    @property
    def change(self) -> Change | None:
        return None if self.drop is None else judged(self.drop, self.drop_error or 0.0)

    @property
    def words(self) -> str:
        if self.metric == "accuracy" and self.higher_is_better is None:
            before, after = self._shown(1, 100)
            return f"accuracy {before}{after} %"
        before, after = self._shown(2) if self.metric == "perplexity" else self._shown(4, significant=True)
        return f"{self.metric} {before}{after}"

    def _shown(self, digits: int, scale: float = 1, *, significant: bool = False) -> tuple[str, str]:
        """Both values, with up to two more digits where what is worse or better would look the same."""
        kind = "g" if significant else "f"

        def text(value: float, digits: int) -> str:
            if not math.isfinite(value):
                return "infinite"
            return f"{scale * value:.{digits}{kind}}" if abs(value) < 1e4 else f"{value:.{digits + 2}g}"

        if self.before is None:
            return "", text(self.after, digits)
        more = 0 if self.change == "same" else 2
        pairs = [(text(self.before, each), text(self.after, each)) for each in range(digits, digits + more + 1)]
        before, after = next((pair for pair in pairs if pair[0] != pair[1]), pairs[0])
        return f"{before} -> ", after


@dataclass(frozen=True)
class Verdict:
    """What became of a model: its size, its latency in each workload, its quality, as far as each is known."""

    size: SizeChange | None = None
    latency: tuple[LatencyChange, ...] = field(default=())
    quality: QualityChange | None = None
    beside_base: bool = False
    """Whether the bytes after are those of what is stored beside the base of a fine-tune."""

    @property
    def remarks(self) -> tuple[Remark, ...]:
        """Its parts in the order in which they are told."""
        parts: list[Remark] = []
        if self.size is not None:
            parts.append(Remark(self.size.words + (" beside its base" if self.beside_base else ""), self.size.change))
        parts += self._latency_remarks()
        if self.quality is not None:
            parts.append(Remark(self.quality.words, self.quality.change))
        return tuple(parts)

    def _latency_remarks(self) -> Iterator[Remark]:
        """One for all workloads where their ratios look the same, two of two, and of more the least and the worst."""
        if not self.latency:
            return
        ordered = sorted(self.latency, key=lambda each: each.ratio)
        device = ordered[0].predicted_on
        predicted = "" if device is None else f" (predicted for its layers on {device})"
        best, worst = ordered[0], ordered[-1]
        if best.words == worst.words:
            yield Remark(f"{worst.words} latency{predicted}", worst.change)
        elif len(ordered) == 2:
            first, second = self.latency
            both = second.workload.removeprefix("batch ") if first.workload.startswith("batch ") else second.workload
            yield Remark(f"{first.words} latency {_at(first.workload)}", first.change)
            yield Remark(f"{second.words} {_at(both)}{predicted}", second.change)
        else:
            yield Remark(f"{best.words} to {worst.words} latency{predicted}", worst.change)

    @property
    def worse(self) -> tuple[str, ...]:
        """The quantities that got worse: `size`, `latency`, or the name of the metric."""
        found = []
        if self.size is not None and self.size.change == "worse":
            found.append("size")
        if any(each.change == "worse" for each in self.latency):
            found.append("latency")
        if self.quality is not None and self.quality.change == "worse":
            found.append(self.quality.metric)
        return tuple(found)

    def __str__(self) -> str:
        return ", ".join(remark.words for remark in self.remarks)

    def to_dict(self) -> dict[str, Any]:
        """The quantities for JSON; those that are not known are None."""
        size, quality = self.size, self.quality
        return {
            "size": None if size is None else {"before": size.before, "after": size.after, "change": size.change},
            "latency": [
                {
                    "workload": each.workload,
                    "ratio": each.ratio,
                    "predicted_on": each.predicted_on,
                    "change": each.change,
                }
                for each in self.latency
            ]
            or None,
            "quality": None
            if quality is None
            else {
                "metric": quality.metric,
                "before": finite_or_words(quality.before),
                "after": finite_or_words(quality.after),
                "drop": finite_or_words(quality.drop),
                "drop_error": quality.drop_error,
                "change": quality.change,
            },
        }


def _at(workload: str) -> str:
    return f"({workload})" if "," in workload else f"at {workload}"


def finite_or_words(value: float | None) -> float | str | None:
    """A number for JSON, with an infinite one as the string "infinity" or "-infinity"."""
    if value is None or math.isfinite(value):
        return value
    return "infinity" if value > 0 else "-infinity"
