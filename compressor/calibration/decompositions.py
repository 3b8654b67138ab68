"""The decomposition of a layer's matrix in its metric: made once, and kept on disk for every rank and candidate."""

from __future__ import annotations

from compressor.calibration.calibrate import Calibration
from compressor.factorize import Decomposition, TiedMetric, decompose, decompose_tied
from compressor.lowrank import as_matrix
from compressor.network import Layer


def decomposition_of(calibration: Calibration, layer: Layer) -> Decomposition:
    """The decomposition of a layer that has a metric, from the cache where it was asked for before."""
    if layer.name in calibration.decompositions:
        return calibration.decompositions[layer.name]
    matrix = as_matrix(layer, calibration.weight(layer))
    metric = calibration.metrics[layer.name]
    if isinstance(metric, TiedMetric):
        found = decompose_tied(matrix, metric)
    else:
        found = decompose(matrix, metric)
        found = found.rounded(matrix, metric, calibration.settings.factorization.float32_loss)
    calibration.decompositions.put(layer.name, found)
    # Read back, so that the numbers lie as in every later run: kernels mind where they begin.
    return calibration.decompositions[layer.name]
