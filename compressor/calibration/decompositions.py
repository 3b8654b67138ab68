"""The decomposition of a layer's matrix in its metric: made once, and kept on disk for every rank and candidate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressor.calibration.calibration import Calibration
from compressor.factorize import (
    Decomposition,
    FactorizationSettings,
    Metric,
    TiedMetric,
    decompose,
    decompose_tied,
    working_bytes,
)
from compressor.forms import FORMS
from compressor.lowrank import as_matrix
from compressor.measure import Precision, Spectrum
from compressor.network import Layer
from compressor.torch_state import brought_to


def decomposition_of(calibration: Calibration, layer: Layer) -> Decomposition:
    """The decomposition of a layer that has a metric, from the cache where it was asked for before."""
    decompose_layers(calibration, [layer])
    # Read back, so that the numbers lie as in every later run: kernels mind where they begin.
    return calibration.decompositions[layer.name]


def decompose_layers(calibration: Calibration, layers: Sequence[Layer]) -> None:
    """Decompose the layers that have a metric and are not in the cache, a layer a job."""
    missing = [layer for layer in layers if layer.name in calibration.metrics]
    missing = [layer for layer in missing if layer.name not in calibration.decompositions]
    decomposed = calibration.run.engine.map(_decomposed, (_in_metric(calibration, layer) for layer in missing))
    for layer, found in zip(missing, decomposed, strict=True):
        calibration.decompositions.put(layer.name, found)


def own_errors(
    calibration: Calibration, forms: Sequence[tuple[Layer, Sequence[str]]]
) -> Iterator[Mapping[str, Spectrum]]:
    """The errors in the metric, for each layer, of those forms that have errors of their own; a layer a job."""
    jobs = (_in_metric(calibration, layer, names) for layer, names in forms)
    return calibration.run.engine.map(_own_errors, jobs)


@dataclass(frozen=True)
class _InMetric:
    """A layer's weight with its metric, and the forms that are asked about."""

    layer: Layer
    weight: Tensor
    metric: Metric | TiedMetric
    forms: Sequence[str]
    settings: FactorizationSettings
    device: torch.device

    @property
    def nbytes(self) -> int:
        return working_bytes(self.layer.shape)

    def on_device(self) -> _InMetric:
        """The same where it is to be computed, the numbers beginning alike whichever way they came there."""
        metric = self.metric
        if isinstance(metric, TiedMetric):
            metric = TiedMetric(self._metric(metric.lookup), self._metric(metric.head))
        else:
            metric = self._metric(metric)
        return replace(self, weight=self._placed(self.weight), metric=metric)

    def _metric(self, metric: Metric) -> Metric:
        mean = None if metric.mean is None else self._placed(metric.mean)
        return Metric(self._placed(metric.inputs), self._placed(metric.gradients), mean)

    def _placed(self, tensor: Tensor) -> Tensor:
        return aligned(brought_to(self.device, tensor))


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied where it does not begin as memory of PyTorch's own does: kernels round differently there."""
    return tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()


def _in_metric(calibration: Calibration, layer: Layer, forms: Sequence[str] = ()) -> _InMetric:
    return _InMetric(
        layer=layer,
        weight=calibration.weight(layer),
        metric=calibration.metrics[layer.name],
        forms=forms,
        settings=calibration.settings.factorization,
        device=calibration.run.job_device,
    )


def _decomposed(asked: _InMetric) -> Decomposition:
    here = asked.on_device()
    matrix = as_matrix(here.layer, here.weight)
    if isinstance(here.metric, TiedMetric):
        return decompose_tied(matrix, here.metric)
    loss = here.settings.float32_loss
    return decompose(matrix, here.metric, Precision(loss=loss)).rounded(matrix, here.metric, loss)


def _own_errors(asked: _InMetric) -> Mapping[str, Spectrum]:
    here = asked.on_device()
    assert isinstance(here.metric, Metric)
    return {form: FORMS[form].errors_in(here.weight, here.metric, here.settings) for form in here.forms}
