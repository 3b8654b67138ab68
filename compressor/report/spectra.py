"""Small pictures of the singular values of layers, all at one scale, so that they compare."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compressor.measure import Spectrum

# The view box of a picture, and the points that it can show.
WIDTH, HEIGHT, _POINTS = 200, 600, 40


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

    @property
    def words(self) -> str:
        above = [] if self.above_edge is None else [f"{self.above_edge} above the edge"]
        return ", ".join([*above, *([] if self.bound is None else [f"bound {self.bound}"])])


@dataclass(frozen=True)
class Picture:
    """The singular values of a layer as paths in a view box of 200 by 600: a logarithmic scale of some decades below 1.

    `kept` is the width of the part that the chosen rank keeps, None of a dense layer; `edge` and `bound` are where the
    marks are, and `whole` is the path of the layer's own values where those of what training wrote are shown.
    """

    values: str
    kept: int | None
    edge: int | None
    bound: int | None
    whole: str | None
    words: str


def decades_of(spectra: Iterable[Spectrum]) -> int:
    """How many decades below the largest value show most of the spectra; no more than can be told apart."""
    depths = [-math.log10(max(float(each[-1] / each[0]), 1e-9)) for each in spectra if len(each) and each[0] > 0]
    return min(max(math.ceil(np.quantile(depths, 0.75) if depths else 1), 1), 4)


def picture(
    spectrum: Spectrum, rank: int | None, marks: RankMarks, *, decades: int, whole: Spectrum | None = None
) -> Picture:
    """The picture of a spectrum; of what training wrote, beside `whole`, the spectrum of the layer."""
    values = np.asarray(spectrum, dtype=np.float64)
    scale = values if whole is None else np.asarray(whole, dtype=np.float64)
    largest = float(scale[0]) if scale.size and scale[0] > 0 else 1.0
    count = max(values.size, 1)

    def path(shown: npt.NDArray[np.float64]) -> str:
        places = np.unique(np.linspace(0, max(shown.size - 1, 0), min(shown.size, _POINTS)).round().astype(int))
        points = (
            f"{_across(int(place) + 1, count)} {_height(float(shown[place]) / largest, decades)}" for place in places
        )
        return "M" + "L".join(points) if shown.size else "M0 0"

    last = float(values[-1]) / largest if values.size else 0.0
    words = f"{values.size} singular values, down to {last:.2g} of the largest"
    if rank is not None and 0 < rank <= values.size:
        words += f"; {float(values[rank - 1]) / largest:.2g} at rank {rank}"
    return Picture(
        values=path(values),
        kept=None if rank is None else _across(rank, count),
        edge=None if marks.edge is None else _height(marks.edge / largest, decades),
        bound=None if marks.bound is None else _across(marks.bound, count),
        whole=None if whole is None else path(scale),
        words=words,
    )


def _across(rank: int, count: int) -> int:
    return round(WIDTH * min(rank / count, 1.0))


def _height(value: float, decades: int) -> int:
    """Values outside are drawn at the end."""
    share = -math.log10(max(value, 1e-12)) / decades
    return round(HEIGHT * min(max(share, 0.0), 1.0))
