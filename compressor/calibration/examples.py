"""Calibration data in two parts: fit examples, for statistics and factors, and holdout examples, to choose by.

Every fourth example is holdout, so that nothing is chosen by the examples it was fit to.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from itertools import pairwise
from typing import Any, Literal

from torch import nn

from compressor.calibration.settings import CALIBRATION, CalibrationSettings
from compressor.data import Batch, EvaluationData, Preprocessing, Sample, open_data
from compressor.errors import BadInput

Part = Literal["fit", "holdout"]
PARTS: tuple[Part, ...] = ("fit", "holdout")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chunk:
    """Some examples of one batch: all of them, or some rows."""

    part: Part
    batch: int
    rows: slice | None = None


@dataclass(frozen=True)
class Slice:
    """Neighboring fit batches whose sums are formed by themselves, and those of them that are run backward."""

    number: int
    chunks: Sequence[Chunk]
    backward: Sequence[Chunk]


@dataclass(frozen=True)
class CalibrationData:
    """Batches to fit to and holdout batches to choose by; `labeled` where all examples have classes to predict.

    `unused` says which examples were not used, empty if all were, and `made` what they are where the model made them
    itself.
    """

    fit: tuple[Batch, ...]
    holdout: tuple[Batch, ...]
    labeled: bool
    unused: str = ""
    made: str = ""

    @property
    def examples(self) -> int:
        """Number of fit examples."""
        return sum(batch.examples for batch in self.fit)

    @property
    def tokens(self) -> int:
        """Number of tokens of the fit examples, with padding; 0 of what is no text."""
        return sum(batch.inputs["input_ids"].numel() for batch in self.fit if "input_ids" in batch.inputs)

    @property
    def holdout_examples(self) -> int:
        return sum(batch.examples for batch in self.holdout)

    def chunks(self, *parts: Part) -> list[Chunk]:
        """Every batch of some parts, whole."""
        return [Chunk(part, batch) for part in parts for batch in range(len(self._batches(part)))]

    def slices(self, most: int, *, backward_every: int, every: int = 1) -> tuple[Slice, ...]:
        """The fit batches, or every how manyth, in `most` slices, or as many as there are batches.

        Of all fit batches every how manyth is run backward, or of those in the slices as many as come nearest to it.
        """
        chunks = self.chunks("fit")[::every]
        backward, count = set(chunks[:: math.ceil(backward_every / every)]), min(most, len(chunks))
        ends = [number * len(chunks) // count for number in range(count + 1)]
        cut = (chunks[start:end] for start, end in pairwise(ends))
        return tuple(
            Slice(number, each, [chunk for chunk in each if chunk in backward]) for number, each in enumerate(cut)
        )

    def bare(self) -> CalibrationData:
        """The same for another process."""
        return replace(
            self, fit=tuple(each.bare() for each in self.fit), holdout=tuple(each.bare() for each in self.holdout)
        )

    def read(self, chunk: Chunk) -> Batch:
        """The examples of a chunk."""
        batch = self._batches(chunk.part)[chunk.batch]
        return batch if chunk.rows is None else batch[chunk.rows]

    def _batches(self, part: Part) -> tuple[Batch, ...]:
        return self.fit if part == "fit" else self.holdout


def with_decoder_inputs(data: CalibrationData, model: nn.Module) -> CalibrationData:
    """The data with labels as an input, for an encoder-decoder that makes its decoder's inputs from them.

    Data for any other model, and batches that have decoder inputs, are returned as they are.
    """

    def taught(batch: Batch) -> Batch:
        if "decoder_input_ids" in batch.inputs or batch.labels.dim() != 2:
            return batch
        return replace(batch, inputs={**batch.inputs, "labels": batch.labels})

    takes_labels = "labels" in signature(model.forward).parameters
    if not takes_labels or not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return data
    return replace(data, fit=tuple(map(taught, data.fit)), holdout=tuple(map(taught, data.holdout)))


def split_examples(data: EvaluationData, settings: CalibrationSettings = CALIBRATION) -> CalibrationData:
    """Split data into fit and holdout: every fourth example is holdout, or every fourth batch of data in batches, where
    the settings do not say otherwise.

    Raises `BadInput` for data of fewer than two examples.
    """
    split = _split_batches(data, settings) if len(data.batches) > 1 else _split_examples(data, settings)
    used = f"{split.examples:,} examples to fit and {split.holdout_examples:,} to choose by"
    logger.info("calibration uses %s; not used: %s", used, split.unused or "nothing")
    return split


def _split_examples(data: EvaluationData, settings: CalibrationSettings) -> CalibrationData:
    if data.count < 2:
        one = "one batch" if data.batches else "one example"
        raise BadInput(f"calibration needs two examples at least, and has {one}", where=data.name, remedy="give more")
    every = min(settings.holdout_every, data.count)
    chosen = range(every - 1, data.count, every)
    rest = sorted(set(range(data.count)) - set(chosen))
    # Examples are often in the order of their classes, and those of a batch that is run backward must be of all.
    some = settings.on(len(rest) * _length(data)).gradient_every > 1
    fit = tuple(_in_batches(data, rest, settings.tokens_at_once, apart=some))
    holdout = tuple(_in_batches(data, chosen, settings.tokens_at_once))
    return CalibrationData(fit, holdout, _labeled((*fit, *holdout)), data.unused)


def _split_batches(data: EvaluationData, settings: CalibrationSettings) -> CalibrationData:
    every = min(settings.holdout_every, len(data.batches))
    fit = tuple(batch for index, batch in enumerate(data.batches) if index % every != every - 1)
    return CalibrationData(fit, data.batches[every - 1 :: every], _labeled(data.batches), data.unused)


def _labeled(batches: Sequence[Batch]) -> bool:
    return all(batch.labels.numel() > 0 for batch in batches)


def _length(data: EvaluationData) -> int:
    """Tokens of an example; 0 of what is no text."""
    return data.read([0]).inputs["input_ids"].shape[1] if data.task == "language-modeling" else 0


def _in_batches(
    data: EvaluationData, positions: Sequence[int], tokens_at_once: int, *, apart: bool = False
) -> Iterator[Batch]:
    """Examples at some positions in batches, each of neighbors, or of such that lie as far `apart` as they may."""
    size = data.batch_size
    if data.task == "language-modeling" and positions:
        size = max(1, min(size, tokens_at_once // _length(data)))
    count = -(-len(positions) // size)
    for batch in range(count):
        yield data.read(positions[batch::count] if apart else positions[batch * size : (batch + 1) * size])


def open_calibration_data(
    calibration: Any,
    preprocessing: Preprocessing,
    *,
    samples: int | None,
    sequence_length: int | None,
    settings: CalibrationSettings = CALIBRATION,
) -> EvaluationData:
    """Open at most `samples` examples; of built-in data those of the training split.

    By default all batches of data in batches are used, and 128 examples of other data. Texts are cut into windows of
    `sequence_length` tokens, by default the model's own length.
    """
    preprocessing = replace(preprocessing, sequence_length=sequence_length or preprocessing.sequence_length)
    # One window to fit and one holdout window.
    sample = Sample("train", samples, settings.samples, least_windows=2, option="calibration")
    data = open_data(calibration, preprocessing, sample)
    if sequence_length is not None and data.batches:
        raise BadInput(
            "calibration_sequence_length cuts texts, and none were given for calibration",
            option="calibration_sequence_length",
            remedy="leave it out, or give batches of that length",
        )
    return data
