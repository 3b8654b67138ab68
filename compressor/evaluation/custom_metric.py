"""The caller's own metric on some data, and what it varies by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.data import Batch, CustomMetric, EvaluationData, placed
from compressor.errors import BadInput, CompressorError, first_line
from compressor.freed_memory import freed_memory
from compressor.model import dtype_of
from compressor.torch_state import called_as_by_the_caller

# How many parts of the data a metric is measured without, in turn.
PARTS = 10


@dataclass(frozen=True)
class LoaderBatches:
    """The batches of some data as a metric is given them, on the model's device; to be iterated over any number of
    times.

    They are what the caller's loader makes. Of other data they are what a loader would make: for a transformers model a
    mapping with `labels` among the inputs, so that `model(**batch)` has a loss; for any other module a pair of inputs
    and labels, or the inputs alone where there are no labels, in the model's dtype.
    """

    model: nn.Module
    data: EvaluationData

    @property
    def device(self) -> torch.device | None:
        weight = next(chain(self.model.parameters(), self.model.buffers()), None)
        return None if weight is None else weight.device

    def __iter__(self) -> Iterator[Any]:
        for batch in self.data:
            freed_memory().give_back()
            given = self._made(batch) if batch.given is None else batch.given
            yield given if self.device is None else placed(given, self.device)

    def __len__(self) -> int:
        return len(self.data.batches) or -(-self.data.count // self.data.batch_size)

    def _made(self, batch: Batch) -> Any:
        dtype = dtype_of(self.model)
        inputs = {name: each.to(dtype) if each.is_floating_point() else each for name, each in batch.inputs.items()}
        labels = batch.labels
        if hasattr(self.model, "main_input_name"):
            if self.data.task == "language-modeling":  # the model shifts them by itself
                labels = torch.cat([inputs["input_ids"][:, :1], labels], 1)
            return {**inputs, **({"labels": labels} if labels.numel() else {})}
        alone = next(iter(inputs.values())) if len(inputs) == 1 else inputs
        return (alone, labels) if labels.numel() else alone


def without_each_part(data: EvaluationData) -> Iterator[EvaluationData]:
    """The data without each of its parts, which are drawn at random: neighbors are often alike."""
    parts = min(PARTS, data.count)
    order = torch.randperm(data.count, generator=torch.Generator().manual_seed(0)).tolist()
    for part in range(parts) if parts > 1 else ():
        left_out = set(order[part::parts])
        yield data.at([place for place in range(data.count) if place not in left_out], data.name)


def metric_value(metric: CustomMetric, model: nn.Module, data: EvaluationData) -> float:
    """What a metric returns for a model, as a number."""
    batches = LoaderBatches(model, data)
    call = called_as_by_the_caller(partial(metric.function, model, batches), batches.device)
    try:
        returned: Any = call()
    except (CompressorError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the caller's code may raise anything
        raise BadInput(
            f"the metric {metric.name} raised {type(error).__name__}: {first_line(error)}",
            where=data.name,
            option="metric",
            remedy="mend it; it is called with the model and an iterable of batches",
        ) from error
    number = returned
    if (isinstance(returned, Tensor) and returned.numel() == 1) or isinstance(returned, np.generic):
        number = returned.item()
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise BadInput(
            f"the metric {metric.name} returned a {type(returned).__name__}",
            where=data.name,
            option="metric",
            remedy="return one number",
        )
    return float(number)
