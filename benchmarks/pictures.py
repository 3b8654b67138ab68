"""Pictures of results: readable on light and on dark pages, and in print.

    python benchmarks/pictures.py [NAME ...]

Draws pictures of benchmarks/results again from the results beside them, all of them if none is named. Each has a
background of its own. Where the reader's system is dark it turns dark: grays are turned over, and colors are as light
as a dark ground needs. What a picture tells apart by color differs in marker, dash, or lightness too.
"""

from __future__ import annotations

import argparse
import colorsys
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

RESULTS = Path(__file__).parent / "results"
MARKERS = "os^Dv"
# What stands at an axis whose numbers fall from left to right.
SMALLER = "smaller to the right →"
_GRAY, _LEAST_LIGHTNESS = 0.15, 0.6
_PAPER, _INK = 0.09, 0.9  # the lightness of white and of black on a dark page


def save(figure: Any, path: Path) -> None:
    """Write a figure, as SVG if its name says so; the same results give the same, small file."""
    import matplotlib.pyplot as plt

    if path.suffix != ".svg":
        figure.savefig(path, dpi=110)
    else:
        buffer = io.StringIO()
        with mpl.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        path.write_text(in_both(buffer.getvalue()), encoding="utf-8")
    plt.close(figure)


def in_both(svg: str) -> str:
    """A picture drawn for light pages, with rules that make it one for dark pages too."""
    colors = sorted(set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svg)))
    rules = [
        f'[style*="{what}: {color}"]{{{what}:{on_dark(color)}!important}}'
        for color in colors
        for what in ("fill", "stroke")
        if f"{what}: {color}" in svg
    ]
    sheet = f"text{{fill:{on_dark('#000000')}}}{''.join(rules)}"
    style = f"<style>@media (prefers-color-scheme: dark) {{{sheet}}}</style>"
    return svg.replace("<defs>", f"{style}\n <defs>", 1)


def on_dark(color: str) -> str:
    """The color on a dark page of what has a color on a light one."""
    red, green, blue = (int(color[at : at + 2], 16) / 255 for at in (1, 3, 5))
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    turned_over = _INK + (_PAPER - _INK) * lightness
    lightness = turned_over if saturation < _GRAY else max(lightness, _LEAST_LIGHTNESS)
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, lightness, saturation))


def drawers() -> dict[str, Callable[[Any, Path], None]]:
    """What draws each picture from the document of its results."""
    import flow_sums
    import initial
    import merging
    import plot_bytes
    import plot_initialization
    import plot_latency
    import plot_quality
    import theory
    import theory_momentum

    def initialization(document: Any, path: Path) -> None:
        path.write_text(plot_initialization.draw(document), encoding="utf-8")

    return {
        "bytes": plot_bytes.draw_all,
        "initial": initial.draw,
        "initialization": initialization,
        "latency-cpu": plot_latency.draw_all,
        "merging": lambda document, path: merging.plot(document["rows"], merging.Grid(), path),
        "quality": lambda _, path: plot_quality.draw_all(path),
        "theory-momentum": lambda document, path: theory_momentum.plot(document["rows"], path),
        "theory-ranks": lambda document, path: theory.plot_ranks(document["rows"], path),
        "theory-rules": lambda document, path: theory.plot_rules(document["rows"], path),
        "theory-sums": lambda document, path: flow_sums.plot(document["rows"], path),
    }


def main() -> None:
    known = drawers()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known))
    asked = parser.parse_args().names or list(known)
    for name in asked:
        source = RESULTS / f"{name}.json"
        document = json.loads(source.read_text(encoding="utf-8")) if source.exists() else None
        known[name](document, RESULTS / f"{name}.svg")


if __name__ == "__main__":
    main()
