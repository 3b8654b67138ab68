"""Tokenizers and image processors that are given as objects prepare data for a loaded module as a folder's own do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

import compressor
from compressor.errors import BadInput
from tests.conftest import ALPHABET


class Processor:
    """A processor of several kinds of inputs, as transformers has them."""

    image_processor = None

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def __call__(self, **_: Any) -> Any:
        raise AssertionError("its tokenizer is called")


# No time is looked at.
BRIEF = compressor.TimingSettings(most_repeats=7)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("".join(np.random.default_rng(0).choice(list(ALPHABET), 2000)))
    return path


def outcome(model: Any, data: Any, **options: Any) -> tuple[float, ...]:
    """What is measured on some data, and what is expected of a model that was calibrated on it."""
    plan = compressor.plan(
        model, keep=0.5, calibration=data, calibration_samples=8, effort="balanced", prefer="size", bits=16, **options
    )
    measured = compressor.evaluate(model, data=data, data_samples=4, timing_settings=BRIEF, **options)
    assert plan.calibration is not None
    assert measured.compressed_loss is not None
    return measured.compressed_loss, measured.count, plan.calibration.holdout_loss


@pytest.mark.slow
def test_a_loaded_module_with_a_tokenizer_is_measured_and_calibrated_as_its_folder(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Path, *, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    found, expected = outcome(llama, corpus, tokenizer=tokenizer), outcome(folder, corpus)
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_a_list_of_texts_and_a_file_with_them_are_the_same_data(
    llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Path
) -> None:
    given = outcome(llama, [corpus.read_text()], processor=Processor(tokenizer))
    assert given == outcome(llama, corpus, tokenizer=tokenizer)


@pytest.mark.slow
def test_an_image_processor_prepares_images_for_a_module(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=3, num_labels=2))
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 9, 3), dtype=np.uint8)
    for number, each in enumerate(pixels):
        path = tmp_path / "images" / str(number % 2) / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(each).save(path)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    found = compressor.evaluate(model, data=tmp_path / "images", processor=processor, timing_settings=BRIEF)
    expected = compressor.evaluate(tmp_path / "model", data=tmp_path / "images", timing_settings=BRIEF)
    assert (found.compressed, found.compressed_loss) == (expected.compressed, expected.compressed_loss)
    with pytest.raises(BadInput, match="ViTForImageClassification does not accept this data"):
        compressor.evaluate(model, data=tmp_path / "images")


def test_what_cannot_be_called_is_no_tokenizer(llama: LlamaForCausalLM, corpus: Path) -> None:
    with pytest.raises(BadInput, match=r"`tokenizer` is of type str, which cannot be called; .*`tokenizer\(text\)`"):
        compressor.evaluate(llama, data=corpus, tokenizer="gpt2")
    with pytest.raises(BadInput, match=r"needs the model's tokenizer, and there is none; .* in Python a `tokenizer`"):
        compressor.evaluate(llama, data=corpus)
