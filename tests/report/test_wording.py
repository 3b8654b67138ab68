"""Numbers and names in words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.planning import Budget
from compressor.recipe import TrainingRecipe
from compressor.report.wording import (
    budget_words,
    change_words,
    compact,
    in_bytes,
    in_seconds,
    one_line,
    percent,
    recipe_sources,
    recipe_words,
    shortened,
)


@given(st.text())
def test_one_line_is_printable_and_keeps_what_was_printable(text: str) -> None:
    line = one_line(text)
    assert line.isprintable()
    if text.isprintable():
        assert line == " ".join(text.split())


@given(st.text(alphabet="ab.01_", max_size=60), st.integers(1, 60))
def test_a_shortened_name_fits_and_a_short_one_stays(name: str, width: int) -> None:
    short = shortened(name, width)
    assert len(short) <= width
    if len(name) <= width:
        assert short == name


@given(st.integers(0, 99), st.integers(10, 30))
def test_a_shortened_name_keeps_its_block_and_its_end(block: int, width: int) -> None:
    short = shortened(f"model.decoder.layers.{block}.self_attention.projection", width)
    assert short.startswith(f"…{block}")
    assert short.endswith("tion")


UNITS = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


@given(st.integers(0, 10**15))
def test_a_size_in_words_is_the_size_to_three_digits(size: int) -> None:
    number, unit = in_bytes(size).split()
    assert float(number) * UNITS[unit] == pytest.approx(size, rel=0.006)


@given(st.floats(1e-6, 1e5))
def test_a_time_in_words_is_the_time(seconds: float) -> None:
    number, unit = in_seconds(seconds).split()
    in_unit = {"µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}[unit]
    assert abs(float(number) * in_unit - seconds) <= max(0.006 * seconds, 0.51 * in_unit * (unit in ("min", "h")))


@given(st.integers(0, 10**17))
def test_a_compact_count_is_short_and_close(number: int) -> None:
    text = compact(number)
    scale = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}.get(text[-1], 1)
    assert len(text) <= 5
    assert float(text.rstrip("kMGTP")) * scale == pytest.approx(number, rel=0.006)


def test_worse_is_a_minus_for_accuracy_and_a_plus_for_perplexity() -> None:
    assert change_words("accuracy", 0.0125) == "-1.25 points"
    assert change_words("accuracy", 0.0) == "+0.00 points"
    assert change_words("perplexity", 0.5) == "+0.5"
    assert percent(1, 0) == "-"


def test_a_recipe_in_words_says_what_is_known_and_nothing_else() -> None:
    assert recipe_words(TrainingRecipe()) == "unknown"
    recipe = TrainingRecipe(optimizer="sgd", nesterov=True, momentum=0.9, weight_decay=5e-4, epochs=3)
    assert recipe_words(recipe) == "SGD, Nesterov momentum 0.9, weight decay 0.0005, 3 epochs"
    recipe = TrainingRecipe(
        learning_rate=0.1, batch_size=4, sources={"learning_rate": "flag --lr", "batch_size": "README.md"}
    )
    assert recipe_sources(recipe) == "--lr, README.md"


def test_every_kind_of_budget_has_words() -> None:
    assert "0.6" in budget_words(Budget("keep", 0.6))
    assert "40 MB" in budget_words(Budget("max-size", 40e6))
    assert "0.05" in budget_words(Budget("tolerance", 0.05))
    assert "window rule" in budget_words(Budget("window-rule"))
    assert "plan" in budget_words(Budget("plan"))
