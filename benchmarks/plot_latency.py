"""Draws the latency of networks against the batch size, from the results of benchmarks/latency.py.

    python benchmarks/plot_latency.py [--results FILE] [--output FILE]

Writes benchmarks/results/latency-cpu.svg, or FILE in the format of its suffix. A column a network and a row a dtype;
lines are ratios to dense at half of the numbers of each layer, bars reach over the quartiles, and the gray area is what
is slower than dense. The dashed line is the ideal: half of the time of the layers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from latency import SHORT, grouped
from matplotlib.axes import Axes
from pictures import save

RESULTS = Path(__file__).parent / "results"
STYLES: dict[str, dict[str, Any]] = {
    "pivoted": {"marker": "s", "linestyle": "-.", "color": "#ee6677", "markerfacecolor": "white"},
    "plain": {"marker": "o", "linestyle": "-", "color": "#4477aa"},
    "speed": {"marker": "D", "linestyle": "-", "color": "black", "linewidth": 2.4},
}
LABELS = {"pivoted": "pivoted / spatial", "plain": "plain / channel", "speed": "prefer speed"}


def draw(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """One panel."""
    rows = sorted(rows, key=lambda row: row["batch"])
    batches = [row["batch"] for row in rows]
    axes.axhspan(1, 10, color="0.93", zorder=0)
    axes.axhline(1, color="0.4", linewidth=1)
    axes.plot(batches, [row["ideal"] for row in rows], color="0.45", linestyle="--", label="ideal")
    for variant, style in STYLES.items():
        found = [(row["batch"], row["variants"][variant]["ratio"]) for row in rows if variant in row["variants"]]
        if not found:
            # Nothing would be faster, so nothing is written: it runs as fast as dense.
            axes.plot(batches, [1.0] * len(batches), label=LABELS[variant], **style | {"alpha": 0.35})
            axes.annotate("stays dense", (batches[0], 1), (4, 5), textcoords="offset points", fontsize=8)
            continue
        medians = [ratio["median"] for _, ratio in found]
        below = [ratio["median"] - ratio["low"] for _, ratio in found]
        above = [ratio["high"] - ratio["median"] for _, ratio in found]
        at = [batch for batch, _ in found]
        axes.errorbar(at, medians, yerr=(below, above), label=LABELS[variant], markersize=5, elinewidth=0.8, **style)
    axes.set(xscale="log", ylim=(0.4, 2.1))
    axes.grid(visible=True, axis="y", color="0.88")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "latency-cpu.json")
    parser.add_argument("--output", type=Path, default=RESULTS / "latency-cpu.svg")
    asked = parser.parse_args()
    draw_all(json.loads(asked.results.read_text(encoding="utf-8")), asked.output)


def draw_all(document: Any, output: Path) -> None:
    """All panels."""
    rows = document["models"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    columns = grouped(rows, "network", "workload")
    size = (3.0 * len(columns), 2.9 * len(dtypes) + 0.4)
    figure, panels = plt.subplots(len(dtypes), len(columns), figsize=size, squeeze=False, sharex=True, sharey=True)
    for column, ((network, workload), found) in enumerate(columns.items()):
        for line, dtype in enumerate(dtypes):
            draw(panels[line][column], [row for row in found if row["dtype"] == dtype])
        panels[0][column].set_title(network if workload == "forward" else f"{network},\n{workload}", fontsize=10)
        panels[-1][column].set_xlabel("batch size")
    for line, dtype in enumerate(dtypes):
        panels[line][0].set_ylabel(f"{SHORT[dtype]}: time / dense")
    batches = sorted({row["batch"] for row in rows})
    for axes in panels.flat:
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.minorticks_off()
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    save(figure, output)


if __name__ == "__main__":
    main()
