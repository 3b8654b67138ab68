"""The metric of the loss for every layer of a model, from a little data, before the model is compressed.

The model is run forward once, with the inputs of each of its segments kept on disk, and then backward a segment at a
time. So memory holds the moments of one segment, whatever the number of blocks, and time is linear in blocks and
examples.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from compressor.calibration.activation_cache import ActivationCache
from compressor.calibration.backward import BackwardPass
from compressor.calibration.calibration import Calibration, frozen
from compressor.calibration.examples import PARTS, CalibrationData, with_decoder_inputs
from compressor.calibration.forward import cache_outputs
from compressor.calibration.metrics import identity, metrics_of
from compressor.calibration.prepare import accepted_outputs, collectors_of, modules_of, prepared
from compressor.calibration.settings import CALIBRATION, CalibrationSettings
from compressor.calibration.slices import slices_in_workers
from compressor.data import Batch
from compressor.engine import Run
from compressor.factorize import Metric, embedding_metric
from compressor.measure.moments import oas_shrinkage
from compressor.measure.token_frequencies import HeadMoments
from compressor.model import ModelFiles, evaluation_mode
from compressor.network import Layer

logger = logging.getLogger(__name__)


def calibrate(
    model: nn.Module,
    layers: Sequence[Layer],
    data: CalibrationData,
    *,
    run: Run,
    settings: CalibrationSettings = CALIBRATION,
    files: ModelFiles | None = None,
) -> Calibration:
    """Estimate the moments of the layers' inputs and gradients on the fit examples.

    They are kept in the run's journal, or in that for calibration, and not estimated again where they are there. Where
    the run has workers and these can read the model from `files`, each takes a slice of the examples.

    Raises `BadInput` for data that the model does not take, or on which it is not finite.
    """
    data = with_decoder_inputs(data, model)
    with evaluation_mode(run.device, model), frozen(model):
        rows = settings.logit_bytes // (4 * _widest(model))
        first = _few_examples(data.fit[0], rows)
        _try_every_shape(model, [_few_examples(each, rows) for each in (*data.fit, *data.holdout)])
        bare = replace(prepared(model, layers, data, first=first, run=run, settings=settings), files=files)
        modules, collectors = modules_of(bare), collectors_of(bare)
        with slices_in_workers(bare) as formed:
            cache_outputs(bare, PARTS, modules, reported=0 if formed is None else len(bare.slices))
            with collectors.watching():
                measured = metrics_of(bare, modules, formed or BackwardPass(bare, modules, collectors))
        metrics, uses = measured.metrics, dict(measured.uses)
        collectors.restore(measured.collected)
        known = bare.layers
        for name, of_parameter in collectors.parameters.moments(measured.predictions).items():
            inputs = oas_shrinkage(of_parameter.inputs, of_parameter.input_samples)
            gradients = oas_shrinkage(of_parameter.gradients, of_parameter.gradient_samples)
            metrics.put(name, Metric(inputs, gradients if settings.gradient_moments else identity(gradients)))
            uses[name] = 1.0
        for name, of_head in collectors.embeddings.head_moments().items():
            if of_head is not None:
                metrics.put(name, _head_metric(of_head, model.get_submodule(known[name].module), settings))
                uses[name] = of_head.uses
        for name, of_embedding in collectors.embeddings.moments().items():
            if of_embedding is not None:
                metric, uses[name] = embedding_metric(of_embedding)
                metrics.put(name, metric)
    for name in known.keys() - metrics.keys():
        logger.warning("no calibration example reached %s with an effect on the outputs: it stays dense", name)
    return replace(bare, metrics=metrics, uses=uses)


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
            accepted_outputs(model, batch)


def _shape(batch: Batch) -> tuple[tuple[str, torch.Size, torch.dtype], ...]:
    return tuple((name, tensor.shape[1:], tensor.dtype) for name, tensor in batch.inputs.items())


def recalibrate(calibration: Calibration, modules: Mapping[str, nn.Module], name: str = "") -> Calibration:
    """Calibrate again at a compressed model, of that name in the journal: the dense one with `modules` in their places.

    Inputs are those of the layers in the compressed model, gradients those of its own loss. The metrics of embeddings,
    of heads of many classes, of parameters, and of layers that the compressed model does not reach stay those of the
    dense model. They are of as many of the fit batches as layers are refitted to.
    """
    layers = modules_of(calibration)
    with evaluation_mode(calibration.run.device, calibration.model), frozen(calibration.model):
        cache = ActivationCache(calibration.run.device, calibration.cache.journal.part(f"recalibrated/{name}"))
        settings = calibration.settings
        some = calibration.data.slices(
            settings.slices, backward_every=settings.gradient_every, every=settings.refit_every
        )
        at_compressed = replace(calibration, cache=cache, replaced=modules, slices=some)
        with slices_in_workers(at_compressed) as formed:
            cache_outputs(at_compressed, ("fit",), layers, reported=0 if formed is None else len(some))
            measured = metrics_of(at_compressed, layers, formed or BackwardPass(at_compressed, layers))
    metrics, uses = measured.metrics, dict(measured.uses)
    decompositions = cache.decompositions()
    for unreached in calibration.metrics.keys() - metrics.keys():
        metrics.put(unreached, calibration.metrics[unreached])
        uses[unreached] = calibration.uses[unreached]
        if calibration.decompositions.has(unreached):
            decompositions.put(unreached, calibration.decompositions.get(unreached))
    again = f"{calibration.name}/recalibrated-{name}"
    return replace(calibration, metrics=metrics, uses=uses, decompositions=decompositions, name=again)


def _head_metric(found: HeadMoments, head: nn.Module, settings: CalibrationSettings) -> Metric:
    """The metric of a head of many classes, with the diagonal of the gradients' moment alone."""
    mean = found.mean if getattr(head, "bias", None) is not None else None
    inputs = found.hidden if mean is None else found.hidden - torch.outer(mean, mean)
    gradients = found.logits if settings.gradient_moments else torch.ones_like(found.logits)
    return Metric(oas_shrinkage(inputs, found.positions), gradients, mean)
