"""Numbers and names in words."""

from __future__ import annotations

import math
import re
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.evaluation import Cost, Evaluation
from compressor.planning import Budget, CalibrationResult, Plan
from compressor.recipe import TrainingRecipe
from compressor.report.wording import (
    budget_words,
    change_words,
    error_words,
    large_holdout_loss_words,
    large_loss_words,
    recipe_sources,
    recipe_words,
    shortened,
    shortened_apart,
)


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


def planned(holdout_loss: float | None, *, device: str | None = None) -> Plan:
    """A plan by calibration with a loss on the holdout, or without calibration."""
    result = None if holdout_loss is None else CalibrationResult(96, 32, 0.0, 0.1, holdout_loss)
    return Plan("model", None, Budget("keep", 0.5), (), calibration=result, device=device)


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
    words = large_loss_words(measured)
    assert words == large_loss_words(measured, planned(None))
    assert words == ("this is a large loss: keep more, or pass `calibration`" if large else None)
    words = large_loss_words(measured, planned(0.1))
    assert words == ("this is a large loss: keep more" if large else None)
    words = large_loss_words(measured, planned(0.1, device="cpu"))
    by_size = "this is a large loss: keep more, or ask for its size alone with `prefer='size'`"
    assert words == (by_size if large else None)


@pytest.mark.parametrize(("loss", "large"), [(0.6, False), (0.8, True), (math.nan, True)])
def test_a_large_loss_on_the_holdout_is_called_so(loss: float, large: bool) -> None:
    words = large_holdout_loss_words(planned(loss))
    assert words == ("the holdout shows a large loss: keep more" if large else None)
    words = large_holdout_loss_words(planned(loss, device="cpu"))
    assert (words is not None and words.endswith("with `prefer='size'`")) == large
    assert large_holdout_loss_words(planned(None)) is None


def test_worse_is_a_minus_for_accuracy_and_a_plus_for_perplexity() -> None:
    assert change_words("accuracy", 0.0125) == "-1.25 points"
    assert change_words("accuracy", 0.0) == "+0.00 points"
    assert change_words("perplexity", 0.5) == "+0.5"


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
