"""Uniform quantizations of the same model, measured beside what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial

import numpy as np
import torch
from torch import nn

from compressor.calibration.calibration import Calibration
from compressor.calibration.holdout import holdout_loss
from compressor.calibration.search import ChosenFactors, PlannedModel, PlanRequest
from compressor.calibration.truncation import only_compared
from compressor.data import EvaluationData
from compressor.engine import Run
from compressor.evaluation import Quality, UniformQuantization, measure_quality
from compressor.factorize import working_bytes
from compressor.forms import DENSE, pair_name, quantization_of
from compressor.io import StoredTensor
from compressor.lowrank import as_matrix, rewritten_module
from compressor.model import Model, on_device
from compressor.network import Layer
from compressor.planning import Budget, LayerPlan, MeasuredLayer, Plan, dense_plan, quantized_forms
from compressor.quantize import Quantization, QuantizationSettings, quantize_to_nearest, scale_dtype
from compressor.torch_state import in_float64

# As other tools round: the scale spans the group.
_SPANNING = QuantizationSettings(scale_step=1.0, scale_rounds=0)


@dataclass(frozen=True)
class QuantizedAlike:
    """A uniform quantization, and what makes the plan and the factors that lead to it."""

    quantization: UniformQuantization
    planned: Callable[[], PlannedModel] = field(repr=False)


def quantized_alike(
    subject: Model,
    measured: Sequence[MeasuredLayer],
    request: PlanRequest,
    *,
    calibration: Calibration | None,
    run: Run,
) -> list[QuantizedAlike]:
    """The model in each of the settings' uniform widths: rounded to nearest, and with calibration by GPTQ too.

    Without calibration they have the relative error of the layers. With it, where its settings say so, what they lose
    on the holdout.
    """
    found = []
    for bits in request.settings.uniform_widths:
        layers = tuple(_in_bits(m, bits) for m in measured)
        if all(plan.rank is None for plan in layers):
            continue
        plan = Plan(subject.name, subject.digest, Budget("bits", bits), layers)
        parameters = sum(each.parameters for each in layers)
        nearest = UniformQuantization(bits, "round to nearest", parameters, request.file_bytes(subject, plan))
        if calibration is not None and calibration.settings.uniform:
            # Without their metrics layers are rounded to nearest.
            plain = replace(calibration, metrics={})
            found.append(_on_holdout(subject, nearest, plan, calibration=plain))
            found.append(_on_holdout(subject, replace(nearest, method="GPTQ"), plan, calibration=calibration))
        else:
            error = run.journal.value(f"int{bits}/error", partial(_error, subject, layers, run))
            found.append(QuantizedAlike(replace(nearest, error=error), partial(PlannedModel, plan)))
    return found


def _in_bits(m: MeasuredLayer, bits: int) -> LayerPlan:
    """A layer in so many bits, at the groups that take the fewest bytes; dense where it has no such form."""
    layer = m.layer
    forms = [form for form in quantized_forms(layer, (bits,), settings=m.settings) if pair_name(form) == DENSE]
    if not forms or m.stays_dense is not None:
        return dense_plan(layer, f"it is not stored in {bits} bits")
    form = min(forms, key=lambda form: int(m.nbytes(form, 0)))
    parameters = int(m.numbers(form, 0))
    if parameters >= layer.stored_parameters:
        return dense_plan(layer, f"in {bits} bits it would not be smaller")
    return LayerPlan(layer.name, layer.shape, layer.kind, 0, form, parameters, 0.0, f"int{bits}")


def _on_holdout(subject: Model, asked: UniformQuantization, plan: Plan, *, calibration: Calibration) -> QuantizedAlike:
    """What it loses there."""
    modules = cache(partial(only_compared, calibration, plan.layers))

    def planned() -> PlannedModel:
        errors = {layer.name: 0.0 for layer in plan.layers if layer.rank is not None}
        return PlannedModel(plan, ChosenFactors(subject.checkpoint, calibration.layers, modules().factors, errors))

    name = f"{calibration.name}/int{asked.bits}/{asked.method}"
    loss = calibration.cache.journal.value(name, lambda: holdout_loss(calibration, modules()))
    return QuantizedAlike(replace(asked, holdout_loss=loss), planned)


@dataclass(frozen=True)
class _Rounded:
    """A layer that is to be rounded to nearest."""

    layer: Layer
    weight: StoredTensor
    quantization: Quantization
    device: torch.device

    @property
    def nbytes(self) -> int:
        return working_bytes(self.layer.shape)


def _relative_error(asked: _Rounded) -> float:
    weight = asked.weight.read().to(asked.device)
    matrix = in_float64(as_matrix(asked.layer, weight))
    if asked.layer.kind == "embedding":
        matrix = matrix.T  # its rows are the vectors
    rounded = quantize_to_nearest(matrix, asked.quantization, scale_dtype=scale_dtype(weight.dtype), settings=_SPANNING)
    size = float(torch.linalg.vector_norm(matrix))
    return float(torch.linalg.vector_norm(rounded.product() - matrix)) / size if size else 0.0


def _error(subject: Model, layers: Sequence[LayerPlan], run: Run) -> float:
    """The root mean square of the layers' relative errors."""
    by_name = {layer.name: layer for layer in subject.layers}

    def asked() -> Iterator[_Rounded]:
        for plan in layers:
            if (quantization := quantization_of(plan.form)) is not None:
                layer = by_name[plan.name]
                yield _Rounded(layer, subject.checkpoint.stored(layer.tensor), quantization, run.job_device)

    found = np.array(list(run.engine.map(_relative_error, asked())))
    return float(np.sqrt(np.square(found).sum() / len(layers)))


def on_data(
    subject: Model, found: Sequence[QuantizedAlike], data: EvaluationData, *, run: Run
) -> list[UniformQuantization]:
    """The same with the loss and the metric on data: of each width what was quantized best."""
    best = {each.quantization.bits: each for each in found}
    return [
        _measured(subject, each, data, run=run) if best[each.quantization.bits] is each else each.quantization
        for each in found
    ]


def _measured(subject: Model, found: QuantizedAlike, data: EvaluationData, *, run: Run) -> UniformQuantization:
    def model() -> nn.Module:
        planned = found.planned()
        rewriting = replace(subject.rewriting(planned.plan), factors=planned.factors)
        return rewritten_module(rewriting, subject.with_separate_experts, run, done=lambda _name, _error: None)

    def measured() -> dict[str, object]:
        built = model()
        with on_device(run.device, built):
            return measure_quality(built, data, device=run.device).recorded()

    asked = found.quantization
    quality = Quality.of_record(run.journal.value(f"int{asked.bits}/{asked.method} on {data.name}", measured))
    return replace(asked, loss=quality.loss, value=quality.value)
