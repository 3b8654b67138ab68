"""Texts that a language model writes from pieces of the fit examples on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compressor.calibration import CalibrationSettings
from compressor.calibration.more_texts import texts_to_write, written_texts
from compressor.calibration.settings import EndToEndSettings, SelfGeneratedSettings
from tests.calibration.tiny_models import calibrated, inputs_for, transformer

SETTINGS = CalibrationSettings(tokens_at_once=32, end_to_end=EndToEndSettings(texts=2, prompts=2))


def windows(texts: Tensor, length: int) -> set[tuple[int, ...]]:
    return {tuple(each.tolist()) for row in texts for each in row.unfold(0, length, 1)}


def test_texts_go_on_from_pieces_of_the_examples() -> None:
    torch.manual_seed(0)
    given = inputs_for("llama", 4)
    calibration = calibrated(transformer("llama").eval(), [given], settings=SETTINGS)
    batches = written_texts(calibration)
    assert [batch.examples for batch in batches] == [4, 4]
    texts = torch.cat([batch.inputs["input_ids"] for batch in batches])
    assert texts.shape[1] == given["input_ids"].shape[1]
    assert all(torch.equal(batch.labels, batch.inputs["input_ids"][:, 1:]) for batch in batches)
    half = texts.shape[1] // 2
    assert windows(texts[:, :half], half) <= windows(given["input_ids"], half)
    again = torch.cat([batch.inputs["input_ids"] for batch in written_texts(calibration)])
    assert torch.equal(texts, again)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_other_models_write_none(name: str) -> None:
    torch.manual_seed(0)
    calibration = calibrated(transformer(name).eval(), [inputs_for(name, 4)], settings=SETTINGS)
    assert texts_to_write(calibration) == 0
    assert written_texts(calibration) == []


def test_no_texts_are_written_that_take_long() -> None:
    torch.manual_seed(0)
    calibration = calibrated(transformer("llama").eval(), [inputs_for("llama", 4)], settings=SETTINGS)
    weights = sum(each.numel() for each in calibration.model.parameters())
    each = 8 * weights

    def written(most: float) -> int:
        own = replace(SETTINGS, self_generated=SelfGeneratedSettings(most_multiplications=most))
        return texts_to_write(replace(calibration, settings=own))

    assert [written(most) for most in (9 * each, 5.5 * each, 3.5 * each)] == [8, 5, 0]
