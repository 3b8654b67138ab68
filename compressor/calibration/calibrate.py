"""The metric of the loss for every layer of a model, from a little data, before the model is compressed.

The model is run forward once, with the inputs of each of its segments kept on disk, and then backward a segment at a
time. So memory holds the moments of one segment, whatever the number of blocks, and time is linear in blocks and
examples.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from compressor.calibration.activation_cache import ActivationCache
from compressor.calibration.backward import BackwardPass, identity
from compressor.calibration.calibration import Calibration, frozen
from compressor.calibration.criterion import criterion_of, outputs_of
from compressor.calibration.examples import PARTS, CalibrationData, with_decoder_inputs
from compressor.calibration.forward import cache_outputs
from compressor.calibration.segments import Segments, find_segments
from compressor.calibration.settings import CALIBRATION, CalibrationSettings
from compressor.data import Batch
from compressor.engine import Run
from compressor.errors import BadInput
from compressor.factorize import Metric, embedding_metric
from compressor.measure.moments import oas_shrinkage
from compressor.measure.parameter_moments import ParameterCollector
from compressor.measure.token_frequencies import EmbeddingCollector, HeadMoments
from compressor.model import evaluation_mode
from compressor.model.head import Head, find_head
from compressor.model.streaming import blocks_of
from compressor.network import Layer

logger = logging.getLogger(__name__)


def calibrate(
    model: nn.Module,
    layers: Sequence[Layer],
    data: CalibrationData,
    *,
    run: Run,
    settings: CalibrationSettings = CALIBRATION,
) -> Calibration:
    """Estimate the moments of the layers' inputs and gradients on the fit examples.

    They are kept in the run's journal, or in that for calibration, and not estimated again where they are there.

    Raises `BadInput` for data that the model does not take, or on which it is not finite.
    """
    data = with_decoder_inputs(data, model)
    if (blocks := blocks_of(model)) is not None:
        blocks.kept_bytes = settings.kept_weights
    with evaluation_mode(run.device, model), frozen(model):
        rows = settings.logit_bytes // (4 * _widest(model))
        first = _few_examples(data.fit[0], rows)
        outputs = _accepted_outputs(model, first)
        _try_every_shape(model, [_few_examples(each, rows) for each in (*data.fit, *data.holdout)])
        segments, head = Segments(), find_head(model, partial(outputs_of, inputs=first.inputs))
        if settings.by_segment:
            segments = replace(find_segments(model, layers, first), head=head)
        logger.info("calibration runs the model in %d segments", segments.count)
        criterion = criterion_of(model, outputs, first.labels if data.labeled else None)
        known = {layer.name: layer for layer in layers}
        cache = ActivationCache(run.device, run.journal.part("calibration"), run.calibrated)
        bare = Calibration(model, known, data, segments, criterion, run, settings, cache, cache.decompositions())
        classes = outputs.shape[-1]
        if classes > settings.most_classes:
            bare = replace(bare, heads=_of_many_classes(layers, head, classes))
        modules = _modules(bare)
        cache_outputs(bare, PARTS, modules)
        embeddings, parameters = _embedding_collector(bare), _parameter_collector(bare)
        with embeddings, parameters:
            backward = BackwardPass(bare, modules, embeddings=embeddings, parameters=parameters)
            metrics, uses = backward.metrics()
        for name, of_parameter in parameters.moments(backward.predictions).items():
            inputs = oas_shrinkage(of_parameter.inputs, of_parameter.input_samples)
            gradients = oas_shrinkage(of_parameter.gradients, of_parameter.gradient_samples)
            metrics.put(name, Metric(inputs, gradients if settings.gradient_moments else identity(gradients)))
            uses[name] = 1.0
        for name, of_head in embeddings.head_moments().items():
            if of_head is not None:
                metrics.put(name, _head_metric(of_head, model.get_submodule(known[name].module), settings))
                uses[name] = of_head.uses
        for name, of_embedding in embeddings.moments().items():
            if of_embedding is not None:
                metric, uses[name] = embedding_metric(of_embedding)
                metrics.put(name, metric)
    for name in known.keys() - metrics.keys():
        logger.warning("no calibration example reached %s with an effect on the outputs: it stays dense", name)
    return replace(bare, metrics=metrics, uses=uses)


def _of_many_classes(layers: Sequence[Layer], head: Head | None, classes: int) -> frozenset[str]:
    """The layer that outputs so many classes, which is the model's head or in it; where none is known, the only one as
    wide."""
    wide = [each for each in layers if "linear" in each.kind and each.shape[0] == classes]
    if head is not None:
        wide = [each for each in wide if f"{each.module}.".startswith(f"{head.name}.")]
    return frozenset(each.name for each in wide) if len(wide) == 1 else frozenset()


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


def _widest(model: nn.Module) -> int:
    """The outputs of the widest layer of a model, which may be its head."""
    return max((len(each) for each in model.parameters() if each.dim() == 2), default=1)


def _few_examples(batch: Batch, rows: int) -> Batch:
    """As many of the examples as have at most so many tokens; all where they are not of tokens."""
    tokens = [each for each in batch.inputs.values() if each.dim() == 2 and not each.is_floating_point()]
    if not tokens:
        return batch
    return batch[: max(1, rows // max(each.shape[1] for each in tokens))]


def _try_every_shape(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Run the model once on every other shape of batch, to refuse a bad one before the work."""
    known = {_shape(batches[0])}
    for batch in batches:
        if _shape(batch) not in known:
            known.add(_shape(batch))
            _accepted_outputs(model, batch)


def _shape(batch: Batch) -> tuple[tuple[str, torch.Size, torch.dtype], ...]:
    return tuple((name, tensor.shape[1:], tensor.dtype) for name, tensor in batch.inputs.items())


def _accepted_outputs(model: nn.Module, batch: Batch) -> Tensor:
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


def recalibrate(calibration: Calibration, modules: Mapping[str, nn.Module], name: str = "") -> Calibration:
    """Calibrate again at a compressed model, of that name in the journal: the dense one with `modules` in their places.

    Inputs are those of the layers in the compressed model, gradients those of its own loss. The metrics of embeddings,
    of heads of many classes, of parameters, and of layers that the compressed model does not reach stay those of the
    dense model.
    """
    layers = _modules(calibration)
    with evaluation_mode(calibration.run.device, calibration.model), frozen(calibration.model):
        cache = ActivationCache(calibration.run.device, calibration.cache.journal.part(f"recalibrated/{name}"))
        at_compressed = replace(calibration, cache=cache, replaced=modules)
        cache_outputs(at_compressed, ("fit",), layers)
        metrics, uses = BackwardPass(at_compressed, layers).metrics()
    decompositions = cache.decompositions()
    for unreached in calibration.metrics.keys() - metrics.keys():
        metrics.put(unreached, calibration.metrics[unreached])
        uses[unreached] = calibration.uses[unreached]
        if unreached in calibration.decompositions:
            decompositions.put(unreached, calibration.decompositions[unreached])
    again = f"{calibration.name}/recalibrated-{name}"
    return replace(calibration, metrics=metrics, uses=uses, decompositions=decompositions, name=again)


def _modules(calibration: Calibration) -> dict[str, nn.Module]:
    """The layers of the dense model that are applied to vectors, by name, without heads of many classes."""
    return {
        name: calibration.model.get_submodule(layer.module)
        for name, layer in calibration.layers.items()
        if layer.kind not in ("embedding", "parameter") and name not in calibration.heads
    }


def _head_metric(found: HeadMoments, head: nn.Module, settings: CalibrationSettings) -> Metric:
    """The metric of a head of many classes, with the diagonal of the gradients' moment alone."""
    mean = found.mean if getattr(head, "bias", None) is not None else None
    inputs = found.hidden if mean is None else found.hidden - torch.outer(mean, mean)
    gradients = found.logits if settings.gradient_moments else torch.ones_like(found.logits)
    return Metric(oas_shrinkage(inputs, found.positions), gradients, mean)
