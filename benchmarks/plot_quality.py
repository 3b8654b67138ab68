"""Draws loss increase against size from the results of benchmarks/quality.py: a panel a model, a line a method.

    python benchmarks/plot_quality.py [--output FILE]

Writes benchmarks/results/quality.svg, or FILE in the format of its suffix. Points are means over the calibration seeds,
bars reach from the least to the most. Methods differ in marker and dash as well as in color.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from pictures import SMALLER, save

RESULTS = Path(__file__).parent / "results"
MODELS = ("stdlib-llama", "stdlib-llama-large", "digits-vit", "digits-resnet", "digits-mlp")
CONDITION = "test split"
SMALLEST = 1e-3  # nats: what is less, or negative, is noise on test data of this size, and drawn here

# Marker, dash and color of each method; ours is the only thick line.
STYLES: dict[str, dict[str, Any]] = {
    "truncated SVD": {"marker": "o", "linestyle": ":", "color": "0.55"},
    "ASVD": {"marker": "v", "linestyle": ":", "color": "0.4"},
    "SVD-LLM": {"marker": "s", "linestyle": "--", "color": "#4477aa"},
    "SVD-LLM, sequential": {"marker": "D", "linestyle": "--", "color": "#66ccee"},
    "SVD-LLM, pivoted": {"marker": "s", "linestyle": "-.", "color": "#228833", "markerfacecolor": "white"},
    "MPIFA": {"marker": "^", "linestyle": "-.", "color": "#ee6677"},
    "ours without data": {"marker": "x", "linestyle": ":", "color": "black"},
    "ours": {"marker": "o", "linestyle": "-", "color": "black", "linewidth": 2.4},
}


def draw(axes: Axes, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """One panel."""
    for method, style in STYLES.items():
        found: dict[float, list[float]] = {}
        for row in rows:
            if row["method"] == method:
                found.setdefault(row["keep"], []).append(max(row["loss_increase"], SMALLEST))
        if not found:
            continue
        keeps = sorted(found, reverse=True)
        means = [statistics.mean(found[keep]) for keep in keeps]
        below = [mean - min(found[keep]) for mean, keep in zip(means, keeps, strict=True)]
        above = [max(found[keep]) - mean for mean, keep in zip(means, keeps, strict=True)]
        axes.errorbar(keeps, means, yerr=(below, above), label=method, markersize=5, elinewidth=0.8, **style)
    axes.set(title=name, yscale="log", xlabel=f"share of the eligible parameters kept\n({SMALLER})")
    axes.set_xticks(sorted({row["keep"] for row in rows}))
    axes.invert_xaxis()
    axes.grid(visible=True, which="major", color="0.9")
    axes.axhspan(0, SMALLEST, color="0.93", zorder=0)
    axes.set_ylim(bottom=SMALLEST * 0.7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "quality.svg")
    draw_all(parser.parse_args().output)


def draw_all(output: Path) -> None:
    """All panels."""
    results: dict[str, list[dict[str, Any]]] = {}
    for name in MODELS:
        path = RESULTS / f"quality-{name}.json"
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
        rows = [row for row in rows if row.get("condition") == CONDITION]
        if rows:
            results[name] = rows
    if not results:
        raise SystemExit("there are no results yet: run benchmarks/quality.py first")
    columns = min(3, len(results) + 1)
    height = math.ceil((len(results) + 1) / columns)
    figure, panels = plt.subplots(height, columns, figsize=(4 * columns, 3.8 * height), squeeze=False)
    places = list(panels.flat)
    for axes, (name, rows) in zip(places, results.items(), strict=False):
        draw(axes, name, rows)
    for axes in places[len(results) :]:
        axes.axis("off")
    panels[0][0].set_ylabel(f"loss increase, nats per prediction\n(gray: at most {SMALLEST:g})")
    lines = {label: line for axes in places for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    shown = [method for method in STYLES if method in lines]
    places[len(results)].legend([lines[method] for method in shown], shown, loc="center", frameon=False)
    figure.tight_layout()
    save(figure, output)


if __name__ == "__main__":
    main()
