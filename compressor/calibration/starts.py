"""How much of its initial weights is in a layer, in the metric of the loss."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressor.calibration.calibration import Calibration
from compressor.calibration.decompositions import decompose_layers, decomposition_of
from compressor.factorize import (
    Decomposition,
    Metric,
    TiedMetric,
    coordinates,
    nearest_kronecker_metric,
    working_bytes,
)
from compressor.initial import Start
from compressor.lowrank import as_matrix
from compressor.network import Layer
from compressor.torch_state import brought_to, in_float64


def starts_in_metric(calibration: Calibration, known: Sequence[tuple[Layer, Start]]) -> Iterator[Start]:
    """The starts of layers with the share that fits best in the metric of the loss, used where the predicted is not.

    As they were where the fit says nothing. A layer is a job.
    """

    def jobs() -> Iterator[_Fit]:
        for layer, start in known:
            left = calibration.start(layer, start.share)
            assert left is not None
            yield _Fit(
                layer=layer,
                weight=calibration.weight(layer),
                left=left,
                share=start.share,
                metric=calibration.metrics[layer.name],
                decomposition=decomposition_of(calibration, layer, left),
                device=calibration.run.job_device,
            )

    decompose_layers(calibration, [(layer, start.share) for layer, start in known])
    for (_, start), fitted in zip(known, calibration.run.engine.map(_fitted, jobs()), strict=True):
        if not math.isfinite(fitted):
            yield start
            continue
        yield replace(start, fitted=fitted, share=start.share if start.share == start.predicted else fitted)


@dataclass(frozen=True)
class _Fit:
    """A layer whose share of its initial matrix is to be fitted in its metric, from what a first `share` of it is.

    The decomposition is that of its matrix without this.
    """

    layer: Layer
    weight: Tensor
    left: Tensor
    share: float
    metric: Metric | TiedMetric
    decomposition: Decomposition
    device: torch.device

    @property
    def nbytes(self) -> int:
        return working_bytes(self.layer.shape)


def _fitted(asked: _Fit) -> float:
    def placed(tensor: Tensor) -> Tensor:
        return brought_to(asked.device, tensor)

    single = nearest_kronecker_metric(asked.metric) if isinstance(asked.metric, TiedMetric) else asked.metric
    metric = Metric(placed(single.inputs), placed(single.gradients))
    found = replace(asked.decomposition, basis=placed(asked.decomposition.basis))
    matrix = in_float64(placed(as_matrix(asked.layer, asked.weight)))
    return asked.share * share_in_metric(matrix, placed(asked.left), metric, decomposition=found)


def share_in_metric(
    matrix: Tensor, initial: Tensor, metric: Metric, *, decomposition: Decomposition, leading: float = 0.5
) -> float:
    """The share a of its initial matrix that a matrix has, by least squares of `W - a W_0` in a metric.

    Both are without the `leading` part of the singular spaces of what training wrote, by the `decomposition` of the
    matrix without about as large a share. Least squares over everything takes what was written there, and happens to
    resemble W_0, for a share of it: for 6 instead of .9, and `W - a W_0` is of full rank then. Not finite where W_0 has
    no size in what is left.
    """
    rank = int(leading * min(matrix.shape))
    if rank > 0:
        pair = decomposition.pair(matrix - initial, rank, metric)
        columns, rows = pair.up, torch.linalg.qr(pair.down.T).Q.T
        matrix, initial = (_beside(each, columns, rows, metric=metric) for each in (matrix, initial))
    size = metric.squared_size(initial)
    together = metric.squared_size(matrix + initial) - metric.squared_size(matrix - initial)
    return together / (4 * size) if size > 0 else math.nan


def _beside(matrix: Tensor, columns: Tensor, rows: Tensor, *, metric: Metric) -> Tensor:
    """A matrix without its projections, in the metric, on some columns and on some rows."""
    left = matrix - columns @ (coordinates(columns, metric.gradients) @ matrix)
    return left - (left @ coordinates(rows.T, metric.inputs).T) @ rows
