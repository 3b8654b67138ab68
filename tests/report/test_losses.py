"""What int8 and int4 of the same model lose, in the words and the points of a report."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from compressor import Compression, compress
from compressor.evaluation import UniformQuantization
from compressor.evaluation.cost import Latency, TimedWorkload
from compressor.formatting import format_size
from compressor.planning import Budget
from compressor.report import compression_page
from compressor.report.losses import curve_points
from compressor.report.wording import faster_words, needs_calibration, uniform_words


def compression(*, measured: bool = False) -> Compression:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
    inputs = torch.randn(40, 64)
    data = (inputs, network(inputs).argmax(1)) if measured else None
    return compress(network, keep=0.7, prefer="size", bits=16, data=data)


def test_int8_and_int4_are_points_of_the_curve() -> None:
    found = compression()
    points = {point.label: point for point in curve_points(found)}
    for each in found.uniform:
        point = points[f"{each.name} of all layers, round to nearest"]
        assert (point.bytes, point.loss, point.measured) == (each.bytes, each.error, True)
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


def test_what_this_model_loses_stands_beside_by_the_same_measure() -> None:
    found = compression(measured=True)
    assert found.evaluation is not None
    int4 = UniformQuantization(4, "GPTQ", 10, 2000, holdout_loss=0.1, loss=0.7)
    evaluation = replace(found.evaluation, baseline_loss=1.0, compressed_loss=0.75)
    words = uniform_words(replace(found, uniform=(int4,), evaluation=evaluation))
    size = format_size(found.bytes.after)
    assert words == (
        f"int4 (GPTQ) takes 2 kB and gains 0.3 nats per prediction on the data; this model takes {size} and gains 0.25"
    )
    errors = replace(int4, holdout_loss=None, loss=None, error=0.2)
    words = uniform_words(replace(found, uniform=(errors,), evaluation=None))
    assert (
        words
        == f"int4 (GPTQ) takes 2 kB at a relative error of 0.2; this model takes {size} at {found.losses.error:.3g}"
    )


def test_every_layer_in_8_bits_needs_no_calibration() -> None:
    assert needs_calibration(Budget("bits", 4), has_attention=True)
    assert not needs_calibration(Budget("bits", 8), has_attention=True)
    assert not needs_calibration(Budget("bits", 4), has_attention=False)


def test_who_asked_for_bits_and_got_a_slower_model_is_told_how_to_ask_for_speed() -> None:
    torch.manual_seed(0)
    network, inputs = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)), torch.randn(40, 64)
    found = compress(network, bits=4, data=(inputs, network(inputs).argmax(1)))
    assert found.evaluation is not None

    def timed(ratio: float) -> Compression:
        return replace(found, evaluation=replace(found.evaluation, latency=(Latency(1, 1.0, ratio, ratio, 3),)))

    assert "`prefer='speed'` takes only what is faster" in (faster_words(timed(1.5)) or "")
    assert "takes only what is faster" in " ".join(compression_page(timed(1.5)).text().split())
    assert faster_words(timed(0.9)) is None
    assert faster_words(replace(timed(1.5), latency=(TimedWorkload("batch 1", Latency(1, 1.0, 1.5, 1.5, 3)),))) is None
