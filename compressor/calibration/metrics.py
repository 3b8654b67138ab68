"""From sums over the fit examples to the metric of every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compressor.calibration.activation_cache import CachedMetrics
from compressor.calibration.calibration import Calibration
from compressor.calibration.settings import CalibrationSettings
from compressor.calibration.sums import SegmentSums, add_states
from compressor.factorize import GroupedMetric, Metric
from compressor.measure.moments import Moments, PackedSum, moments_of, oas_shrinkage
from compressor.network import TRANSPOSED_CONVOLUTIONS
from compressor.torch_state import brought_to


class Sums(Protocol):
    """The sums of a calibration's segments, asked for from the last to the first."""

    def sums(self, segment: int) -> SegmentSums:
        """Those of a segment, over the examples that are run backward."""

    def can_begin(self, segment: int) -> bool:
        """Whether a segment, of which later ones are done, can be the first that is asked for."""

    def drop(self, segment: int) -> None:
        """Let go of what a segment was made of."""


@dataclass(frozen=True)
class MeasuredLayers:
    """The metrics and the uses per prediction of the layers that are reached.

    `predictions` is how many the fit examples have that were run backward, and `collected` what embeddings and bare
    parameters were observed to do, by kind.
    """

    metrics: CachedMetrics
    uses: Mapping[str, float]
    predictions: int
    collected: dict[str, dict[str, Tensor]]


def metrics_of(calibration: Calibration, layers: Mapping[str, nn.Module], sums: Sums) -> MeasuredLayers:
    """Find the metrics of the dense model's `layers`, those of a segment at a time, and record them in the journal."""
    cache, journal = calibration.cache, calibration.cache.moments
    metrics, uses, count = cache.metrics(), dict[str, float](), calibration.segments.count
    collected: dict[str, dict[str, Tensor]] = {}
    predictions, done_before = 0, _done_before(calibration, metrics, sums)

    def measured(segment: int) -> dict[str, Any]:
        found = sums.sums(segment)
        if cache.has_inputs(segment):
            found.layers.add(cache.inputs(segment), {})
        for kind, state in found.collected.items():
            add_states(collected.setdefault(kind, {}), state)
        if journal.kept:
            journal.write(f"collected-{segment}", SegmentSums(collected=collected).tensors())
        made = predictions or found.predictions
        kept = _kept(metrics, layers, moments_of(layers, found.layers), settings=calibration.settings)
        boundary = [_of_boundary(found.boundary[place]) for place in sorted(found.boundary)]
        if boundary:
            cache.write_boundary(segment - 1, boundary)
        return {"uses": {name: each.positions / made for name, each in kept.items()}, "predictions": made}

    for done, segment in enumerate(reversed(range(count)), start=1):
        of_segment = journal.value(f"backward-{segment}", partial(measured, segment))
        predictions = of_segment["predictions"]
        for name, used in of_segment["uses"].items():
            metrics.take(name)
            uses[name] = used
        if done == done_before:
            state = journal.read(f"collected-{segment}").items()
            found = SegmentSums.of({key: brought_to(calibration.run.device, each) for key, each in state})
            collected |= found.collected
        sums.drop(segment)
        cache.drop_inputs(segment)
        calibration.run.report("calibrate", done, count)
    return MeasuredLayers(metrics, uses, predictions, collected)


def _kept(
    metrics: CachedMetrics,
    layers: Mapping[str, nn.Module],
    moments: Mapping[str, Moments | None],
    *,
    settings: CalibrationSettings,
) -> dict[str, Moments]:
    """Keep the metrics of layers whose moments are not zero; the moments of these."""
    kept: dict[str, Moments] = {}
    first: dict[Any, tuple[str, Tensor]] = {}  # of the layers that share their inputs
    for name, each in moments.items():
        if each is None or _trace(each.inputs) <= 0 or _trace(each.gradients) <= 0:
            continue  # inputs or gradients that are all zero say nothing about a layer
        bias = _has_bias(layers[name])
        alike = id(each.inputs), each.input_positions, bias
        owner, inputs = first.get(alike) or (None, _inputs(each, bias=bias))
        first.setdefault(alike, (name, inputs))
        gradients = _shrunk(each.gradients, each.positions)
        gradients = gradients if settings.gradient_moments else identity(gradients)
        kind = Metric if gradients.dim() == 2 else GroupedMetric
        metrics.put(name, kind(inputs, gradients, each.mean if bias else None), inputs_of=owner)
        kept[name] = each
    return kept


def _done_before(calibration: Calibration, metrics: CachedMetrics, sums: Sums) -> int:
    """How many segments an interrupted run has measured: none where something of that is damaged."""
    cache = calibration.cache
    journal, count = cache.moments, calibration.segments.count
    recorded = [f"backward-{segment}" for segment in reversed(range(count))]
    done = next((place for place, name in enumerate(recorded) if not journal.knows(name)), count)
    if done == 0:
        return 0
    whole = all(metrics.are_kept(journal.value(name, dict[str, Any])["uses"]) for name in recorded[:done])
    whole &= journal.holds(f"collected-{count - done}")
    whole &= all(cache.has_boundary(segment - 1) for segment in range(count - done, count) if segment > 0)
    whole &= done == count or sums.can_begin(count - done - 1)
    if whole:
        return done
    for name in recorded[:done]:
        journal.drop(name)
    return 0


def _of_boundary(sums: PackedSum) -> Tensor:
    """The second moment of gradients; zero where all of them are, because the outputs do not depend on them."""
    product = sums.product
    if not float(product.trace()) > 0:
        return product
    return oas_shrinkage(product / sums.count, sums.count)


def _has_bias(layer: nn.Module) -> bool:
    """Whether a layer has a bias that takes up the mean of its inputs, so that their covariance counts.

    A transposed convolution has a bias for each channel, but its matrix has rows for each channel and position.
    """
    return getattr(layer, "bias", None) is not None and not isinstance(layer, TRANSPOSED_CONVOLUTIONS)


def _inputs(moments: Moments, *, bias: bool) -> Tensor:
    """The moment of a layer's inputs as its metric has it."""
    mean = moments.mean
    inputs = moments.inputs - mean.unsqueeze(-1) * mean.unsqueeze(-2) if bias else moments.inputs
    return _shrunk(inputs, moments.input_positions)


def _shrunk(moment: Tensor, samples: int) -> Tensor:
    """A moment that is positive definite, or those of groups.

    A group whose vectors are all zero, or as good as that beside the others, gets next to nothing in all directions.
    """
    if moment.dim() == 2:
        return oas_shrinkage(moment, samples)
    least = torch.finfo(torch.float32).eps ** 2 * _trace(moment) / moment.shape[:2].numel()
    blocks = [
        oas_shrinkage(each, samples) if _trace(each) > len(each) * least else least * identity(each) for each in moment
    ]
    return torch.stack(blocks)


def _trace(moment: Tensor) -> float:
    """The trace of a moment, or of those of all groups."""
    return float(moment.diagonal(dim1=-2, dim2=-1).sum())


def identity(moment: Tensor) -> Tensor:
    """The identity of the size of a moment, or as many as there are groups."""
    return torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device).expand_as(moment).contiguous()
