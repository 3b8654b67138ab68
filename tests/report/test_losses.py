"""What int8 and int4 of the same model lose, in the words and the points of a report."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from compressor import Compression, compress
from compressor.evaluation import UniformQuantization
from compressor.report import compression_page
from compressor.report.losses import curve_points
from compressor.report.wording import uniform_words


def compression() -> Compression:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
    return compress(network, keep=0.7, prefer="size", bits=16)


def test_int8_and_int4_are_points_of_the_curve() -> None:
    found = compression()
    points = {point.label: point for point in curve_points(found)}
    for each in found.uniform:
        point = points[f"{each.name} of all layers, round to nearest"]
        assert (point.parameters, point.loss) == (each.parameters, each.error)
    calibrated = [UniformQuantization(4, "GPTQ", 10, 20, holdout_loss=0.1)]
    assert len(curve_points(replace(found, uniform=tuple(calibrated)))) == len(points) - 2  # in another unit


def test_one_line_says_what_they_take_and_one_which_is_better() -> None:
    found = compression()
    words = uniform_words(found)
    assert words is not None
    assert words.startswith("int8 (round to nearest) takes ")
    assert "; int4 (round to nearest) takes " in words
    assert uniform_words(replace(found, uniform=())) is None
    text = " ".join(compression_page(found).text().split())
    assert words in text
    assert found.better_uniform is not None
    assert str(found.better_uniform) in text
    assert "ask for it with `bits=4`" in text
    assert "beside" not in compression_page(replace(found, uniform=())).text()


def test_the_best_of_a_width_is_the_one_that_is_named() -> None:
    nearest = UniformQuantization(4, "round to nearest", 10, 2000, holdout_loss=0.3)
    by_gptq = replace(nearest, method="GPTQ", holdout_loss=0.1)
    words = uniform_words(replace(compression(), uniform=(nearest, by_gptq)))
    assert words == "int4 (GPTQ) takes 2 kB and loses 0.1 on the holdout"
