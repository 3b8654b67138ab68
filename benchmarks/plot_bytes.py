"""Draws loss increase against bytes from the results of benchmarks/bytes.py: a panel a model.

    python benchmarks/plot_bytes.py [--output FILE]

Writes benchmarks/results/bytes.svg, or FILE in the format of its suffix. Lines are what takes a size, single markers
are layers all of one width; both are means over the draws, and bars reach from the least to the most. Methods differ in
marker and dash as well as in color. It is read on light and on dark pages (pictures.py).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from bytes import OURS, RESULT, SHARES, Point, by_model, points_of
from matplotlib.axes import Axes
from pictures import SMALLER, save

SMALLEST = 1e-4  # nats: what is less, or negative, is drawn here
LINES: dict[str, dict[str, Any]] = {
    "ours": {"marker": "o", "linestyle": "-", "color": "black", "linewidth": 2.2},
    "ours, from the seed": {"marker": "o", "linestyle": "-", "color": "#aa3377", "markerfacecolor": "white"},
    "bits alone": {"marker": ".", "linestyle": "--", "color": "#4477aa"},
    "ranks alone": {"marker": "v", "linestyle": ":", "color": "0.45"},
}
assert tuple(LINES) == tuple(OURS)


@dataclass(frozen=True)
class Family:
    """Methods that are drawn alike, by how their names begin."""

    name: str
    style: dict[str, Any]


FAMILIES = (
    Family("nearest", {"marker": "x", "color": "0.55"}),
    Family("GPTQ", {"marker": "+", "color": "#4477aa", "markersize": 9}),
    Family("two-sided", {"marker": "s", "color": "#4477aa", "markerfacecolor": "white"}),
    Family("llm-compressor GPTQ", {"marker": "^", "color": "#228833"}),
    Family("llm-compressor AWQ", {"marker": "<", "color": "#228833", "markerfacecolor": "white"}),
    Family("AutoRound", {"marker": "*", "color": "#ee6677", "markersize": 9}),
    Family("torchao", {"marker": "D", "color": "#ccbb44", "markeredgecolor": "0.3"}),
)


def draw(axes: Axes, name: str, points: Sequence[Point]) -> None:
    """One panel."""
    for method, style in LINES.items():
        _plot(axes, [point for point in points if point.method == method], method, style=style)
    for family in FAMILIES:
        own = [point for point in points if point.method.startswith(f"{family.name} ")]
        _plot(axes, own, family.name, style={"linestyle": "", **family.style})
    errors = [point.error for point in points if point.method == "ours"]
    if errors:
        shares = [100 * point.stored for point in points if point.method == "ours"]
        axes.fill_between(shares, errors, SMALLEST / 2, color="0.9", zorder=0, label="within one standard error")
    axes.set(title=name, xscale="log", yscale="log", xlabel=f"% of the layers' 16-bit bytes ({SMALLER})")
    shares = sorted({*SHARES, min(point.share or 1 for point in points)})
    axes.set_xticks([100 * share for share in shares], [f"{100 * share:g}" for share in shares], fontsize=7)
    axes.minorticks_off()
    axes.set_xlim(60, 85 * min(shares[0], SHARES[-1]))
    axes.set_ylim(bottom=SMALLEST * 0.7)
    axes.grid(visible=True, which="major", color="0.88", linewidth=0.6)


def _plot(axes: Axes, points: Sequence[Point], label: str, *, style: dict[str, Any]) -> None:
    if not points:
        return
    own = sorted(points, key=lambda point: point.stored)
    shown = [max(point.mean, SMALLEST) for point in own]
    below = [max(0.0, mean - max(min(point.losses), SMALLEST)) for mean, point in zip(shown, own, strict=True)]
    above = [max(0.0, max(point.losses) - mean) for mean, point in zip(shown, own, strict=True)]
    shares = [100 * point.stored for point in own]
    axes.errorbar(shares, shown, yerr=(below, above), label=label, elinewidth=0.8, **{"markersize": 5, **style})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULT)
    parser.add_argument("--output", type=Path, default=RESULT.with_suffix(".svg"))
    asked = parser.parse_args()
    draw_all(json.loads(asked.results.read_text(encoding="utf-8")), asked.output)


def draw_all(document: Any, output: Path) -> None:
    """All panels."""
    models = by_model(document)
    columns = min(3, len(models) + 1)
    height = math.ceil((len(models) + 1) / columns)
    figure, panels = plt.subplots(height, columns, figsize=(4.4 * columns, 3.9 * height), squeeze=False)
    places = list(panels.flat)
    for axes, (name, rows) in zip(places, models, strict=False):
        draw(axes, name, points_of(rows))
    for axes in places[len(models) :]:
        axes.axis("off")
    panels[0][0].set_ylabel(f"loss increase, nats per prediction\n(at the bottom: at most {SMALLEST:g})")
    lines = {label: line for axes in places for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    places[len(models)].legend(lines.values(), lines.keys(), loc="center", frameon=False)
    figure.tight_layout()
    save(figure, output)


if __name__ == "__main__":
    main()
