"""What a little data says about a model before it is compressed: the metric of the loss for every layer.

The model is run forwards once, what enters each of its segments being left on disk, and then backwards a segment at a
time. So memory holds the moments of one segment, whatever the number of blocks, and time is linear in both blocks and
examples.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor.calibration.activation_cache import ActivationCache, CachedMetrics
from compressor.calibration.criterion import (
    UNITS,
    Criterion,
    criterion_of,
    divergence,
    hidden_rows,
    outputs_of,
    sampled_loss,
)
from compressor.calibration.examples import CalibrationData, with_decoder_inputs
from compressor.calibration.segments import Segments, State, find_segments
from compressor.data import Batch
from compressor.errors import BadInput
from compressor.factorize import Metric, TiedMetric, embedding_metric
from compressor.lowrank import put_layer
from compressor.measure.moments import MomentPass, Moments, collect_moments, kept_rows, oas_shrinkage
from compressor.measure.parameter_moments import ParameterCollector
from compressor.measure.token_frequencies import EmbeddingCollector
from compressor.model import evaluation_mode
from compressor.network import TRANSPOSED_CONVOLUTIONS, Layer
from compressor.planning import LossUnit
from compressor.progress import Progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """A model, how it is run on the calibration data, and what was found: metric and uses of its layers by name.

    A layer that no example reached is in neither mapping. What each segment of the dense model makes is in `cache`,
    under ("dense", part, segment, batch), and the second moments of the gradients there under ("boundary", segment).
    """

    model: nn.Module
    layers: Mapping[str, Layer]
    data: CalibrationData
    segments: Segments
    criterion: Criterion
    device: torch.device
    seed: int
    cache: ActivationCache = field(repr=False)
    metrics: Mapping[str, Metric | TiedMetric] = field(default_factory=dict)
    uses: Mapping[str, float] = field(default_factory=dict)

    @property
    def unit(self) -> LossUnit:
        """What losses are in."""
        return UNITS[self.criterion]


def calibrate(
    model: nn.Module,
    layers: Sequence[Layer],
    data: CalibrationData,
    *,
    device: torch.device,
    seed: int,
    progress: Progress | None = None,
) -> Calibration:
    """Moments of the layers' inputs and gradients on the fit part of the data.

    Raises `BadInput` for data that the model does not take, or on which it is not finite.
    """
    modules = _modules(model, layers)
    data = with_decoder_inputs(data, model)
    cache = ActivationCache()
    with evaluation_mode(device, model), frozen(model):
        first = data.fit[0]
        outputs = _accepted_outputs(model, first)
        _try_every_shape(model, [*data.fit, *data.holdout])
        segments = find_segments(model, layers, first)
        logger.info("calibration runs the model in %d segments", segments.count)
        batches = {"fit": data.fit, "holdout": data.holdout}
        _keep_boundaries(model, segments, batches, cache, modules, progress)
        known = {layer.name: layer for layer in layers}
        criterion = criterion_of(model, outputs, first.labels if data.labeled else None)
        bare = Calibration(model, known, data, segments, criterion, device, seed, cache)
        embeddings = EmbeddingCollector(
            {
                layer.name: (model.get_submodule(layer.module), model.get_submodule(layer.head) if layer.head else None)
                for layer in layers
                if layer.kind == "embedding"
            },
            likelihood=criterion == "likelihood",
        )
        parameters = ParameterCollector(
            {
                layer.name: (model.get_submodule(layer.module), layer.parameter)
                for layer in layers
                if layer.kind == "parameter"
            }
        )
        with embeddings, parameters:
            metrics, uses = _metrics(bare, modules, modules, progress, embeddings, parameters)
        for name, found in embeddings.moments().items():
            if found is not None:
                metric, uses[name] = embedding_metric(found)
                metrics.put(name, metric)
    for name in known.keys() - metrics.keys():
        logger.warning("no calibration example reached %s with an effect on the outputs: it stays dense", name)
    return replace(bare, metrics=metrics, uses=uses)


def _try_every_shape(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Run the model once on every further shape of batch, so that a bad one is refused before the work."""
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


def recalibrate(
    calibration: Calibration, modules: Mapping[str, nn.Module], progress: Progress | None = None
) -> Calibration:
    """The same calibration with the metrics at a compressed model: `modules` in their places in the dense one.

    The inputs are those that the compressed model gives its layers, and the gradients those of its own outputs. The
    metrics of embeddings, and of layers that the compressed model does not reach, stay those of the dense model.
    """
    layers = _modules(calibration.model, calibration.layers.values())
    cache = ActivationCache()
    with (
        evaluation_mode(calibration.device, calibration.model),
        with_layers(calibration.model, modules) as changed,
        frozen(changed),
    ):
        stand_ins = _modules(changed, calibration.layers.values())
        batches = {"fit": calibration.data.fit}
        _keep_boundaries(changed, calibration.segments, batches, cache, stand_ins, progress)
        run = replace(calibration, model=changed, cache=cache)
        metrics, uses = _metrics(run, layers, stand_ins, progress)
    for name in calibration.metrics.keys() - metrics.keys():
        metrics.put(name, calibration.metrics[name])
        uses[name] = calibration.uses[name]
    return replace(calibration, metrics=metrics, uses=uses)


def _modules(model: nn.Module, layers: Iterable[Layer]) -> dict[str, nn.Module]:
    """Those of the layers that are applied to vectors, by their names."""
    return {
        layer.name: model.get_submodule(layer.module)
        for layer in layers
        if layer.kind not in ("embedding", "parameter")
    }


def holdout_loss(calibration: Calibration, modules: Mapping[str, nn.Module]) -> float:
    """Mean cost per prediction, on the holdout examples, of having `modules` in their places in the dense model.

    For a likelihood the Kullback-Leibler divergence from the dense model in nats: the increase in loss on targets drawn
    from it, which is what the second-order estimate predicts; else half the squared change of the outputs. Infinite if
    it is not finite.
    """
    total, count = 0.0, 0
    segments, last = calibration.segments, calibration.segments.count - 1
    with evaluation_mode(calibration.device, calibration.model):
        for index, batch in enumerate(calibration.data.holdout):
            [before] = segments.run(calibration.model, last, batch, entering(calibration, "holdout", last, index))
            with with_layers(calibration.model, modules) as changed:
                after = outputs_of(changed, batch.inputs)
            cost, rows = divergence(before, after, batch.masks, calibration.criterion)
            total += float(cost)
            count += rows
    return total / count if math.isfinite(total) else math.inf


def entering(calibration: Calibration, part: str, segment: int, batch: int) -> State:
    """What the dense model hands to a segment; nothing to the first."""
    return tuple(
        made_by(calibration, part, maker, batch)[place] for maker, place in calibration.segments.makers(segment)
    )


def made_by(calibration: Calibration, part: str, segment: int, batch: int) -> State:
    """What a segment of the dense model makes, all but the last."""
    return calibration.cache.row(("dense", part, segment, batch), calibration.device)


@contextmanager
def with_layers(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """The model with other modules in their places, by name; those that were there then return."""
    found = {place: model.get_submodule(place) for place in modules}
    changed = model
    try:
        # A module that is replaced whole comes before the layers inside it.
        for place in sorted(modules, key=lambda name: name.count(".")):
            changed = put_layer(changed, place, modules[place])
        yield changed
    finally:
        for place, module in found.items():
            put_layer(model, place, module)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Keep the parameters out of the gradient's way."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    # cuDNN runs recurrent layers backwards only in training mode.
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    try:
        with torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _keep_boundaries(
    model: nn.Module,
    segments: Segments,
    batches: Mapping[str, Sequence[Batch]],
    cache: ActivationCache,
    layers: Mapping[str, nn.Module],
    progress: Progress | None,
) -> None:
    """Run all but the last segment on the batches of some parts of the data, leaving on disk what enters each."""
    each_batch = [(part, *indexed) for part, of_part in batches.items() for indexed in enumerate(of_part)]
    for done, (part, index, batch) in enumerate(each_batch, start=1):
        state: State = ()
        for segment in range(segments.count - 1):
            state = segments.run(model, segment, batch, state)
            made = segments.made_by(segment, state)
            if not all(torch.isfinite(each).all() for each in made):
                raise _overflow(model, batch, layers)
            cache.put_row(("dense", part, segment, index), made)
        if progress:
            progress("run", done, len(each_batch))


def _overflow(model: nn.Module, batch: Batch, layers: Mapping[str, nn.Module]) -> BadInput:
    """Which layer is the first to be given something that is not finite."""
    found: list[str] = []

    def note(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], name: str) -> None:
        if not torch.isfinite(arguments[0] if arguments else next(iter(named.values()))).all():
            found.append(name)

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(partial(note, name=name), with_kwargs=True).remove)
        outputs_of(model, batch.inputs)
    what = f"the activations of layer {found[0]}" if found else "the model's activations"
    return BadInput(f"{what} are not finite on the calibration data", remedy="use the model in a wider dtype")


def _metrics(
    calibration: Calibration,
    layers: Mapping[str, nn.Module],
    stand_ins: Mapping[str, nn.Module],
    progress: Progress | None,
    embeddings: EmbeddingCollector | None = None,
    parameters: ParameterCollector | None = None,
) -> tuple[CachedMetrics, dict[str, float]]:
    """The metric and the uses of every layer that is reached, from the last segment to the first.

    `stand_ins` are what runs in the layers' places.
    """
    model, segments, cache, device = calibration.model, calibration.segments, calibration.cache, calibration.device
    metrics = CachedMetrics(cache, device)
    uses: dict[str, float] = {}
    generator = torch.Generator(device).manual_seed(calibration.seed)
    rows = 0
    boundary: defaultdict[int, _Boundary] = defaultdict(_Boundary)

    def backwards(segment: int, index: int, batch: Batch) -> None:
        nonlocal rows
        state = entering(calibration, "fit", segment, index)
        for each in state:
            each.requires_grad_(True)
        masks, last = batch.masks, segment == segments.count - 1
        # A copy, because a segment may work in place on what enters it, which a leaf does not allow.
        run: Callable[[], State] = partial(segments.run, model, segment, batch, tuple(each.clone() for each in state))
        if embeddings is not None:
            run = embeddings.watched(run, masks, logits=last)
        handed_on = run()
        if last:
            rows += kept_rows(handed_on[0], masks).shape[0]
            handed_on = (sampled_loss(handed_on[0], masks, calibration.criterion, generator),)
            if not torch.isfinite(handed_on[0]):
                raise BadInput(
                    "the model's own loss on the calibration data is not finite",
                    remedy="use the model in a wider dtype, or other data",
                )
        gradients = (None,) if last else cache.row(("gradient", index), device)
        # Of what the segment made of none of the layers and of nothing that entered it there is no gradient.
        reachable = [pair for pair in zip(handed_on, gradients, strict=True) if pair[0].requires_grad]
        if reachable:
            torch.autograd.backward([each for each, _ in reachable], [gradient for _, gradient in reachable])
        if not state:
            return
        received = tuple(torch.zeros_like(each) if each.grad is None else each.grad for each in state)
        cache.put_row(("gradient", index), received)
        for number, each in enumerate(segments.made_by(segment - 1, received)):
            boundary[number].add(hidden_rows(each, masks))

    for done, segment in enumerate(reversed(range(segments.count)), start=1):
        passes = (
            MomentPass(partial(backwards, segment, index, batch), batch.masks)
            for index, batch in enumerate(calibration.data.fit)
        )
        inside = segments.own_layers(model, segment, stand_ins)
        for name, found in collect_moments({name: layers[name] for name in inside}, passes, inside).items():
            if found is not None and (metric := _metric(found, layers[name])) is not None:
                metrics.put(name, metric)
                uses[name] = found.positions / rows
        if boundary:
            cache.put_row(("boundary", segment - 1), [each.moment() for each in boundary.values()])
            boundary.clear()
        if progress:
            progress("calibrate", done, segments.count)
    for name, of_parameter in parameters.moments(rows).items() if parameters is not None else ():
        inputs = oas_shrinkage(of_parameter.inputs, of_parameter.input_samples)
        metrics.put(name, Metric(inputs, oas_shrinkage(of_parameter.gradients, of_parameter.gradient_samples)))
        uses[name] = 1.0
    return metrics, uses


@dataclass
class _Boundary:
    """The second moment of the gradients of what goes from one segment to the next, gathered batch by batch."""

    product: Tensor | None = None
    positions: int = 0

    def add(self, vectors: Tensor) -> None:
        product = (vectors.T @ vectors).to(torch.float64)
        self.product = product if self.product is None else self.product + product
        self.positions += len(vectors)

    def moment(self) -> Tensor:
        """Zero where no gradient came back, because the outputs do not depend on it."""
        assert self.product is not None
        if not float(self.product.trace()) > 0:
            return self.product
        return oas_shrinkage(self.product / self.positions, self.positions)


def _metric(moments: Moments, layer: nn.Module) -> Metric | None:
    """The metric of a layer; None where inputs or gradients are all zero, so that nothing is known of what it is for.

    A bias takes up what the mean of the inputs contributes, so that a layer with one has the inputs' covariance.
    """
    # A transposed convolution's has a number for every channel, and its matrix a row for every one at every position.
    has_bias = getattr(layer, "bias", None) is not None and not isinstance(layer, TRANSPOSED_CONVOLUTIONS)
    inputs = moments.inputs - torch.outer(moments.mean, moments.mean) if has_bias else moments.inputs
    if float(moments.inputs.trace()) <= 0 or float(moments.gradients.trace()) <= 0:
        return None
    return Metric(
        oas_shrinkage(inputs, moments.positions),
        oas_shrinkage(moments.gradients, moments.positions),
        moments.mean if has_bias else None,
    )
