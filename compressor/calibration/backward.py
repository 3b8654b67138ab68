"""The model run backward a segment at a time, for the moments of its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor.calibration.activation_cache import CachedMetrics
from compressor.calibration.calibration import Calibration, dense_inputs
from compressor.calibration.criterion import hidden_rows, rows_within, sampled_loss
from compressor.calibration.examples import Chunk
from compressor.calibration.forward import backward_chunks, collecting, noted_outputs, overflow
from compressor.calibration.segments import State
from compressor.data import Batch
from compressor.factorize import Metric
from compressor.measure.moments import MomentCollector, Moments, kept_rows, oas_shrinkage, with_padding
from compressor.measure.parameter_moments import ParameterCollector
from compressor.measure.token_frequencies import EmbeddingCollector
from compressor.network import TRANSPOSED_CONVOLUTIONS
from compressor.torch_state import brought_to, in_float64


class BackwardPass:
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
            for chunk in backward_chunks(calibration):
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
            gradients = gradients if self._calibration.settings.gradient_moments else identity(gradients)
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
            whole &= all(gradients.holds(chunk.batch) for chunk in backward_chunks(self._calibration))
        if whole:
            return done
        for name in recorded[:done]:
            journal.drop(name)
        return 0

    def _moments(self, segment: int) -> dict[str, Moments | None]:
        calibration, data, cache = self._calibration, self._calibration.data, self._calibration.cache
        known = cache.inputs(segment) if cache.has_inputs(segment) else None
        backward = backward_chunks(calibration)
        with (
            collecting(calibration, self._layers, segment) as (model, collector),
            torch.enable_grad(),
        ):
            for chunk in data.chunks("fit") if known is None else backward:
                if chunk in backward:
                    with collector.masked(data.read(chunk).masks):
                        self._step(model, segment, chunk, collector=collector)
                else:
                    with torch.no_grad():
                        noted_outputs(calibration, model, segment, chunk=chunk, collector=collector)
            return collector.moments(known)

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
            raise overflow(calibration.model, batch, self._layers)
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


def identity(moment: Tensor) -> Tensor:
    return torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
