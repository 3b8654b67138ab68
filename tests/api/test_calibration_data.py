"""Which models are calibrated on examples of their own unasked, and when not."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from compressor import BadInput, CalibrationSettings, compress, plan
from compressor.calibration.self_generated import SelfRequest, examples_by_default
from compressor.calibration.settings import SelfGeneratedSettings
from compressor.model import open_model
from tests.lowrank.architectures import ARCHITECTURES

QUICK = replace(
    CalibrationSettings.of("fast"), self_generated=SelfGeneratedSettings(samples=8, length=8, image_steps=2)
)
CPU = torch.device("cpu")


def llama() -> nn.Module:
    return ARCHITECTURES["llama"].dense()


def images() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24))


def calibrated(module: nn.Module, **asked: Any) -> str | None:
    """What the examples were that a plan was calibrated on; None for none."""
    if asked.get("calibration") != "none":
        asked["calibration_settings"] = QUICK
    result = plan(module, prefer="size", **{"bits": 16, **asked}).calibration
    return None if result is None else result.made


@pytest.mark.parametrize("asked", [{"keep": 0.7, "bits": None}, {"max_size": 200_000}])
def test_a_language_model_of_which_a_size_is_asked_is_calibrated_on_its_own_text(asked: dict[str, Any]) -> None:
    assert calibrated(llama(), **asked) == "texts that the model wrote itself"


def test_an_image_model_is_calibrated_on_matched_noise() -> None:
    made = calibrated(images(), keep=0.7)
    assert made is not None
    assert "matched to the statistics of the batch normalizations" in made


def test_without_a_size_or_with_none_there_is_no_calibration(caplog: pytest.LogCaptureFixture) -> None:
    assert plan(llama(), tolerance=0.5, prefer="size").calibration is None
    assert calibrated(llama(), keep=0.7, calibration="none") is None
    assert "compressed by its weights alone it may lose most" in caplog.text


def test_a_language_model_calibrated_on_its_own_text_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert calibrated(llama(), keep=0.7) is not None
    assert "may lose most of what it knows" not in caplog.text
    assert "calibration on 8 texts that the model wrote itself" in caplog.text


@pytest.mark.parametrize("name", ["effort", "seed", "calibration_samples"])
def test_what_is_asked_of_calibration_is_refused_where_there_is_none(name: str) -> None:
    asked: dict[str, Any] = {name: "fast" if name == "effort" else 3}
    with pytest.raises(BadInput, match=f"`{name}` is about calibration data, and none were given"):
        compress(perceptron(), keep=0.5, prefer="size", **asked)
    with pytest.raises(BadInput, match=f"`{name}` is about calibration data, and none were given"):
        compress(llama(), tolerance=0.5, prefer="size", **asked)


def count(module: nn.Module, **settings: Any) -> int | None:
    model = open_model(module)
    request = SelfRequest(100, None, model.preprocessing, SelfGeneratedSettings(**settings))
    return examples_by_default(model, request, device=CPU)


def test_a_model_makes_as_many_examples_as_are_soon_worked_through_or_none() -> None:
    # A forward on a text of ten tokens takes as many multiplications as ten times the parameters.
    each = 10 * sum(parameter.numel() for parameter in llama().parameters())
    assert count(llama(), length=10) == 100
    assert count(llama(), length=10, most_multiplications=50 * each) == 50
    assert count(llama(), length=10, most_multiplications=24 * each) == 24
    assert count(llama(), length=10, most_multiplications=24 * each - 1) is None
    # (16 * 27) kernels at 30 x 30 places, and 16 * 144 at 28 x 28
    one = 16 * 27 * 30 * 30 + 16 * 144 * 28 * 28
    assert count(images(), most_multiplications=30 * one) == 30


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_other_models_of_transformers_and_plain_modules_make_none(name: str) -> None:
    assert count(ARCHITECTURES[name].dense()) is None
    assert count(perceptron()) is None
    assert count(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1))) is None  # whose normalization is not known
    assert count(ARCHITECTURES["vit"].dense()) == 100


def test_a_model_that_cannot_be_calibrated_on_its_own_examples_is_compressed_without(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = images()
    broken[1].bias.data[0] = torch.nan  # type: ignore[union-attr,operator,index]
    without = plan(broken, keep=0.7, prefer="size", calibration_settings=QUICK)
    assert without.calibration is None
    assert without.quantized == 0
    assert "not calibrated on examples of its own" in caplog.text
    assert compress(broken, keep=0.7, prefer="size", calibration_settings=QUICK).bits == ()
    with pytest.raises(BadInput):
        compress(broken, keep=0.7, calibration="self", prefer="size", bits=16, calibration_settings=QUICK)
