"""The decomposition of a layer's matrix in its metric: made once, and kept on disk for every rank and candidate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256

import torch
from torch import Tensor

from compressor.calibration.calibration import Calibration
from compressor.factorize import (
    Decomposition,
    FactorizationSettings,
    GroupedMetric,
    Metric,
    TiedMetric,
    decompose,
    decompose_grouped,
    decompose_tied,
    working_bytes,
)
from compressor.forms import FORMS, Approximations
from compressor.lowrank import as_matrix, written
from compressor.measure import Precision, Spectrum
from compressor.network import Layer
from compressor.torch_state import brought_to, in_float64


def decomposition_of(calibration: Calibration, layer: Layer, start: Tensor | None = None) -> Decomposition:
    """The decomposition of a layer that has a metric, from the cache where it was asked for before.

    With a `start` that of what training wrote, the matrix without it.
    """
    digest = _digest(start)
    if not calibration.decompositions.has(layer.name, digest):
        found = next(iter(calibration.run.engine.map(_decomposed, [in_metric(calibration, layer, start=start)])))
        calibration.decompositions.put(layer.name, found, digest)
    # Read back, so that the numbers lie as in every later run: kernels mind where they begin.
    return calibration.decompositions.get(layer.name, digest)


def decompose_layers(calibration: Calibration, asked: Sequence[tuple[Layer, float | None]]) -> None:
    """Decompose layers that are not in the cache, a layer a job: each matrix without a share of its initial one."""
    made: list[tuple[str, str]] = []

    def missing() -> Iterator[LayerInMetric]:
        for layer, share in asked:
            start = calibration.start(layer, share)
            digest = _digest(start)
            if not calibration.decompositions.has(layer.name, digest):
                made.append((layer.name, digest))
                yield in_metric(calibration, layer, start=start)

    for place, found in enumerate(calibration.run.engine.map(_decomposed, missing())):
        name, digest = made[place]
        calibration.decompositions.put(name, found, digest)


def own_errors(
    calibration: Calibration, asked: Sequence[tuple[Layer, float | None, Sequence[str]]]
) -> Iterator[Mapping[str, Spectrum]]:
    """The errors in the metric, for each layer, of those forms whose errors are not those of a truncated SVD of the
    layer's matrix, or with a share of what training wrote; a layer a job, of the forms that are not in the cache.

    They are relative to what is factorized.
    """
    kept = calibration.decompositions
    made: list[tuple[str, str]] = []

    def missing() -> Iterator[LayerInMetric]:
        for layer, share, forms in asked:
            start = calibration.start(layer, share)
            digest = _digest(start)
            known = kept.errors(layer.name, digest)
            if left := [form for form in forms if form not in known]:
                made.append((layer.name, digest))
                found = decomposition_of(calibration, layer, start)
                yield replace(in_metric(calibration, layer, left, start=start), decomposition=found)

    for place, found in enumerate(calibration.run.engine.map(_own_errors, missing())):
        kept.add_errors(*made[place], found)
    for layer, share, forms in asked:
        known = kept.errors(layer.name, _digest(calibration.start(layer, share)))
        yield {form: known[form] for form in forms}


def _digest(start: Tensor | None) -> str:
    """What a start is called in a cache that other starts may have filled; empty without one."""
    return "" if start is None else sha256(start.cpu().numpy().tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class LayerInMetric:
    """A layer's weight with its metric, its start in a form that has one, and the forms that are asked about.

    `decomposition` is that of what is factorized, where it is needed.
    """

    layer: Layer
    weight: Tensor
    metric: Metric | TiedMetric
    forms: Sequence[str]
    settings: FactorizationSettings
    device: torch.device
    start: Tensor | None = None
    decomposition: Decomposition | None = None

    @property
    def nbytes(self) -> int:
        return working_bytes(self.layer.shape)

    def on_device(self) -> LayerInMetric:
        """The same where it is to be computed, the numbers beginning alike whichever way they came there."""
        metric = self.metric
        if isinstance(metric, TiedMetric):
            metric = TiedMetric(self._metric(metric.lookup), self._metric(metric.head))
        else:
            metric = self._metric(metric)
        start = None if self.start is None else self.placed(self.start)
        found = self.decomposition
        found = None if found is None else replace(found, basis=self.placed(found.basis))
        return replace(self, weight=self.placed(self.weight), metric=metric, start=start, decomposition=found)

    @property
    def matrix(self) -> Tensor:
        """The `d_out x d_in` matrix that is factorized."""
        matrix = as_matrix(self.layer, self.weight)
        return matrix if self.start is None else written(in_float64(matrix), self.start)

    def _metric(self, metric: Metric) -> Metric:
        mean = None if metric.mean is None else self.placed(metric.mean)
        return replace(metric, inputs=self.placed(metric.inputs), gradients=self.placed(metric.gradients), mean=mean)

    def placed(self, tensor: Tensor) -> Tensor:
        return aligned(brought_to(self.device, tensor))


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied where it does not begin as memory of PyTorch's own does: kernels round differently there."""
    return tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()


def in_metric(
    calibration: Calibration, layer: Layer, forms: Sequence[str] = (), *, start: Tensor | None = None
) -> LayerInMetric:
    return LayerInMetric(
        layer=layer,
        weight=calibration.weight(layer),
        metric=calibration.metrics[layer.name],
        forms=forms,
        settings=calibration.settings.factorization,
        device=calibration.run.job_device,
        start=start,
    )


def _decomposed(asked: LayerInMetric) -> Decomposition:
    here = asked.on_device()
    matrix = here.matrix
    if isinstance(here.metric, TiedMetric):
        return decompose_tied(matrix, here.metric)
    if isinstance(here.metric, GroupedMetric):
        return decompose_grouped(matrix, here.layer.groups, here.metric)
    loss = here.settings.float32_loss
    return decompose(matrix, here.metric, Precision(loss=loss)).rounded(matrix, here.metric, loss)


def _own_errors(asked: LayerInMetric) -> Mapping[str, Spectrum]:
    here = asked.on_device()
    approximations = Approximations(
        weight=here.layer,
        matrix=here.matrix,
        metric=here.metric,
        settings=here.settings,
        known=here.decomposition,
    )
    return {form: approximations.errors(FORMS[form]) for form in here.forms}
