"""Axes: places are in proportion, and ticks are round numbers that do not crowd."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.report.plot import Plot, linear_axis, log_axis

positive = st.floats(1e-9, 1e9)


@given(positive, st.floats(0, 1))
def test_places_of_a_linear_axis_are_in_proportion(high: float, share: float) -> None:
    axis = linear_axis("", (0, high), "{:g}".format)
    assert axis.place(share * high) == pytest.approx(100 * share, abs=0.01)
    assert axis.place(-1) == 0
    assert axis.place(2 * high) == 100
    assert 2 <= len(axis.ticks) <= 7
    for tick in axis.ticks:
        assert tick.place == pytest.approx(100 * float(tick.label) / high, abs=0.02)


@given(positive, st.floats(0.6, 12))
def test_a_logarithmic_axis_has_ticks_at_powers_of_ten_and_between_where_these_are_few(
    low: float, decades: float
) -> None:
    high = low * 10**decades
    axis = log_axis("", low, high)
    assert axis.place(math.sqrt(low * high)) == pytest.approx(50, abs=0.01)
    assert axis.place(0) == 0
    assert 1 <= len(axis.ticks) <= 9
    for tick in axis.ticks:
        share = math.log10(float(tick.label) / low) / decades
        assert tick.place == pytest.approx(100 * share, abs=0.02)


def test_a_path_is_upside_down_as_pictures_are() -> None:
    x, y = linear_axis("", (0, 10), str), linear_axis("", (0, 1), str)
    plot = Plot("", x, y, (), line=((0, 0), (5, 1), (10, 0.5)))
    assert plot.path == "M0 1000L500 0L1000 500"
