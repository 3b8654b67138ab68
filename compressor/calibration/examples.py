"""Calibration data as two parts: what the moments are estimated on, and what is held back to choose by.

Three examples of four give the moments; the fourth is held back, so that what is chosen by it was not fitted to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import BadInput
from compressor.evaluation import Batch, EvaluationData
from compressor.torch_state import caller_defaults

HELD_BACK = 4  # every fourth example

# Tokens of which the activations are in memory at a time: a long window makes a batch of few.
TOKENS_AT_ONCE = 8192


@dataclass(frozen=True)
class CalibrationData:
    """Batches for the moments and batches held back; `labelled` says whether examples come with classes to predict."""

    fitted: tuple[Batch, ...]
    held_back: tuple[Batch, ...]
    labelled: bool

    @property
    def examples(self) -> int:
        return sum(batch.examples for batch in self.fitted)

    @property
    def held_back_examples(self) -> int:
        return sum(batch.examples for batch in self.held_back)


def with_decoder_inputs(data: CalibrationData, model: nn.Module) -> CalibrationData:
    """The data as an encoder-decoder takes them: with labels, to shift by itself, where its decoder is given nothing.

    Data for any other model are returned as they are.
    """

    def taught(batch: Batch) -> Batch:
        if "decoder_input_ids" in batch.inputs or batch.labels.dim() != 2:
            return batch
        return replace(batch, inputs={**batch.inputs, "labels": batch.labels})

    takes_labels = "labels" in signature(model.forward).parameters
    if not takes_labels or not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return data
    fitted, held_back = (tuple(map(taught, batches)) for batches in (data.fitted, data.held_back))
    return replace(data, fitted=fitted, held_back=held_back)


def split_examples(data: EvaluationData | Iterable[Any], samples: int | None = None) -> CalibrationData:
    """Every fourth example, or batch of an iterable, is held back.

    Of an iterable no more batches are taken than it takes for `samples` examples; by default all.

    `data` is what `open_data` gives, or any iterable of batches: a tensor, a mapping of a model's inputs, or a pair of
    inputs and labels, as a `DataLoader` gives them. Raises `BadInput` for data that yields less than two examples or
    batches, or something that no model takes.
    """
    if isinstance(data, EvaluationData):
        if data.count < 2:
            raise BadInput("calibration needs two examples at least", where=data.name, remedy="give more data")
        every = min(HELD_BACK, data.count)
        held = list(range(every - 1, data.count, every))
        rest = [position for position in range(data.count) if position not in set(held)]
        return CalibrationData(tuple(_in_batches(data, rest)), tuple(_in_batches(data, held)), labelled=True)
    batches: list[Batch] = []
    with caller_defaults():
        for each in data:
            batches.append(_as_batch(each))
            if samples is not None and len(batches) > 1 and sum(batch.examples for batch in batches) >= samples:
                break
    if len(batches) < 2:
        raise BadInput(f"the calibration data yields {len(batches)} batches", remedy="give two at least")
    every = min(HELD_BACK, len(batches))
    return CalibrationData(
        tuple(batch for index, batch in enumerate(batches) if index % every != every - 1),
        tuple(batches[every - 1 :: every]),
        labelled=all(batch.labels.numel() > 0 for batch in batches),
    )


def _in_batches(data: EvaluationData, positions: list[int]) -> Iterator[Batch]:
    size = data.batch_size
    if data.task == "language-modeling" and positions:
        size = max(1, min(size, TOKENS_AT_ONCE // data.read(positions[:1]).inputs["input_ids"].shape[1]))
    for start in range(0, len(positions), size):
        yield data.read(positions[start : start + size])


def _as_batch(given: Any) -> Batch:
    pair = isinstance(given, list | tuple) and len(given) > 0
    inputs = given[0] if pair else given
    labels = given[1] if pair and len(given) > 1 else None
    if isinstance(inputs, Tensor):
        inputs = {"inputs": inputs}
    if not isinstance(inputs, Mapping) or not inputs or not all(isinstance(each, Tensor) for each in inputs.values()):
        raise BadInput(
            f"the calibration data yields {type(given).__name__}", remedy="yield tensors, pairs, or mappings of tensors"
        )
    if any(each.is_meta for each in inputs.values()):
        raise BadInput(
            "the calibration data yields tensors on the meta device, which have no values",
            remedy="make them on the CPU: torch.set_default_device or torch.device was in force",
        )
    labels = inputs.get("labels", labels)
    # Nothing can be differentiated through what was made under `torch.inference_mode`.
    inputs = {
        name: tensor.clone() if tensor.is_inference() else tensor.detach()
        for name, tensor in inputs.items()
        if name != "labels"
    }
    if not inputs or any(tensor.numel() == 0 for tensor in inputs.values()):
        raise BadInput("the calibration data yields an empty batch", remedy="leave it out")
    classes = isinstance(labels, Tensor) and not labels.is_floating_point() and not labels.is_complex()
    return Batch(
        inputs,
        labels if isinstance(labels, Tensor) and classes else torch.empty(0, device="cpu"),
    )
