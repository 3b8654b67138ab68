"""What a little data says about a model before it is compressed: the metric of the loss, and a loss held back to choose
by.

Three examples of four give the moments; the fourth is held back, so that what is chosen by it was not fitted to it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compressor.checkpoint import Layer
from compressor.errors import BadInput
from compressor.evaluation import Batch, EvaluationData, logits_of, prepared
from compressor.factorize import Metric, TiedMetric, embedding_metric
from compressor.measure.moments import CalibrationPass, collect_moments, kept_predictions, shrunk
from compressor.measure.token_frequencies import EmbeddingCollector

logger = logging.getLogger(__name__)

HELD_BACK = 4  # every fourth example


@dataclass(frozen=True)
class Calibration:
    """The dense model, the metric and uses of its layers by name, and the batches that were held back.

    `dense_logits` are the dense model's on those batches. A layer that no example reached is in neither mapping.
    """

    model: nn.Module
    metrics: Mapping[str, Metric | TiedMetric]
    uses: Mapping[str, float]
    held_back: Sequence[Batch] = field(repr=False)
    dense_logits: Sequence[Tensor] = field(repr=False)
    examples: int

    @property
    def held_back_examples(self) -> int:
        return sum(_examples(batch) for batch in self.held_back)


def calibrate(
    model: nn.Module, layers: Sequence[Layer], data: EvaluationData | Iterable[Any], *, device: torch.device, seed: int
) -> Calibration:
    """Moments of the layers' inputs and gradients on three quarters of the data.

    `data` is what `open_data` gives, or any iterable of batches: a tensor, a mapping of a model's inputs, or a pair of
    inputs and labels, as a `DataLoader` gives them; labels are not used. Raises `BadInput` for data that yields less
    than two batches or examples, or that the model does not take.
    """
    fitted, held_back = _parts(data)
    modules = {layer.name: model.get_submodule(layer.module) for layer in layers if layer.kind != "embedding"}
    embeddings = {
        layer.name: (model.get_submodule(layer.module), model.get_submodule(layer.head) if layer.head else None)
        for layer in layers
        if layer.kind == "embedding"
    }
    collector = EmbeddingCollector(embeddings)
    with prepared(device, model), _frozen(model):
        masks = [batch.inputs.get("attention_mask") for batch in fitted]
        passes = (
            CalibrationPass(collector.watched(_run(model, batch), mask), mask)
            for batch, mask in zip(fitted, masks, strict=True)
        )
        with collector:
            moments = collect_moments(modules, passes, seed=seed)
        dense_logits = [logits_of(model, batch.inputs).cpu() for batch in held_back]
    # A layer whose inputs or gradients are all zero is not reached either: nothing is known of what it is for.
    reached = {
        name: found
        for name, found in moments.items()
        if found is not None and float(found.inputs.trace()) > 0 and float(found.gradients.trace()) > 0
    }
    weighted = {
        name: (Metric(shrunk(found.inputs, found.positions), shrunk(found.gradients, found.positions)), found.uses)
        for name, found in reached.items()
    } | {name: embedding_metric(found) for name, found in collector.moments().items() if found is not None}
    for name in [layer.name for layer in layers if layer.name not in weighted]:
        logger.warning("no calibration example reached %s, so it stays dense", name)
    return Calibration(
        model=model,
        metrics={name: metric for name, (metric, _) in weighted.items()},
        uses={name: uses for name, (_, uses) in weighted.items()},
        held_back=held_back,
        dense_logits=dense_logits,
        examples=sum(_examples(batch) for batch in fitted),
    )


def held_back_divergence(calibration: Calibration, compressed: nn.Module, device: torch.device) -> float:
    """Mean Kullback-Leibler divergence per prediction from the dense model to the compressed one, in nats.

    On the examples held back; infinite if it is not finite. It is the increase in loss on targets drawn from the dense
    model, the quantity that the second-order estimate predicts.
    """
    total, count = 0.0, 0
    with prepared(device, compressed):
        for batch, dense in zip(calibration.held_back, calibration.dense_logits, strict=True):
            mask = batch.inputs.get("attention_mask")
            before = kept_predictions(dense.to(device), mask).double().log_softmax(-1)
            after = kept_predictions(logits_of(compressed, batch.inputs), mask).double().log_softmax(-1)
            # A class that the dense model rules out adds nothing, whatever the compressed one says of it.
            terms = torch.where(before > -torch.inf, before.exp() * (before - after), 0.0)
            total += float(terms.sum())
            count += before.shape[0]
    return total / count if math.isfinite(total) else math.inf


def _parts(data: EvaluationData | Iterable[Any]) -> tuple[list[Batch], list[Batch]]:
    """The batches for the moments, and those held back."""
    if isinstance(data, EvaluationData):
        if data.count < 2:
            raise BadInput("calibration needs two examples at least", where=data.name, remedy="give more data")
        every = min(HELD_BACK, data.count)
        held = list(range(every - 1, data.count, every))
        rest = [position for position in range(data.count) if position not in set(held)]
        return [list(_in_batches(data, positions)) for positions in (rest, held)]  # type: ignore[return-value]
    batches = [_as_batch(each) for each in data]
    if len(batches) < 2:
        raise BadInput(f"the calibration data yields {len(batches)} batches", remedy="give two at least")
    every = min(HELD_BACK, len(batches))
    held_back = batches[every - 1 :: every]
    return [batch for index, batch in enumerate(batches) if index % every != every - 1], held_back


def _in_batches(data: EvaluationData, positions: list[int]) -> Iterator[Batch]:
    for start in range(0, len(positions), data.batch_size):
        yield data.read(positions[start : start + data.batch_size])


def _as_batch(given: Any) -> Batch:
    inputs = given[0] if isinstance(given, list | tuple) and given else given
    if isinstance(inputs, Tensor):
        inputs = {"inputs": inputs}
    if not isinstance(inputs, Mapping) or not all(isinstance(value, Tensor) for value in inputs.values()):
        raise BadInput(
            f"the calibration data yields {type(given).__name__}", remedy="yield tensors, pairs, or mappings of tensors"
        )
    return Batch({name: tensor.detach() for name, tensor in inputs.items() if name != "labels"}, torch.empty(0))


def _examples(batch: Batch) -> int:
    return len(next(iter(batch.inputs.values())))


def _run(model: nn.Module, batch: Batch) -> Any:
    return lambda: logits_of(model, batch.inputs)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Keep the parameters out of the gradient's way."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
