"""Pictures of singular values: in proportion, at one scale, and of any spectrum."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from compressor.report.spectra import HEIGHT, WIDTH, RankMarks, decades_of, picture


def points(path: str) -> list[tuple[int, int]]:
    return [(int(x), int(y)) for x, y in re.findall(r"[ML](-?\d+) (-?\d+)", path)]


def test_values_and_marks_are_where_they_belong() -> None:
    values = np.geomspace(1, 1e-2, 100)
    found = picture(5 * values, 25, RankMarks(100, edge=0.5, above_edge=50, bound=80), decades=2)
    for x, y in points(found.values):
        assert y / HEIGHT == pytest.approx(-np.log10(values[round(100 * x / WIDTH) - 1]) / 2, abs=0.02)
    assert (found.kept, found.bound) == (WIDTH // 4, WIDTH * 4 // 5)
    assert found.edge == HEIGHT // 2
    assert found.words == "100 singular values, down to 0.01 of the largest; 0.33 at rank 25"


def test_what_training_wrote_is_relative_to_the_layer() -> None:
    found = picture(np.full(10, 0.1), 3, RankMarks(10), decades=1, whole=np.ones(10))
    assert {y for _, y in points(found.values)} == {HEIGHT}
    assert found.whole is not None
    assert {y for _, y in points(found.whole)} == {0}


@pytest.mark.parametrize("values", [np.zeros(5), np.ones(1), np.array([]), np.geomspace(1, 1e-30, 5000)])
def test_any_spectrum_has_a_small_picture(values: np.ndarray[Any, Any]) -> None:
    found = picture(values, None, RankMarks(len(values)), decades=decades_of([values]))
    assert "nan" not in found.values
    assert len(found.values) < 500
    assert found.kept is None
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points(found.values))


@pytest.mark.parametrize(("last", "decades"), [(1.0, 1), (0.2, 1), (2e-3, 3), (1e-20, 4)])
def test_the_scale_shows_most_spectra(last: float, decades: int) -> None:
    assert decades_of([np.geomspace(3, 3 * last, 20)] * 4) == decades
