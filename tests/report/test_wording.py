"""Numbers and names in words."""

from __future__ import annotations

import math
import re
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.evaluation import Cost, Evaluation
from compressor.planning import Budget
from compressor.recipe import TrainingRecipe
from compressor.report.wording import (
    budget_words,
    change_words,
    compact,
    error_words,
    format_size,
    in_seconds,
    large_loss_words,
    one_line,
    percent,
    recipe_sources,
    recipe_words,
    shortened,
    shortened_apart,
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


layer_names = st.lists(
    st.lists(st.sampled_from(["layers", "layer", "0", "1", "27", "convolution", "attention"]), min_size=1, max_size=8),
    max_size=40,
).map(lambda parts: list(dict.fromkeys(".".join(part) for part in parts)))


@given(layer_names | st.lists(st.text(alphabet="a.0…~1", max_size=25), max_size=40, unique=True), st.integers(8, 40))
def test_different_names_stay_different_when_shortened(names: list[str], width: int) -> None:
    short = shortened_apart(names, width)
    assert len(set(short)) == len(names)
    assert all(len(text) <= width for text in short)
    assert all(text == name for text, name in zip(short, names, strict=True) if len(name) <= width)


@given(st.integers(19, 40))
def test_blocks_are_told_apart_by_their_numbers(width: int) -> None:
    names = [
        f"resnet.encoder.stages.{i}.layers.{j}.layer.{k}.convolution" for i in (0, 1) for j in (0, 1) for k in (0, 1)
    ]
    for name, text in zip(names, shortened_apart(names, width), strict=True):
        assert text.endswith("convolution")
        assert re.findall(r"\d", name)[-len(re.findall(r"\d", text)) :] == re.findall(r"\d", text)


@given(st.floats(0, 2), st.integers(1, 6))
def test_only_an_error_that_is_zero_looks_like_zero(error: float, decimals: int) -> None:
    words = error_words(error, decimals)
    assert (words == "0") == (error == 0)
    if words.startswith("<"):
        assert 0 < error < float(words[1:])
    else:
        assert float(words) == pytest.approx(error, abs=0.51 * 10.0**-decimals)
        assert (float(words) == 0) == (error == 0)


def evaluation(metric: Literal["accuracy", "perplexity"], baseline: float | None, compressed: float) -> Evaluation:
    cost = Cost(1, 4, 1, 4)
    worse = None if baseline is None else compressed - baseline if metric == "perplexity" else baseline - compressed
    task = "language-modeling" if metric == "perplexity" else "image-classification"
    return Evaluation(metric, baseline, compressed, worse, None, 1.0, 10, "data", task, "cpu", None, cost, ())


@pytest.mark.parametrize(
    ("measured", "large"),
    [
        (evaluation("accuracy", 0.9, 0.84), True),
        (evaluation("accuracy", 0.9, 0.86), False),
        (evaluation("accuracy", 0.9, 0.95), False),
        (evaluation("perplexity", 4.0, 8.1), True),
        (evaluation("perplexity", 4.0, 7.9), False),
        (evaluation("perplexity", 4.0, math.inf), True),
        (evaluation("perplexity", 4.0, math.nan), True),
        (evaluation("accuracy", None, 0.1), False),
    ],
)
def test_a_large_loss_is_called_so_with_what_is_left_to_try(measured: Evaluation, large: bool) -> None:
    words = large_loss_words(measured, calibrated=False)
    assert words == ("this is a large loss: keep more, or pass --calibration" if large else None)
    words = large_loss_words(measured, calibrated=True)
    assert words == ("this is a large loss: keep more" if large else None)


UNITS = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


@given(st.integers(0, 10**15))
def test_a_size_in_words_is_the_size_to_three_digits(size: int) -> None:
    number, unit = format_size(size).split()
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
