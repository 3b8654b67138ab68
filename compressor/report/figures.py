"""Figures of the report as SVG, with the colors and fonts of the page, so that they are legible in light and dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compressor.formatting import format_short, one_line
from compressor.report.wording import loss_axis, shortened_apart

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from compressor.measure import Spectrum
    from compressor.planning import DropSearch, LayerPlan, SizeCurve
    from compressor.report.losses import CurvePoint

# Drawn in these colors, which then become names that the page's style sheet defines for light and for dark.
INK, FAINT, BEFORE, AFTER, EDGE, BOUND = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f", "#101112"
NAMES = {INK: "ink", FAINT: "faint", BEFORE: "before", AFTER: "after", EDGE: "edge", BOUND: "bound"}
COLORS = {drawn: f"var(--{name})" for drawn, name in NAMES.items()}

STYLE = {
    # Text stays text: smaller, selectable, and in the page's font.
    "svg.fonttype": "none",
    # Names of layers are not formulas, whatever dollars they hold.
    "text.parse_math": False,
    "svg.hashsalt": "compressor",
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}

# Points that a small figure of a spectrum can show.
POINTS = 120


def sizes_figure(layers: Sequence[LayerPlan]) -> str:
    """Stored parameters of every layer before and after, as SVG: one bar inside the other, in the model's order."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    with rc_context(STYLE):
        figure = Figure(figsize=(9.2, 0.5 + 0.22 * max(len(layers), 2)), layout="constrained")
        axes = figure.add_subplot()
        rows = range(len(layers))
        axes.barh(rows, [layer.parameters_before for layer in layers], height=0.72, color=BEFORE)
        axes.barh(rows, [layer.parameters for layer in layers], height=0.72, color=AFTER)
        _label_rows(axes, layers)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_short(round(value))))
        axes.set_xlabel("stored parameters")
        return _svg(figure, "sizes", "Stored parameters of every layer before and after")


@dataclass(frozen=True)
class RankMarks:
    """Marks beside the ranks of a layer: the largest of them, and what the training recipe says.

    `edge` is the largest singular value of the surviving initialization, `above_edge` how many are larger, and `bound`
    the memory window's bound on the rank if it is not vacuous; None if unknown.
    """

    full: int
    edge: float | None = None
    above_edge: int | None = None
    bound: int | None = None


def ranks_figure(layers: Sequence[LayerPlan], marks: Sequence[RankMarks]) -> str:
    """The rank of every layer, inside its full rank, as SVG; with the marks of the training recipe."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(9.2, 0.5 + 0.22 * max(len(layers), 2)), layout="constrained")
        axes = figure.add_subplot()
        rows = range(len(layers))
        axes.barh(rows, [mark.full for mark in marks], height=0.72, color=BEFORE)
        kept = [
            mark.full if layer.truncated_to is None else layer.truncated_to
            for layer, mark in zip(layers, marks, strict=True)
        ]
        axes.barh(rows, kept, height=0.72, color=AFTER)
        for counts, color, shape in (
            ([mark.above_edge for mark in marks], EDGE, "D"),
            ([mark.bound for mark in marks], BOUND, "|"),
        ):
            places = [(count, row) for row, count in zip(rows, counts, strict=True) if count is not None]
            if places:
                axes.plot(*zip(*places, strict=True), shape, color=color, markersize=5 if shape == "D" else 11, mew=2)
        _label_rows(axes, layers)
        axes.set_xlim(0, 1.03 * max(mark.full for mark in marks))
        axes.set_xlabel("rank")
        return _svg(figure, "ranks", "Rank of every layer, within its full rank")


def _label_rows(axes: Axes, layers: Sequence[LayerPlan]) -> None:
    axes.set_yticks(range(len(layers)), shortened_apart([one_line(layer.name) for layer in layers], 40))
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def curve_figure(curve: SizeCurve, points: Sequence[CurvePoint], eligible: int) -> str:
    """Loss over the share of the `eligible` parameters that is kept, with all points above zero, as SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    drawn = [(100 * p / eligible, loss) for p, loss in zip(curve.parameters, curve.losses, strict=True) if loss > 0]
    with rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.8), layout="constrained")
        axes = figure.add_subplot()
        if drawn:
            axes.plot(*zip(*drawn, strict=True), color=BEFORE, linewidth=2.0)
        for point in points:
            if point.loss > 0:
                axes.plot(100 * point.parameters / eligible, point.loss, point.marker, color=AFTER, markersize=8, mew=2)
        axes.set_yscale("log")
        heights = [loss for _, loss in drawn] + [point.loss for point in points if point.loss > 0]
        # The last steps to the dense model cost almost nothing, and would take up most of the height.
        top = max(heights, default=1.0)
        least = min((point.loss for point in points if point.loss > 0), default=top)
        axes.set_ylim(max(min(heights, default=1.0), min(1e-4 * top, 0.1 * least)) / 1.5, 2 * top)
        axes.set_xlim(0, 102)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.minorticks_off()
        axes.set_xlabel("eligible parameters kept")
        axes.set_ylabel(loss_axis(curve.unit))
        return _svg(figure, "curve", "Loss against size")


def search_figure(search: DropSearch, *, eligible: int, limit: float | None) -> str:
    """The measured drop at every size tried, with the chosen size and the allowed drop, as SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    from compressor.planning import smallest_found

    custom = search.higher_is_better is not None
    scale = 100.0 if search.metric == "accuracy" and not custom else 1.0
    chosen = smallest_found(search.trials, search.limit)
    tried = sorted((t.parameters, scale * t.drop, t is chosen) for t in search.trials if math.isfinite(t.drop))
    with rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.8), layout="constrained")
        axes = figure.add_subplot()
        # The points are not joined: the drop need not be monotone, and with few examples it jumps.
        for parameters, drop, is_chosen in tried:
            color, size = (AFTER, 8) if is_chosen else (BEFORE, 6)
            axes.plot(100 * parameters / eligible, drop, "o", color=color, markersize=size)
        if limit is not None:
            axes.axhline(scale * limit, color=INK, linewidth=1.0, linestyle=(0, (3, 2)))
        axes.set_xlim(0, 102)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axes.set_xlabel("eligible parameters kept")
        known = "points of accuracy lost" if search.metric == "accuracy" else "increase in perplexity"
        axes.set_ylabel(f"drop in {search.metric}" if custom else known)
        return _svg(figure, "search", "Drop measured against size")


def spectrum_figure(
    spectrum: Spectrum, rank: int | None, marks: RankMarks | None = None, *, prefix: str, whole: Spectrum | None = None
) -> str:
    """Singular values over their index, relative to the largest, with the chosen rank, as SVG.

    A horizontal line marks the edge of the surviving initialization, and a vertical one a bound on the rank that is not
    vacuous. Of what training wrote, `whole` is the spectrum of the layer, which is drawn as a dotted line.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    values = np.asarray(spectrum, dtype=np.float64)
    scale = values if whole is None else np.asarray(whole, dtype=np.float64)
    largest = float(scale[0]) if scale.size and scale[0] > 0 else 1.0
    shown = np.unique(np.linspace(0, max(values.size - 1, 0), min(values.size, POINTS)).round().astype(int))
    # A logarithmic axis has no zero; values below rounding are drawn at rounding.
    heights = np.maximum(values[shown] / largest, 1e-7)
    with rc_context(STYLE):
        figure = Figure(figsize=(2.9, 1.6), layout="constrained")
        axes = figure.add_subplot()
        if whole is not None:
            axes.semilogy(shown + 1, scale[shown] / largest, color=BEFORE, linewidth=1.6, linestyle=(0, (1, 1)))
        axes.semilogy(shown + 1, heights, color=BEFORE, linewidth=1.6)
        if rank is not None:
            kept = shown < rank
            axes.semilogy(shown[kept] + 1, heights[kept], color=AFTER, linewidth=2.2)
            axes.axvline(rank, color=AFTER, linewidth=1.0, linestyle=(0, (3, 2)))
        axes.set_xlim(0, max(values.size, 1) + 1)
        axes.set_xticks(sorted({rank, values.size} - {None, 0}) if _apart(rank, values.size) else [values.size])
        # A flat spectrum spans a decade too, so that it looks flat and its axis has labels.
        bottom, top = min(0.8 * float(heights.min(initial=1.0)), 0.08), 1.5
        if marks is not None and marks.edge is not None and marks.edge / largest >= bottom:
            axes.axhline(marks.edge / largest, color=EDGE, linewidth=1.4, linestyle=(0, (1, 1)))
            top = max(top, 1.5 * marks.edge / largest)
        if marks is not None and marks.bound is not None:
            axes.axvline(marks.bound, color=BOUND, linewidth=1.4, linestyle=(0, (4, 1, 1, 1)))
        axes.set_ylim(bottom, top)
        axes.yaxis.set_major_locator(LogLocator(numticks=4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.minorticks_off()
        return _svg(figure, prefix, "Singular values relative to the largest")


def _apart(rank: int | None, count: int) -> bool:
    """Whether two labels of the axis do not overlap."""
    return rank is None or count - rank > 0.15 * count


def _svg(figure: Figure, prefix: str, label: str) -> str:
    """The figure as an SVG element of a page with several: with ids of its own, the page's colors, and no date."""
    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    for drawn, named in COLORS.items():
        svg = svg.replace(drawn, named)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
