"""The metric of the loss for every layer of a model, from a little data, before the model is compressed.

The model is run forward once, with the inputs of each of its segments kept on disk, and then backward a segment at a
time. So memory holds the moments of one segment, whatever the number of blocks, and time is linear in blocks and
examples.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor.calibration.activation_cache import ActivationCache, CachedDecompositions, CachedMetrics
from compressor.calibration.criterion import (
    UNITS,
    Criterion,
    criterion_of,
    divergence,
    hidden_rows,
    outputs_of,
    rows_within,
    sampled_loss,
    summed_in_parts,
)
from compressor.calibration.examples import PARTS, CalibrationData, Chunk, Part, with_decoder_inputs
from compressor.calibration.segments import Segments, State, find_segments
from compressor.calibration.settings import CALIBRATION, CalibrationSettings
from compressor.data import Batch
from compressor.engine import Run
from compressor.errors import BadInput
from compressor.factorize import Metric, TiedMetric, embedding_metric
from compressor.lowrank import put_layer
from compressor.measure.moments import MomentCollector, Moments, kept_rows, oas_shrinkage, with_padding
from compressor.measure.parameter_moments import ParameterCollector
from compressor.measure.token_frequencies import EmbeddingCollector, HeadMoments
from compressor.model import evaluation_mode
from compressor.model.head import Head, find_head
from compressor.model.streaming import blocks_of, parameter_of
from compressor.network import TRANSPOSED_CONVOLUTIONS, Layer
from compressor.planning import LossUnit
from compressor.torch_state import all_answers, brought_to, in_float64

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """A model, the calibration data, and what they say: metric and uses per prediction of the layers, by name.

    A layer that no example reached is in neither mapping. The `cache` holds the outputs of every segment of the dense
    model, and the second moments of the gradients at them. `decompositions` are those of the layers' matrices in their
    metrics, each there once it was asked for. The modules that are `replaced` run in the places of the model's own.
    """

    model: nn.Module
    layers: Mapping[str, Layer]
    data: CalibrationData
    segments: Segments
    criterion: Criterion
    run: Run
    settings: CalibrationSettings
    cache: ActivationCache = field(repr=False)
    decompositions: CachedDecompositions = field(repr=False)
    metrics: Mapping[str, Metric | TiedMetric] = field(default_factory=dict)
    uses: Mapping[str, float] = field(default_factory=dict)
    replaced: Mapping[str, nn.Module] = field(default_factory=dict, repr=False)
    name: str = "dense"
    """What it is called in the journal, where all that follows from its metrics has names below."""
    heads: frozenset[str] = frozenset()
    """Layers that output so many classes that of their gradients only the diagonal of the moment is used."""

    @property
    def unit(self) -> LossUnit:
        """The unit of losses."""
        return UNITS[self.criterion]

    @contextmanager
    def running(self, segment: int) -> Iterator[nn.Module]:
        """The model with the modules that are `replaced`, as far as a segment runs them."""
        with with_layers(self.model, of_segment(self.segments, segment, self.replaced)) as model:
            yield model

    def weight(self, layer: Layer) -> Tensor:
        """The dense weight of a layer as it is stored, on the device, whether or not it is in memory."""
        return parameter_of(self.model, layer.module, layer.parameter).detach().to(self.run.device)


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
        first = _few_examples(model, data.fit[0], settings)
        outputs = _accepted_outputs(model, first)
        _try_every_shape(model, [_few_examples(model, each, settings) for each in (*data.fit, *data.holdout)])
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
        _cache_outputs(bare, PARTS, modules)
        embeddings, parameters = _embedding_collector(bare), _parameter_collector(bare)
        with embeddings, parameters:
            backward = _BackwardPass(bare, modules, embeddings=embeddings, parameters=parameters)
            metrics, uses = backward.metrics()
        for name, of_parameter in parameters.moments(backward.predictions).items():
            inputs = oas_shrinkage(of_parameter.inputs, of_parameter.input_samples)
            gradients = oas_shrinkage(of_parameter.gradients, of_parameter.gradient_samples)
            metrics.put(name, Metric(inputs, gradients if settings.gradient_moments else _identity(gradients)))
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


def _few_examples(model: nn.Module, batch: Batch, settings: CalibrationSettings) -> Batch:
    """As many of the examples as have logits of the bytes that may be in memory, by the widest layer of the model."""
    tokens = [each for each in batch.inputs.values() if each.dim() == 2 and not each.is_floating_point()]
    if not tokens:
        return batch
    widest = max((len(each) for each in model.parameters() if each.dim() == 2), default=1)
    rows = settings.logit_bytes // (4 * widest)
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
        _cache_outputs(at_compressed, ("fit",), layers)
        metrics, uses = _BackwardPass(at_compressed, layers).metrics()
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


def holdout_loss(calibration: Calibration, modules: Mapping[str, nn.Module]) -> float:
    """Mean cost per prediction, on the holdout examples, of replacing modules of the dense model.

    For a likelihood this is the Kullback-Leibler divergence from the dense model in nats: the increase in loss on
    targets drawn from it, which the second-order estimate predicts. Otherwise it is half the squared change of the
    outputs. Infinite if it is not finite.
    """
    total, count = 0.0, 0
    segments, last, model = calibration.segments, calibration.segments.count - 1, calibration.model
    chunks = calibration.data.chunks("holdout")
    states = ActivationCache(calibration.run.device, calibration.run.journal.temporary())
    with evaluation_mode(calibration.run.device, model):
        for segment in range(last + 1):
            own = of_segment(segments, segment, modules)
            inputs, outputs = (states.compressed("holdout", "judged", each) for each in (segment, segment + 1))
            for chunk in chunks:
                batch = calibration.data.read(chunk)
                with with_layers(model, own) as changed:
                    state = inputs.read(chunk.batch) if segment > 0 else ()
                    state = segments.run(changed, segment, batch, state=state)
                inputs.drop(chunk.batch)
                if segment < last:
                    outputs.write(chunk.batch, state)
                    continue
                [before] = dense_outputs(calibration, last, chunk)
                cost, rows = cost_of_predictions(calibration, before, state[0], masks=batch.masks, modules=own)
                total += float(cost)
                count += rows
    return total / count if math.isfinite(total) else math.inf


def of_segment(segments: Segments, index: int, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Of modules by their places those that a segment may run."""
    return {place: modules[place] for place in modules if segments.may_run(index, place)}


def cost_of_predictions(
    calibration: Calibration,
    before: Tensor,
    after: Tensor,
    *,
    masks: Sequence[Tensor],
    modules: Mapping[str, nn.Module],
) -> tuple[Tensor, int]:
    """The cost of the predictions of a compressed model against the dense one's, summed over rows, and their number.

    `before` and `after` are what the last segment outputs in the dense model, and in the one with other `modules`.
    """
    segments, model, criterion = calibration.segments, calibration.model, calibration.criterion
    dense, compressed = kept_rows(before, masks), kept_rows(after, masks)

    def cost(part: Tensor, place: slice) -> Tensor:
        with torch.no_grad():
            expected = segments.outputs(model, dense[place])
        return divergence(expected, segments.outputs(model, part, modules), (), criterion=criterion)[0]

    head = None if segments.head is None else modules.get(segments.head.name)
    trained = [] if head is None else [each for each in head.parameters() if each.requires_grad]
    at_once = rows_within(calibration.settings.logit_bytes, segments.width(after))
    return summed_in_parts(cost, compressed, at_once=at_once, parameters=trained), len(dense)


def dense_inputs(calibration: Calibration, segment: int, chunk: Chunk) -> State:
    """Inputs of a segment in the dense model; none for the first."""
    sources = calibration.segments.sources(segment)
    cached = calibration.cache
    return rows_of([cached.dense(chunk.part, source).read(chunk.batch)[place] for source, place in sources], chunk)


def dense_outputs(calibration: Calibration, segment: int, chunk: Chunk) -> State:
    """New outputs of a segment of the dense model."""
    segments = calibration.segments
    if segment == segments.count - 1 and segments.head is None:  # the predictions, which are not kept
        state = dense_inputs(calibration, segment, chunk)
        return segments.run(calibration.model, segment, calibration.data.read(chunk), state=state)
    return rows_of(calibration.cache.dense(chunk.part, segment).read(chunk.batch), chunk)


def rows_of(tensors: Sequence[Tensor], chunk: Chunk) -> State:
    """The rows of a chunk in tensors of its whole batch."""
    return tuple(tensors) if chunk.rows is None else tuple(each[chunk.rows] for each in tensors)


@contextmanager
def with_layers(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """Put other modules in their places in the model, by name, and the original ones back afterwards."""
    originals = {place: model.get_submodule(place) for place in modules}
    changed = model
    try:
        # A module that is replaced as a whole comes before the layers inside it.
        for place in sorted(modules, key=lambda name: name.count(".")):
            changed = put_layer(changed, place, modules[place])
        yield changed
    finally:
        for place, module in originals.items():
            put_layer(model, place, module)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Compute no gradients of the model's parameters."""
    blocks = blocks_of(model)
    # cuDNN runs recurrent layers backwards only in training mode.
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    with (
        nullcontext() if blocks is None else blocks.frozen(),
        torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext(),
    ):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield
        finally:  # before the blocks, whose matrices in memory become what is in their places otherwise
            for parameter in trained:
                parameter.requires_grad_(True)


def _cache_outputs(calibration: Calibration, parts: Sequence[Part], layers: Mapping[str, nn.Module]) -> None:
    """Run all segments on some parts of the data, and cache the outputs of each, without the model's predictions.

    On the examples that are not run backward the moments of the layers' inputs are taken meanwhile.
    """
    segments, data, cache = calibration.segments, calibration.data, calibration.cache
    backward = _run_backward(calibration)
    forward = [chunk for chunk in data.chunks("fit") if chunk not in backward]
    for segment in range(segments.count - (segments.head is None)):
        # All of the data run through one block after the other, each of which is then read once.
        finite: dict[Chunk, Tensor] = {}
        if forward and not cache.has_inputs(segment) and not cache.moments.knows(f"backward-{segment}"):
            with _collecting(calibration, layers, segment) as (model, collector), torch.no_grad():
                for chunk in forward:
                    with collector.masked(data.read(chunk).masks):
                        outputs, finite[chunk] = _cached_outputs(calibration, model, segment, chunk=chunk)
                        _note_head(calibration, model, segment, outputs=outputs, collector=collector)
                cache.write_inputs(segment, collector.inputs)
        with calibration.running(segment) as model:
            for chunk in data.chunks(*parts):
                if chunk not in finite and not cache.dense(chunk.part, segment).holds(chunk.batch):
                    _, finite[chunk] = _cached_outputs(calibration, model, segment, chunk=chunk)
        for chunk, sound in zip(finite, all_answers(list(finite.values())), strict=True):
            if not sound:
                cache.dense(chunk.part, segment).drop(chunk.batch)
                raise _overflow(calibration.model, data.read(chunk), layers)
        calibration.run.report("run", segment + 1, segments.count)
    if segments.head is None:
        calibration.run.report("run", segments.count, segments.count)


def _cached_outputs(calibration: Calibration, model: nn.Module, segment: int, *, chunk: Chunk) -> tuple[State, Tensor]:
    """The new outputs of a segment, which are kept, and whether they are finite."""
    state, batch = dense_inputs(calibration, segment, chunk), calibration.data.read(chunk)
    outputs = calibration.segments.new_outputs(segment, calibration.segments.run(model, segment, batch, state=state))
    calibration.cache.dense(chunk.part, segment).write(chunk.batch, outputs)
    return outputs, torch.stack([torch.isfinite(each).all() for each in outputs]).all()


@contextmanager
def _collecting(
    calibration: Calibration, layers: Mapping[str, nn.Module], segment: int
) -> Iterator[tuple[nn.Module, MomentCollector]]:
    """The model that a segment is run of, and what collects the moments of the segment's layers."""
    with calibration.running(segment) as model:
        running = {name: model.get_submodule(calibration.layers[name].module) for name in layers}
        inside = calibration.segments.own_layers(model, segment, running)
        with MomentCollector({name: layers[name] for name in inside}, inside) as collector:
            yield model, collector


def _note_head(
    calibration: Calibration, model: nn.Module, segment: int, *, outputs: State, collector: MomentCollector
) -> None:
    """Add the inputs of the head, or of the layers in it, which is applied to what the last segment outputs."""
    segments = calibration.segments
    if segments.head is None or segment < segments.count - 1:
        return
    head, [last] = model.get_submodule(segments.head.name), outputs
    itself = [name for name, layer in collector.hooked.items() if layer is head]
    for name in itself:
        collector.note_input(name, last)
    if not itself and set(collector.hooked.values()) & set(head.modules()):
        rows = kept_rows(last, collector.masks)
        for part in torch.split(rows, rows_within(calibration.settings.logit_bytes, segments.width(last))):
            with collector.masked(()):
                segments.outputs(model, part)


def _run_backward(calibration: Calibration) -> list[Chunk]:
    """The fit batches that are run backward."""
    whole = any(layer.kind in ("embedding", "parameter") for layer in calibration.layers.values())
    return calibration.data.chunks("fit")[:: 1 if whole else calibration.settings.gradient_every]


def _overflow(model: nn.Module, batch: Batch, layers: Mapping[str, nn.Module]) -> BadInput:
    """The error that names the first layer whose input is not finite."""
    found: list[str] = []

    def note(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], *, name: str) -> None:
        if not torch.isfinite(arguments[0] if arguments else next(iter(named.values()))).all():
            found.append(name)

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(partial(note, name=name), with_kwargs=True).remove)
        outputs_of(model, batch.inputs)
    what = f"the activations of layer {found[0]} are" if found else "what the model computes is"
    remedy = "use the model in a wider dtype, or other data"
    return BadInput(f"{what} not finite on the calibration data", remedy=remedy)


class _BackwardPass:
    """Runs the model of a calibration backward, from the last segment to the first, for the metrics of its layers.

    `layers` are those of the dense model.
    """

    def __init__(
        self,
        calibration: Calibration,
        layers: Mapping[str, nn.Module],
        *,
        embeddings: EmbeddingCollector | None = None,
        parameters: ParameterCollector | None = None,
    ) -> None:
        self.predictions = 0
        self._collectors = {
            name: each for name, each in (("embeddings", embeddings), ("parameters", parameters)) if each is not None
        }
        self._calibration, self._layers = calibration, layers
        self._embeddings = embeddings
        self._generator: torch.Generator | None = None
        self._boundary: dict[int, _SecondMoment] = {}

    def metrics(self) -> tuple[CachedMetrics, dict[str, float]]:
        """The metric and the uses per prediction of every layer that is reached."""
        calibration, journal = self._calibration, self._calibration.cache.moments
        metrics, uses = calibration.cache.metrics(), dict[str, float]()
        count = calibration.segments.count
        done_before = self._done_before(metrics)
        for done, segment in enumerate(reversed(range(count)), start=1):
            of_segment = journal.value(f"backward-{segment}", partial(self._measured, segment, metrics))
            self.predictions = of_segment["predictions"]
            for name, used in of_segment["uses"].items():
                metrics.take(name)
                uses[name] = used
            if done == done_before:
                for kind, collector in self._collectors.items():
                    state = journal.read(f"{kind}-{segment}")
                    collector.restore({key: brought_to(calibration.run.device, each) for key, each in state.items()})
            for chunk in _run_backward(calibration):
                calibration.cache.gradients(segment + 1).drop(chunk.batch)
            calibration.cache.drop_inputs(segment)
            calibration.run.report("calibrate", done, count)
        return metrics, uses

    def _measured(self, segment: int, metrics: CachedMetrics) -> dict[str, Any]:
        """Keep the metrics of a segment's layers; their uses per prediction, and the predictions."""
        cache, uses = self._calibration.cache, dict[str, float]()
        first: dict[Any, tuple[str, Tensor]] = {}  # of the layers that share their inputs
        for name, moments in self._moments(segment).items():
            if moments is None or float(moments.inputs.trace()) <= 0 or float(moments.gradients.trace()) <= 0:
                continue  # inputs or gradients that are all zero say nothing about a layer
            bias = _has_bias(self._layers[name])
            alike = id(moments.inputs), moments.input_positions, bias
            owner, inputs = first.get(alike) or (None, _inputs(moments, bias=bias))
            first.setdefault(alike, (name, inputs))
            gradients = oas_shrinkage(moments.gradients, moments.positions)
            gradients = gradients if self._calibration.settings.gradient_moments else _identity(gradients)
            metrics.put(name, Metric(inputs, gradients, moments.mean if bias else None), inputs_of=owner)
            uses[name] = moments.positions / self.predictions
        if self._boundary:
            cache.write_boundary(segment - 1, [each.mean() for each in self._boundary.values()])
            self._boundary.clear()
        if cache.moments.kept:
            for kind, collector in self._collectors.items():
                cache.moments.write(f"{kind}-{segment}", collector.state())
        return {"uses": uses, "predictions": self.predictions}

    def _done_before(self, metrics: CachedMetrics) -> int:
        """How many segments an interrupted run has measured: none where something of that is damaged."""
        cache = self._calibration.cache
        journal, count = cache.moments, self._calibration.segments.count
        recorded = [f"backward-{segment}" for segment in reversed(range(count))]
        done = next((place for place, name in enumerate(recorded) if not journal.knows(name)), count)
        if done == 0:
            return 0
        whole = all(metrics.are_kept(journal.value(name, dict[str, Any])["uses"]) for name in recorded[:done])
        whole &= all(journal.holds(f"{kind}-{count - done}") for kind in self._collectors)
        whole &= all(cache.has_boundary(segment - 1) for segment in range(count - done, count) if segment > 0)
        if done < count:
            gradients = cache.gradients(count - done)
            whole &= all(gradients.holds(chunk.batch) for chunk in _run_backward(self._calibration))
        if whole:
            return done
        for name in recorded[:done]:
            journal.drop(name)
        return 0

    def _moments(self, segment: int) -> dict[str, Moments | None]:
        calibration, data, cache = self._calibration, self._calibration.data, self._calibration.cache
        known = cache.inputs(segment) if cache.has_inputs(segment) else None
        backward = _run_backward(calibration)
        with (
            _collecting(calibration, self._layers, segment) as (model, collector),
            torch.enable_grad(),
        ):
            for chunk in data.chunks("fit") if known is None else backward:
                with collector.masked(data.read(chunk).masks):
                    if chunk in backward:
                        self._step(model, segment, chunk, collector=collector)
                    else:
                        self._forward(model, segment, chunk, collector=collector)
            return collector.moments(known)

    @torch.no_grad()
    def _forward(self, model: nn.Module, segment: int, chunk: Chunk, *, collector: MomentCollector) -> None:
        """Run a segment on one batch, for the inputs of its layers."""
        calibration = self._calibration
        state = dense_inputs(calibration, segment, chunk)
        outputs = calibration.segments.run(model, segment, calibration.data.read(chunk), state=state)
        _note_head(calibration, model, segment, outputs=outputs, collector=collector)

    def _step(self, model: nn.Module, segment: int, chunk: Chunk, *, collector: MomentCollector) -> None:
        """Run a segment forward and backward on one batch, and cache the gradients at its inputs."""
        calibration = self._calibration
        batch, last = calibration.data.read(chunk), segment == calibration.segments.count - 1
        state = dense_inputs(calibration, segment, chunk)
        for each in state:
            each.requires_grad_(True)
        outputs = self._run(model, segment, batch, state=state)
        if last:
            gradients: Sequence[Tensor] = (self._gradient(outputs[0], batch, collector),)
        else:
            gradients = calibration.cache.gradients(segment + 1).read(chunk.batch)
        # An output that depends on none of the layers and inputs of the segment has no gradient.
        reachable = [pair for pair in zip(outputs, gradients, strict=True) if pair[0].requires_grad]
        if reachable:
            torch.autograd.backward([each for each, _ in reachable], [gradient for _, gradient in reachable])
        if not state:
            return
        received = tuple(torch.zeros_like(each) if each.grad is None else each.grad for each in state)
        calibration.cache.gradients(segment).write(chunk.batch, received)
        for place, gradient in enumerate(calibration.segments.new_outputs(segment - 1, received)):
            self._boundary.setdefault(place, _SecondMoment()).add(hidden_rows(gradient, batch.masks))

    def _run(self, model: nn.Module, segment: int, batch: Batch, *, state: State) -> State:
        segments = self._calibration.segments
        # Copies, because a segment may work in place on its inputs, which a leaf does not allow.
        copies = tuple(each.clone() for each in state)
        run: Callable[[], State] = partial(segments.run, model, segment, batch, state=copies)
        if self._embeddings is not None:
            logits = segment == segments.count - 1 and segments.head is None
            run = self._embeddings.watched(run, batch.masks, logits=logits)
        return run()

    def _gradient(self, last: Tensor, batch: Batch, collector: MomentCollector) -> Tensor:
        """The gradient of the sampled loss at what the last segment outputs, with a few rows of logits at a time."""
        calibration, segments = self._calibration, self._calibration.segments
        rows = kept_rows(last.detach(), batch.masks)
        self.predictions += len(rows)
        if self._generator is None:  # the last layer of a model that is spread over devices may lie on any of them
            self._generator = torch.Generator(last.device).manual_seed(calibration.run.seed)
        found, losses = [], []
        for part in torch.split(rows, rows_within(calibration.settings.logit_bytes, segments.width(last))):
            leaf = part.clone().requires_grad_(True)
            with collector.masked(()):
                loss = sampled_loss(self._outputs(leaf), (), calibration.criterion, generator=self._generator)
                loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            found.append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
        if not torch.isfinite(torch.stack(losses)).all():
            raise _overflow(calibration.model, batch, self._layers)
        return with_padding(torch.cat(found), last, batch.masks)

    def _outputs(self, rows: Tensor) -> Tensor:
        """The model's outputs from rows of what the last segment outputs."""
        head, model = self._calibration.segments.head, self._calibration.model
        if head is None or self._embeddings is None:
            return self._calibration.segments.outputs(model, rows)
        [outputs] = self._embeddings.watched(lambda: (head(model, rows[None]),), ())()
        return outputs[0]


@dataclass
class _SecondMoment:
    """Second moment of vectors, gathered batch by batch."""

    product: Tensor | None = None
    positions: int = 0

    def add(self, vectors: Tensor) -> None:
        product = in_float64(vectors.T @ vectors)
        self.product = product if self.product is None else self.product + product
        self.positions += len(vectors)

    def mean(self) -> Tensor:
        """The moment, oas_shrinkage; zero where all vectors are, because the outputs do not depend on them."""
        assert self.product is not None
        if not float(self.product.trace()) > 0:
            return self.product
        return oas_shrinkage(self.product / self.positions, self.positions)


def _has_bias(layer: nn.Module) -> bool:
    """Whether a layer has a bias that takes up the mean of its inputs, so that their covariance counts.

    A transposed convolution has a bias for each channel, but its matrix has rows for each channel and position.
    """
    return getattr(layer, "bias", None) is not None and not isinstance(layer, TRANSPOSED_CONVOLUTIONS)


def _inputs(moments: Moments, *, bias: bool) -> Tensor:
    """The moment of a layer's inputs as its metric has it."""
    inputs = moments.inputs - torch.outer(moments.mean, moments.mean) if bias else moments.inputs
    return oas_shrinkage(inputs, moments.input_positions)


def _head_metric(found: HeadMoments, head: nn.Module, settings: CalibrationSettings) -> Metric:
    """The metric of a head of many classes, with the diagonal of the gradients' moment alone."""
    mean = found.mean if getattr(head, "bias", None) is not None else None
    inputs = found.hidden if mean is None else found.hidden - torch.outer(mean, mean)
    gradients = found.logits if settings.gradient_moments else torch.ones_like(found.logits)
    return Metric(oas_shrinkage(inputs, found.positions), gradients, mean)


def _identity(moment: Tensor) -> Tensor:
    return torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
