"""The two plots of a report: loss against bytes, and the drop at the sizes that a search tried."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compressor.formatting import format_percent, format_size
from compressor.report.losses import CurvePoint
from compressor.report.other_sizes import OtherSizes
from compressor.report.plot import Mark, Plot, linear_axis, log_axis
from compressor.report.wording import drop_words, loss_name

if TYPE_CHECKING:
    from compressor.planning import DropSearch
    from compressor.results import Compression


@dataclass(frozen=True)
class _SizeUnit:
    name: str
    size: float


def _size_unit(most: int) -> _SizeUnit:
    """The unit in which sizes up to this one are short."""
    units = [_SizeUnit("bytes", 1), _SizeUnit("kB", 1e3), _SizeUnit("MB", 1e6), _SizeUnit("GB", 1e9)]
    return next((each for each in reversed(units) if most >= each.size), units[0])


def loss_plot(compression: Compression, points: Sequence[CurvePoint], sizes: OtherSizes) -> Plot:
    """Loss over the bytes of the weight files: the curve of the allocation, this model, and int8 and int4 of it."""
    assert compression.curve is not None
    line = [(float(each.bytes), each.loss) for each in sizes.sizes if each.loss > 0 and not each.this]
    heights = [loss for _, loss in line] + [point.loss for point in points if point.loss > 0]
    # The last steps to the dense model cost almost nothing, and would take up most of the height.
    top = max(heights, default=1.0)
    least = min((point.loss for point in points if point.loss > 0), default=top)
    bottom = max(min(heights, default=1.0), min(1e-4 * top, 0.1 * least)) / 1.5
    most = max(compression.bytes.before, *(point.bytes for point in points), *(each.bytes for each in sizes.sizes))
    unit = _size_unit(most)
    marks = (
        Mark(
            *(point.bytes, max(point.loss, bottom), point.shape),
            f"{point.label}: {format_size(point.bytes)}, {point.words}",
            *(point.measured, point.of, point.name),
        )
        for point in points
    )
    return Plot(
        "Loss against the size of the weight files",
        linear_axis(f"weight files, {unit.name}", (0, 1.02 * most), lambda size: f"{size / unit.size:g}"),
        log_axis(f"{loss_name(compression.curve.unit)} (logarithmic)", bottom, 2 * top),
        tuple(marks),
        tuple(line),
    )


def search_plot(search: DropSearch, *, eligible: int, limit: float | None) -> Plot:
    """The measured drop at every size tried; points are not joined, for with few examples the drop jumps."""
    from compressor.planning import smallest_found

    custom = search.higher_is_better is not None
    scale = 100.0 if search.metric == "accuracy" and not custom else 1.0
    chosen = smallest_found(search.trials, search.limit)
    found = [trial for trial in search.trials if math.isfinite(trial.drop)]
    drops = [0.0, *(scale * trial.drop for trial in found), *([] if limit is None else [scale * limit])]
    room = 0.08 * (max(drops) - min(drops)) or 1.0
    marks = (
        Mark(
            *(100 * trial.parameters / eligible, scale * trial.drop, "square" if trial is chosen else "circle"),
            f"{format_percent(trial.parameters, eligible)} kept: a drop of"
            f" {drop_words(search.metric, trial.drop, search.higher_is_better)}",
            *(True, "ours" if trial is chosen else "others", "chosen" if trial is chosen else ""),
        )
        for trial in found
    )
    known = "drop, points of accuracy" if search.metric == "accuracy" else "increase in perplexity"
    return Plot(
        "Drop measured against size",
        linear_axis("eligible parameters kept, %", (0, 102), lambda share: f"{share:g}"),
        linear_axis(
            f"drop in {search.metric}" if custom else known,
            (min(drops) - room, max(drops) + room),
            lambda drop: f"{drop + 0.0:.4g}",
        ),
        tuple(marks),
        level=None if limit is None else scale * limit,
    )
