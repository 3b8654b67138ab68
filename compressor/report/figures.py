"""Figures of the report as SVG that takes its colours and fonts from the page, so it is legible in light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from compressor.report.wording import compact, one_line, shortened_apart

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from compressor.measure import Spectrum
    from compressor.planning import LayerPlan

# Drawn in these colours, which then become names that the page's style sheet defines for light and for dark.
INK, FAINT, BEFORE, AFTER = "#010203", "#040506", "#070809", "#0a0b0c"
COLOURS = {INK: "var(--ink)", FAINT: "var(--faint)", BEFORE: "var(--before)", AFTER: "var(--after)"}

STYLE = {
    # Text stays text: smaller, selectable, and in the page's font.
    "svg.fonttype": "none",
    # Names of layers are not formulas, whatever dollars they hold.
    "text.parse_math": False,
    "svg.hashsalt": "lowrank-compressor",
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
    """Stored parameters of every layer before and after, as SVG: one bar within the other, in the model's order."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    with rc_context(STYLE):
        figure = Figure(figsize=(9.2, 0.5 + 0.22 * max(len(layers), 2)), layout="constrained")
        axes = figure.add_subplot()
        rows = range(len(layers))
        axes.barh(rows, [layer.dense_parameters for layer in layers], height=0.72, color=BEFORE)
        axes.barh(rows, [layer.parameters for layer in layers], height=0.72, color=AFTER)
        axes.set_yticks(rows, shortened_apart([one_line(layer.name) for layer in layers], 40))
        axes.set_ylim(len(layers) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(round(value))))
        axes.set_xlabel("stored parameters")
        return _svg(figure, "sizes", "Stored parameters of every layer before and after")


def spectrum_figure(spectrum: Spectrum, rank: int | None, *, prefix: str) -> str:
    """Singular values over their index, relative to the largest, with the rank that was chosen, as SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    values = np.asarray(spectrum, dtype=np.float64)
    largest = float(values[0]) if values.size and values[0] > 0 else 1.0
    shown = np.unique(np.linspace(0, max(values.size - 1, 0), min(values.size, POINTS)).round().astype(int))
    # A logarithmic axis has no zero; what is below rounding is drawn at rounding.
    heights = np.maximum(values[shown] / largest, 1e-7)
    with rc_context(STYLE):
        figure = Figure(figsize=(2.9, 1.6), layout="constrained")
        axes = figure.add_subplot()
        axes.semilogy(shown + 1, heights, color=BEFORE, linewidth=1.6)
        if rank is not None:
            kept = shown < rank
            axes.semilogy(shown[kept] + 1, heights[kept], color=AFTER, linewidth=2.2)
            axes.axvline(rank, color=AFTER, linewidth=1.0, linestyle=(0, (3, 2)))
        axes.set_xlim(0, max(values.size, 1) + 1)
        axes.set_xticks(sorted({rank, values.size} - {None, 0}) if _apart(rank, values.size) else [values.size])
        # A spectrum that hardly falls has a decade as well, so that it looks flat and its axis has labels.
        axes.set_ylim(min(0.8 * float(heights.min(initial=1.0)), 0.08), 1.5)
        axes.yaxis.set_major_locator(LogLocator(numticks=4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.minorticks_off()
        return _svg(figure, prefix, "Singular values relative to the largest")


def _apart(rank: int | None, count: int) -> bool:
    """Whether two labels of the axis do not run into each other."""
    return rank is None or count - rank > 0.15 * count


def _svg(figure: Figure, prefix: str, label: str) -> str:
    """The figure as an SVG element for a page that holds many: its own ids, the page's colours, no date."""
    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    for drawn, named in COLOURS.items():
        svg = svg.replace(drawn, named)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
