"""Layers truncated, and quantized where the plan says so, each by itself in the metric of the dense model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from compressor.calibration.activation_cache import CachedFactors
from compressor.calibration.calibration import Calibration
from compressor.calibration.decompositions import LayerInMetric, decomposition_of, in_metric
from compressor.calibration.replacements import Compensated, Replacements
from compressor.forms import FORMS, quantization_of
from compressor.lowrank import DenseWeights, approximate, as_matrix, stored_tensors, written
from compressor.model import evaluation_mode
from compressor.network import Layer
from compressor.planning import LayerPlan
from compressor.torch_state import in_float64


def uncompensated(calibration: Calibration, planned: Sequence[LayerPlan]) -> Compensated:
    """Truncate and quantize every layer by itself, in the metric of the dense model."""
    factors = CachedFactors(calibration.run.device, calibration.run.journal.temporary())
    rewritten = [plan for plan in planned if plan.rank is not None]
    with evaluation_mode(calibration.run.device, calibration.model):
        for plan, tensors in zip(rewritten, by_themselves(calibration, rewritten), strict=True):
            factors.put(plan.name, tensors)
    return Compensated(Replacements(calibration, rewritten, factors))


def only_compared(calibration: Calibration, planned: Sequence[LayerPlan]) -> Replacements:
    """The modules of `uncompensated` for a comparison: of the same matrices, in the forms that are found fastest, and
    quantized in one pass."""
    alike = [each if each.rank is None else replace(each, form=FORMS[each.form].compared.name) for each in planned]
    settings = calibration.settings
    quick = replace(settings, factorization=replace(settings.factorization, quantization_rounds=0))
    return uncompensated(replace(calibration, settings=quick), alike).modules


def truncated(calibration: Calibration, plan: LayerPlan) -> dict[str, Tensor]:
    """The tensors of a layer by itself."""
    layer = calibration.layers[plan.name]
    dense = calibration.model.get_submodule(layer.module)
    metric = calibration.metrics.get(plan.name)
    matrix, bias = matrix_and_bias(calibration, layer, dense)
    start = calibration.start(layer, plan.share)
    found = None if metric is None else decomposition_of(calibration, layer, start)
    settings = calibration.settings.factorization
    pair = approximate(layer, plan, written(matrix, start), metric=metric, settings=settings, decomposition=found)
    weights = DenseWeights(matrix, bias, getattr(dense, layer.parameter).dtype, start)
    return stored_tensors(layer, plan, pair, dense=weights, metric=metric)


def matrix_and_bias(calibration: Calibration, layer: Layer, dense: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight as a matrix in float64, and the bias."""
    bias = None if layer.kind == "parameter" else getattr(dense, "bias", None)
    wide = in_float64(as_matrix(layer, calibration.weight(layer)))
    return wide, None if bias is None else bias.detach().to(calibration.run.device)


def by_themselves(calibration: Calibration, planned: Sequence[LayerPlan]) -> Iterator[dict[str, Tensor]]:
    """The tensors of layers; to quantize one is a job, made once for all candidates that have it so."""
    names, rounds = set(quantize_by_themselves(calibration, planned)), _rounds(calibration)
    for plan in planned:
        if plan.name in names:
            yield calibration.decompositions.quantized(plan, rounds)
        else:
            yield truncated(calibration, plan)


def quantize_by_themselves(calibration: Calibration, planned: Sequence[LayerPlan]) -> list[str]:
    """Quantize those layers that are planned so, a layer a job, and keep them; their names."""
    kept, rounds = calibration.decompositions, _rounds(calibration)
    quantized = [p for p in planned if quantization_of(p.form) is not None and p.name in calibration.metrics]
    missing = [plan for plan in quantized if not kept.has_quantized(plan, rounds)]
    asked = (_to_quantize(calibration, plan) for plan in missing)
    for plan, tensors in zip(missing, calibration.run.engine.map(_quantized, asked), strict=True):
        kept.put_quantized(plan, rounds, tensors)
    return [plan.name for plan in quantized]


def _rounds(calibration: Calibration) -> int:
    return calibration.settings.factorization.quantization_rounds


@dataclass(frozen=True)
class _ToQuantize:
    """A layer that is to be quantized in its metric, as planned."""

    inside: LayerInMetric
    plan: LayerPlan
    bias: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.inside.nbytes


def _to_quantize(calibration: Calibration, plan: LayerPlan) -> _ToQuantize:
    layer = calibration.layers[plan.name]
    start = calibration.start(layer, plan.share)
    _, bias = matrix_and_bias(calibration, layer, calibration.model.get_submodule(layer.module))
    found = decomposition_of(calibration, layer, start) if FORMS[plan.form].truncates else None
    return _ToQuantize(replace(in_metric(calibration, layer, start=start), decomposition=found), plan, bias)


def _quantized(asked: _ToQuantize) -> dict[str, Tensor]:
    here, plan, layer = asked.inside.on_device(), asked.plan, asked.inside.layer
    bias = None if asked.bias is None else here.placed(asked.bias)
    matrix, settings, found = in_float64(here.matrix), here.settings, here.decomposition
    pair = approximate(layer, plan, matrix, metric=here.metric, settings=settings, decomposition=found)
    dense = DenseWeights(in_float64(as_matrix(layer, here.weight)), bias, here.weight.dtype, here.start)
    return stored_tensors(layer, plan, pair, dense=dense, metric=here.metric)
