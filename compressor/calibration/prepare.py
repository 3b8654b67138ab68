"""A model about to be calibrated: its segments, the criterion, slices of the examples, and what is to be watched."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from compressor.calibration.activation_cache import ActivationCache
from compressor.calibration.calibration import Calibration
from compressor.calibration.criterion import criterion_of, outputs_of
from compressor.calibration.examples import CalibrationData
from compressor.calibration.segments import Segments, find_segments
from compressor.calibration.settings import CalibrationSettings
from compressor.data import Batch
from compressor.engine import Run
from compressor.errors import BadInput
from compressor.measure.parameter_moments import ParameterCollector
from compressor.measure.token_frequencies import EmbeddingCollector
from compressor.model.head import Head, find_head
from compressor.model.streaming import blocks_of
from compressor.network import Layer

logger = logging.getLogger(__name__)


def prepared(
    model: nn.Module,
    layers: Sequence[Layer],
    data: CalibrationData,
    *,
    first: Batch,
    run: Run,
    settings: CalibrationSettings,
) -> Calibration:
    """What is known of a model in evaluation mode before any metric; `first` are a few of the examples.

    Raises `BadInput` for examples that the model does not take.
    """
    if (blocks := blocks_of(model)) is not None:
        blocks.kept_bytes = settings.kept_weights
    outputs = accepted_outputs(model, first)
    segments, head = Segments(), _head_without(layers, model, first)
    if settings.by_segment:
        segments = replace(find_segments(model, layers, first), head=head)
    logger.debug("calibration runs the model in %d segments", segments.count)
    cache = ActivationCache(run.device, run.journal.part("calibration"), run.calibrated)
    classes = outputs.shape[-1]
    whole = any(layer.kind in ("embedding", "parameter") for layer in layers)
    return Calibration(
        model=model,
        layers={layer.name: layer for layer in layers},
        data=data,
        segments=segments,
        criterion=criterion_of(model, outputs, first.labels if data.labeled else None),
        run=run,
        settings=settings,
        cache=cache,
        decompositions=cache.decompositions(),
        first=first,
        slices=data.slices(settings.slices, backward_every=1 if whole else settings.gradient_every),
        heads=_of_many_classes(layers, head, classes) if classes > settings.most_classes else frozenset(),
    )


def _head_without(layers: Sequence[Layer], model: nn.Module, first: Batch) -> Head | None:
    """The head of a model, unless layers are inside of it, which no segment would reach."""
    found = find_head(model, partial(outputs_of, inputs=first.inputs))
    return None if found is None or any(each.module.startswith(f"{found.name}.") for each in layers) else found


def accepted_outputs(model: nn.Module, batch: Batch) -> Tensor:
    try:
        return outputs_of(model, batch.inputs)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        given = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in batch.inputs.items())
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(
            f"{type(model).__name__} does not take calibration batches of {given}: {reason}",
            option="calibration",
            remedy="give what its forward takes: tensors of that shape, or mappings with everything that it needs",
        ) from error


def _of_many_classes(layers: Sequence[Layer], head: Head | None, classes: int) -> frozenset[str]:
    """The layer that outputs so many classes, which is the model's head or in it; where none is known, the only one as
    wide."""
    wide = [each for each in layers if "linear" in each.kind and each.shape[0] == classes]
    if head is not None:
        wide = [each for each in wide if f"{each.module}.".startswith(f"{head.name}.")]
    return frozenset(each.name for each in wide) if len(wide) == 1 else frozenset()


def modules_of(calibration: Calibration) -> dict[str, nn.Module]:
    """The layers of the dense model that are applied to vectors, by name, without heads of many classes."""
    return {
        name: calibration.model.get_submodule(layer.module)
        for name, layer in calibration.layers.items()
        if layer.kind not in ("embedding", "parameter") and name not in calibration.heads
    }


@dataclass(frozen=True)
class Collectors:
    """What watches, beside the layers that are applied to vectors, embeddings and bare parameters."""

    embeddings: EmbeddingCollector
    parameters: ParameterCollector

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the model while the block runs."""
        with self.embeddings, self.parameters:
            yield

    def taken(self) -> dict[str, dict[str, Tensor]]:
        """What both gathered so far, by kind; they begin anew."""
        return {"embeddings": self.embeddings.taken(), "parameters": self.parameters.taken()}

    def restore(self, states: dict[str, dict[str, Tensor]]) -> None:
        """Go on from what was gathered before."""
        self.embeddings.restore(states.get("embeddings", {}))
        self.parameters.restore(states.get("parameters", {}))


def collectors_of(calibration: Calibration) -> Collectors:
    """What watches the embeddings, the heads of many classes, and the bare parameters of a model."""
    return Collectors(_embedding_collector(calibration), _parameter_collector(calibration))


def _embedding_collector(calibration: Calibration) -> EmbeddingCollector:
    model = calibration.model
    embeddings = {
        layer.name: (model.get_submodule(layer.module), model.get_submodule(layer.head) if layer.head else None)
        for layer in calibration.layers.values()
        if layer.kind == "embedding"
    }
    heads = {name: model.get_submodule(calibration.layers[name].module) for name in calibration.heads}
    return EmbeddingCollector(embeddings, heads, likelihood=calibration.criterion == "likelihood")


def _parameter_collector(calibration: Calibration) -> ParameterCollector:
    layers = (layer for layer in calibration.layers.values() if layer.kind == "parameter")
    return ParameterCollector(
        {layer.name: (calibration.model.get_submodule(layer.module), layer.parameter) for layer in layers}
    )
