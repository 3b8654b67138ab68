"""Calibration data as two parts: what the moments are estimated on, and a holdout to choose by.

Three examples of four give the moments; the fourth is the holdout, so that what is chosen by it was not fitted to it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from compressor.data import Batch, EvaluationData
from compressor.errors import BadInput
from compressor.torch_state import caller_defaults

HOLDOUT = 4  # every fourth example

# Tokens of which the activations are in memory at a time: a long window makes a batch of few.
TOKENS_AT_ONCE = 8192

# Examples that are read of an iterable that has no length, and may never end, before a limit is asked for.
MOST_WITHOUT_LENGTH = 4096

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibrationData:
    """Batches for the moments (`fit`) and to choose by (`holdout`).

    `labeled` says whether examples come with classes to predict. `unused` says what was given and not
    taken, empty if all was.
    """

    fit: tuple[Batch, ...]
    holdout: tuple[Batch, ...]
    labeled: bool
    unused: str = ""

    @property
    def examples(self) -> int:
        return sum(batch.examples for batch in self.fit)

    @property
    def holdout_examples(self) -> int:
        return sum(batch.examples for batch in self.holdout)


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
    fit, holdout = (tuple(map(taught, batches)) for batches in (data.fit, data.holdout))
    return replace(data, fit=fit, holdout=holdout)


def split_examples(data: EvaluationData | Iterable[Any], samples: int | None = None) -> CalibrationData:
    """Every fourth example, or batch of an iterable, is the holdout.

    An iterable is used whole, or up to `samples` examples. `data` is what `open_data` gives, or any iterable of
    batches: a tensor, a mapping of a model's inputs, or a pair of inputs and labels, as a `DataLoader` gives them.
    Raises `BadInput` for data that yields less than two examples or batches, or something that no model takes, and for
    an iterable that has no length and does not end.
    """
    split = _split_data(data) if isinstance(data, EvaluationData) else _split_iterable(data, samples)
    used = f"{split.examples:,} examples to fit and {split.holdout_examples:,} to choose by"
    logger.info("calibration uses %s; not used: %s", used, split.unused or "nothing")
    return split


def _split_data(data: EvaluationData) -> CalibrationData:
    if data.count < 2:
        raise BadInput("calibration needs two examples at least", where=data.name, remedy="give more data")
    every = min(HOLDOUT, data.count)
    last = list(range(every - 1, data.count, every))
    rest = sorted(set(range(data.count)) - set(last))
    fit, holdout = tuple(_in_batches(data, rest)), tuple(_in_batches(data, last))
    return CalibrationData(fit, holdout, _labeled((*fit, *holdout)), data.unused)


def _labeled(batches: Sequence[Batch]) -> bool:
    return all(batch.labels.numel() > 0 for batch in batches)


def _split_iterable(data: Iterable[Any], samples: int | None) -> CalibrationData:
    batches: list[Batch] = []
    taken, cut, follows = 0, 0, ""
    # One batch alone would leave nothing to choose by.
    most = None if samples is None else samples - max(1, samples // HOLDOUT)
    with caller_defaults():
        for each in data:
            if samples is not None and taken >= samples:
                follows = _what_follows(data, len(batches))
                break
            if samples is None and _length(data) is None and taken >= MOST_WITHOUT_LENGTH:
                raise BadInput(
                    f"the calibration data have no length, and go on after {taken:,} examples",
                    remedy="say how many to use with calibration_samples",
                )
            batch = _as_batch(each)
            room = batch.examples if samples is None or most is None else min(most, samples - taken)
            batches.append(batch[:room] if room < batch.examples else batch)
            taken += batches[-1].examples
            cut += batch.examples - batches[-1].examples
    if len(batches) < 2:
        number = "one batch" if batches else "0 batches"
        raise BadInput(f"the calibration data yields {number}", remedy="give two at least")
    every = min(HOLDOUT, len(batches))
    return CalibrationData(
        tuple(batch for index, batch in enumerate(batches) if index % every != every - 1),
        tuple(batches[every - 1 :: every]),
        _labeled(batches),
        ", and ".join(
            words for words in (f"{cut:,} examples of batches used in part" if cut else "", follows) if words
        ),
    )


def _what_follows(data: Iterable[Any], used: int) -> str:
    length = _length(data)
    return f"what follows {used:,} batches" if length is None else f"{length - used:,} of {length:,} batches"


def _length(data: Iterable[Any]) -> int | None:
    """The number of batches; None where it is not known, as of a `DataLoader` of a data set without a length."""
    try:
        return len(data) if isinstance(data, Sized) else None
    except TypeError:
        return None


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
