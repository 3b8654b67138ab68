"""From measured layers to a plan, by the weights alone or by what calibration says of the loss."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compressor.calibration import Calibration, held_back_divergence
from compressor.errors import BadInput
from compressor.evaluation import EvaluationData
from compressor.factorize import weighted_singular_values
from compressor.opened_model import OpenedModel, open_data_for
from compressor.planning import (
    Budget,
    CalibrationResult,
    FormRequest,
    LayerPlan,
    MeasuredLayer,
    Plan,
    apply_edits,
    choose_ranks,
    default_budget,
    predicted_loss,
    read_plan,
    window_rule_advice,
)
from compressor.rewrite import Rewriting, as_matrix, rewritten_module, weight_file_bytes

# The exponents of the allocation, of which the one with the least loss on held-back data is kept.
ALLOCATION_POWERS = (1.0, 0.5, 0.0)

logger = logging.getLogger(__name__)


def open_calibration_data(
    calibration: str | Path | Iterable[Any] | None, subject: OpenedModel, samples: int, sequence_length: int | None
) -> EvaluationData | Iterable[Any] | None:
    """At most `samples` examples of the training split where calibration names data; what was given otherwise.

    Texts are cut into windows of `sequence_length` tokens, of the model's own length by default.
    """
    if not isinstance(calibration, str | Path):
        if sequence_length is not None:
            raise BadInput(
                "calibration_sequence_length cuts texts, and none were given for calibration",
                remedy="leave it out, or give batches of that length",
            )
        return calibration
    # One window for the moments and one to hold back.
    return open_data_for(
        calibration, subject.checkpoint, "train", samples, sequence_length=sequence_length, least_windows=2
    )


def weighted_layers(
    measured: Sequence[MeasuredLayer], calibrated: Calibration, subject: OpenedModel, device: torch.device
) -> list[MeasuredLayer]:
    """The layers with their singular values in the metric of the loss; what calibration did not reach stays dense."""
    weighted = []
    for m in measured:
        if m.layer.name not in calibrated.metrics:
            weighted.append(replace(m, stays_dense="no calibration example reached it"))
            continue
        matrix = as_matrix(m.layer, subject.checkpoint.read(m.layer.tensor).to(device))
        values = weighted_singular_values(matrix, calibrated.metrics[m.layer.name])
        weighted.append(replace(m, weighted_values=values, uses=calibrated.uses[m.layer.name]))
    return weighted


def plan_ranks(
    subject: OpenedModel,
    measured: Sequence[MeasuredLayer],
    budget: Budget | None,
    given: Plan | str | Path | None,
    form: FormRequest,
    shard_size: int,
    calibrated: Calibration | None,
    device: torch.device,
) -> Plan:
    """A rank and a form for every layer: those of a `given` plan, or what the budget leaves them.

    With calibration the allocation is the one of several that loses least on the data held back. Raises `BadInput` for
    a plan that does not fit the model and for a budget that cannot be met.
    """
    checkpoint = subject.checkpoint
    digest = checkpoint.digest() if checkpoint.source is not None else None
    if given is not None:
        edited = given if isinstance(given, Plan) else read_plan(Path(given))
        where = "the plan" if isinstance(given, Plan) else str(given)
        layers = apply_edits(edited, measured, where)
        if edited.digest is not None and digest is not None and edited.digest != digest:
            logger.warning("the plan was made for other weights than those of %s", subject.name)
        if (edited.calibrated or edited.calibration is not None) and calibrated is None:
            logger.warning("the plan was made with calibration data: pass them too, for factors as good as its ranks")
        applied = Plan(subject.name, digest, Budget("plan"), layers)
        return applied if calibrated is None else measured_plan(subject, measured, applied, calibrated, device)
    chosen = budget or default_budget(measured, subject.recipe.family)

    def file_bytes(layers: tuple[LayerPlan, ...]) -> int:
        plan = Plan(subject.name, digest, chosen, layers)
        return weight_file_bytes(Rewriting(checkpoint, subject.recipe, subject.layers, plan), shard_size)

    advice = None if budget else window_rule_advice(measured, subject.recipe.family, form)
    if calibrated is None:
        layers = choose_ranks(measured, chosen, form, file_bytes)
        return Plan(subject.name, digest, chosen, layers, advice)
    candidates = []
    for power in ALLOCATION_POWERS:
        layers = choose_ranks(measured, chosen, form, file_bytes, power)
        candidate = Plan(subject.name, digest, chosen, layers, advice)
        candidates.append(measured_plan(subject, measured, candidate, calibrated, device, power))
    return min(candidates, key=_held_back_loss)


def measured_plan(
    subject: OpenedModel,
    measured: Sequence[MeasuredLayer],
    plan: Plan,
    calibrated: Calibration,
    device: torch.device,
    power: float | None = None,
) -> Plan:
    """The plan with what it is predicted to cost, and what it costs on the calibration data held back."""
    rewriting = Rewriting(subject.checkpoint, subject.recipe, subject.layers, plan, calibrated.metrics)
    compressed = rewritten_module(rewriting, calibrated.model, device, lambda _name, _error: None)
    loss = held_back_divergence(calibrated, compressed, device)
    if not math.isfinite(loss):
        raise BadInput(
            "the compressed model's predictions on the calibration data are not finite",
            where=subject.name,
            remedy="keep more, or use the model in a wider dtype",
        )
    logger.info("allocation power %s: %.5f nats per prediction on the data held back", power, loss)
    result = CalibrationResult(
        examples=calibrated.examples,
        held_back=calibrated.held_back_examples,
        power=power,
        predicted_loss=predicted_loss(measured, plan.layers),
        held_back_loss=loss,
    )
    return replace(plan, calibration=result)


def _held_back_loss(plan: Plan) -> float:
    assert plan.calibration is not None
    return plan.calibration.held_back_loss
