"""Calibration data as two parts: what the moments are estimated on, and a holdout to choose by.

Three examples of four give the moments; the fourth is the holdout, so that what is chosen by it was not fitted to it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from inspect import signature

from torch import nn

from compressor.data import Batch, EvaluationData
from compressor.errors import BadInput

HOLDOUT = 4  # every fourth example

# Tokens of which the activations are in memory at a time: a long window makes a batch of few.
TOKENS_AT_ONCE = 8192
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


def split_examples(data: EvaluationData) -> CalibrationData:
    """Every fourth example is the holdout, or every fourth batch of data that came in batches.

    Raises `BadInput` for data of less than two examples.
    """
    split = _split_batches(data) if len(data.batches) > 1 else _split_examples(data)
    used = f"{split.examples:,} examples to fit and {split.holdout_examples:,} to choose by"
    logger.info("calibration uses %s; not used: %s", used, split.unused or "nothing")
    return split


def _split_examples(data: EvaluationData) -> CalibrationData:
    if data.count < 2:
        one = "one batch" if data.batches else "one example"
        raise BadInput(f"calibration needs two examples at least, and has {one}", where=data.name, remedy="give more")
    every = min(HOLDOUT, data.count)
    last = list(range(every - 1, data.count, every))
    rest = sorted(set(range(data.count)) - set(last))
    fit, holdout = tuple(_in_batches(data, rest)), tuple(_in_batches(data, last))
    return CalibrationData(fit, holdout, _labeled((*fit, *holdout)), data.unused)


def _split_batches(data: EvaluationData) -> CalibrationData:
    every = min(HOLDOUT, len(data.batches))
    fit = tuple(batch for index, batch in enumerate(data.batches) if index % every != every - 1)
    return CalibrationData(fit, data.batches[every - 1 :: every], _labeled(data.batches), data.unused)


def _labeled(batches: Sequence[Batch]) -> bool:
    return all(batch.labels.numel() > 0 for batch in batches)


def _in_batches(data: EvaluationData, positions: list[int]) -> Iterator[Batch]:
    size = data.batch_size
    if data.task == "language-modeling" and positions:
        size = max(1, min(size, TOKENS_AT_ONCE // data.read(positions[:1]).inputs["input_ids"].shape[1]))
    for start in range(0, len(positions), size):
        yield data.read(positions[start : start + size])
