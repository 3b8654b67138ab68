"""Numbers and names as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.formatting import format_estimate, format_percent, format_seconds, format_short, format_size, one_line


@given(st.text())
def test_one_line_is_printable_and_keeps_what_was_printable(text: str) -> None:
    line = one_line(text)
    assert line.isprintable()
    if text.isprintable():
        assert line == " ".join(text.split())


UNITS = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


@given(st.integers(0, 10**15))
def test_a_size_in_words_is_the_size_to_three_digits(size: int) -> None:
    number, unit = format_size(size).split()
    assert float(number) * UNITS[unit] == pytest.approx(size, rel=0.006)


@given(st.floats(1e-6, 1e5))
def test_a_time_in_words_is_the_time(seconds: float) -> None:
    number, unit = format_seconds(seconds).split()
    in_unit = {"µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}[unit]
    assert abs(float(number) * in_unit - seconds) <= max(0.006 * seconds, 0.51 * in_unit * (unit in ("min", "h")))


@given(st.floats(1, 1e6))
def test_an_expected_time_is_said_to_the_digit_that_it_is_worth(seconds: float) -> None:
    number, unit = format_estimate(seconds).split()
    in_unit = {"s": 1.0, "min": 60.0, "h": 3600.0}[unit]
    assert int(number) * in_unit == pytest.approx(seconds, rel=1 / 3)
    assert len(number.rstrip("0")) == 1 or (number.endswith("5") and int(number) < 60) or int(number) >= 100
    assert (int(number) < 120) or unit == "h"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.0, "1 s"), (5.31, "5 s"), (27.0, "25 s"), (64.0, "60 s"), (117.0, "2 min"), (7e3, "2 h")]
)
def test_an_expected_time_reads_as_one_would_say_it(seconds: float, words: str) -> None:
    assert format_estimate(seconds) == words


@given(st.integers(0, 10**17))
def test_a_compact_count_is_short_and_close(number: int) -> None:
    text = format_short(number)
    scale = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}.get(text[-1], 1)
    assert len(text) <= 5
    assert float(text.rstrip("kMGTP")) * scale == pytest.approx(number, rel=0.006)


def test_a_share_of_nothing_is_a_dash() -> None:
    assert format_percent(1, 0) == "-"
    assert format_percent(1, 8) == "12.5 %"
