"""The evolution of effective ranks over a training run, as a figure in a file."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.errors import BadInput
from compressor.formatting import one_line
from compressor.report.wording import shortened_apart

if TYPE_CHECKING:
    from compressor.diagnosis.series import RankSeries

# More lines have no distinguishable colors; they are identified by their order instead.
MOST_NAMED = 10


def check_figure_path(path: Path, *, source: Path | None, overwrite: bool) -> None:
    """Refuse a figure that could not be written, before the work starts.

    Raises `BadInput` if the path is not named .svg or .png, exists and `overwrite` is not set, is not in a writable
    folder or is in the model folder `source`, or if matplotlib is not installed.
    """
    from compressor.io import check_output

    if find_spec("matplotlib") is None:
        raise BadInput(
            "a figure needs matplotlib, which is not installed",
            where=path,
            remedy="run pip install 'compressor[report]'",
        )
    if path.suffix.lower() not in (".svg", ".png"):
        raise BadInput("a figure is an SVG or PNG file", where=path, remedy="give it a name that ends in .svg or .png")
    check_output(path, sources=[] if source is None else [source], form="file", overwrite=overwrite)


def write_rank_figure(series: RankSeries, path: Path, *, overwrite: bool) -> None:
    """Draw every layer's entropy rank and Frobenius rank over the steps, as shares of the full rank.

    The same series gives the same bytes. Raises `BadInput` if the file cannot be written.
    """
    from matplotlib import colormaps, rc_context
    from matplotlib.figure import Figure

    from compressor.io import staged_file
    from compressor.measure import FROBENIUS_ERROR

    names = shortened_apart([one_line(layer.name) for layer in series.layers], 32)
    few = len(names) <= MOST_NAMED
    shades = colormaps["viridis"]
    style = {"svg.fonttype": "none", "svg.hashsalt": "compressor", "text.parse_math": False, "font.size": 9.0}
    with rc_context(style):
        figure = Figure(figsize=(9.2, 3.6), layout="constrained")
        for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("entropy", "frobenius"), strict=True):
            for index, layer in enumerate(series.layers):
                shares = [getattr(ranks, kind) / ranks.full for ranks in layer.ranks]
                color = f"C{index}" if few else shades(index / (len(names) - 1))
                axes.plot(series.steps, shares, color=color, linewidth=1.4, marker=".", label=names[index])
            axes.set_title({"entropy": "entropy rank", "frobenius": f"Frobenius rank at {FROBENIUS_ERROR:g}"}[kind])
            axes.set_xlabel(series.unit)
            axes.set_ylim(0, 1.02)
            axes.spines[["top", "right"]].set_visible(False)
        figure.axes[0].set_ylabel("share of the full rank")
        if few:
            handles, labels = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside right center", frameon=False)
        else:
            figure.suptitle(f"{len(names)} layers, from the first (dark) to the last (light)", fontsize=9.0)
        drawn = "png" if path.suffix.lower() == ".png" else "svg"
        metadata = {"Software": None} if drawn == "png" else {"Date": None, "Creator": None}
        with staged_file(path, overwrite=overwrite) as staged:
            figure.savefig(staged, format=drawn, metadata=metadata, dpi=150)
