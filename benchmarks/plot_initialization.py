"""Draws what a matrix of digits-vit is made of: its singular values, its initial one's, and what training wrote.

    OMP_NUM_THREADS=1 python benchmarks/plot_initialization.py [--model NAME] [--layer NAME] [--output FILE]

Draws the model's initialization again from the seed of its card, takes exp(-K) of it away, and writes the singular
values and effective ranks to benchmarks/results/initialization.json and the picture, for light and dark, to
initialization.svg beside it. `references_table` makes the table of docs/initialization.md of the rows that
`initial.py --parts layers` measured.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from quality import SUBJECTS
from torch import Tensor

from compressor.initial import InitialWeights, initial_tensor, starts_of
from compressor.lowrank import as_matrix
from compressor.measure import effective_ranks, singular_values
from compressor.model import open_model
from compressor.model.build import load_factory

RESULT = Path(__file__).parent / "results" / "initialization.json"
MODEL, LAYER = "digits-vit", "vit.encoder.layer.3.intermediate.dense"

# Drawn in the first of the three, which becomes the second in light and the third in dark.
COLORS = {
    "paper": ("#000001", "#ffffff", "#14171a"),
    "ink": ("#000002", "#1c2024", "#e6e8ea"),
    "faint": ("#000003", "#c9ced4", "#4a525a"),
    "W": ("#000004", "#5b636b", "#9aa3ab"),
    "W_0": ("#000005", "#a84300", "#f0a35e"),
    "D": ("#000006", "#1f6feb", "#58a6ff"),
}


def measured(model: str, name: str) -> dict[str, Any]:
    """The singular values of a layer, of the share of its initial weights that is left, and of what training wrote."""
    subject = SUBJECTS[model]
    opened = open_model(subject.weights, factory=subject.factory)
    seed = opened.recipe.seed
    folder = subject.weights if subject.weights.is_dir() else subject.weights.parent
    initial = InitialWeights.from_seed(load_factory(f"{folder / 'train.py'}:build_model"), seed or 0)
    layer = next(each for each in opened.layers if each.name == name)
    start = starts_of([layer], opened.checkpoint, initial, recipe=opened.recipe)[name]
    drawn = initial_tensor(layer, initial)
    assert drawn is not None
    weight, before = (as_matrix(layer, each).double() for each in (opened.checkpoint.read(layer.tensor), drawn))
    matrices = {"W": weight, "W_0": start.share * before, "D": weight - start.share * before}
    return {
        "model": model,
        "layer": name,
        "shape": list(layer.shape),
        "seed": seed,
        "predicted": start.predicted,
        "fitted": start.fitted,
        "share": start.share,
        "written": start.written,
        "matrices": {key: _spectrum(matrix) for key, matrix in matrices.items()},
    }


def _spectrum(matrix: Tensor) -> dict[str, Any]:
    values = singular_values(matrix)
    return {"values": [float(f"{value:.5g}") for value in values], "ranks": effective_ranks(values).to_dict()}


def draw(document: Mapping[str, Any]) -> str:
    """The picture as SVG, which follows the reader's choice of light or dark."""
    drawn = {name: colors[0] for name, colors in COLORS.items()}
    ink, faint = drawn["ink"], drawn["faint"]
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "initialization",
        "font.size": 11.0,
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": faint,
        "xtick.color": ink,
        "ytick.color": ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    found = document["matrices"]
    beside = {"xytext": (6, 6), "textcoords": "offset points"}
    with mpl.rc_context(style):
        figure = Figure(figsize=(6.4, 3.9), layout="constrained", facecolor=drawn["paper"])
        axes = figure.add_subplot(facecolor=drawn["paper"])
        for key, width, dashes in (("W", 2.4, "-"), ("W_0", 1.8, (0, (4, 2))), ("D", 2.4, "-")):
            values = np.asarray(found[key]["values"])
            axes.plot(np.arange(1, len(values) + 1), values, color=drawn[key], linewidth=width, linestyle=dashes)
        for key in ("W", "D"):
            rank = found[key]["ranks"]["energy"]
            axes.plot(rank, found[key]["values"][rank - 1], "o", color=drawn[key], markersize=7)
        axes.annotate(*_label(found, "W", "W, as trained"), **beside, va="bottom", color=drawn["W"])
        axes.annotate(*_label(found, "D", "D, what training wrote"), **beside, va="bottom", color=drawn["D"])
        words = f"{document['share']:.3f} W_0, what is left of the start"
        below = found["W_0"]["values"][len(found["W_0"]["values"]) * 7 // 10]
        axes.annotate(words, (len(found["W_0"]["values"]) // 8, below), **beside, va="top", color=drawn["W_0"])
        axes.set_xlim(0, len(found["W"]["values"]) + 1)
        axes.set_ylim(0, None)
        axes.set_xlabel("singular value, the largest first (dots: 99 % of the energy)")
        axes.set_ylabel("size")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    for name, (color, _, _) in COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    light, dark = (";".join(f"--{name}:{colors[i]}" for name, colors in COLORS.items()) for i in (1, 2))
    sheet = (
        f"<style>:root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
        "text{font-family:system-ui,-apple-system,'Segoe UI',Arial,sans-serif!important}</style>"
    )
    return svg.replace("<defs>", sheet + "<defs>", 1)


def _label(found: Mapping[str, Any], key: str, words: str) -> tuple[str, tuple[int, float]]:
    """The words at a line with its rank, and the place on it that they are written beside."""
    place = len(found[key]["values"]) // 8
    return f"{words}: rank {found[key]['ranks']['energy']}", (place, found[key]["values"][place - 1])


def references_table(document: Mapping[str, Any]) -> str:
    """Of each reference model: layers, exp(-K) beside the fit, what training wrote, and ranks; medians over layers."""
    lines = [
        "| model | exp(-K) | fitted | D, of the norm of W | 99 % energy rank of W | of D |",
        "|---" * 6 + "|",
    ]
    rows = [row for row in document["rows"] if row["kind"] == "layer" and row["optimizer"] == "as its card says"]
    for model in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == model]

        def middle(key: str, own: Sequence[Mapping[str, Any]] = own) -> float:
            return statistics.median(row[key] for row in own)

        shares = f"{middle('predicted'):.3f} | {middle('fitted'):.3f} | {middle('written'):.0%}".replace("%", " %")
        lines.append(f"| {model} | {shares} | {middle('rank'):.0f} | {middle('written_rank'):.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SUBJECTS, default=MODEL)
    parser.add_argument("--layer", default=LAYER)
    parser.add_argument("--output", type=Path, default=RESULT)
    asked = parser.parse_args()
    document = measured(asked.model, asked.layer)
    asked.output.write_text(json.dumps(document) + "\n", encoding="utf-8")
    asked.output.with_suffix(".svg").write_text(draw(document), encoding="utf-8")


if __name__ == "__main__":
    main()
