"""llm-compressor: GPTQ and AWQ with its presets W8A16 and W4A16, as its examples run them, and at fewer bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from measuring import run
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

QUANTIZED = {"targets": ["Linear"], "ignore": ["lm_head"]}


def gptq(scheme: str) -> list[Any]:
    return [GPTQModifier(scheme=scheme, **QUANTIZED)]


def awq(scheme: str) -> list[Any]:
    return [AWQModifier(duo_scaling="both"), QuantizationModifier(scheme=scheme, **QUANTIZED)]


def quantized(
    folder: Path, windows: Tensor, output: Path, *, recipe: Callable[[str], list[Any]], scheme: str
) -> Callable[[], nn.Module]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    examples = Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()})
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=examples,
        recipe=recipe(scheme),
        max_seq_length=windows.shape[1],
        num_calibration_samples=len(windows),
        shuffle_calibration_samples=False,
        output_dir=str(output),
    )
    return lambda: AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)


METHODS = {
    f"{name} {scheme}": partial(quantized, recipe=recipe, scheme=scheme)
    for name, recipe, schemes in (
        ("GPTQ", gptq, ("W8A16", "W6A16", "W4A16", "W3A16", "W2A16")),
        ("AWQ", awq, ("W8A16", "W4A16", "W4A16_ASYM", "W3A16")),
    )
    for scheme in schemes
}

# 0.14.0.1 pins the memory of what AWQ keeps, which PyTorch refuses where there is no accelerator to copy it to.
if not torch.accelerator.is_available():
    IntermediatesCache.pin_memory = lambda *_, **__: None

if __name__ == "__main__":
    run(METHODS, ("llmcompressor", "compressed-tensors"))
