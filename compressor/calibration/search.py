"""From measured layers to a plan and, with calibration, to the factors that lose least."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.calibration.calibrate import Calibration, holdout_loss, recalibrate
from compressor.calibration.compensation import Compensated, compensate, uncompensated
from compressor.calibration.refinement import refine as refine_factors
from compressor.choices import FormRequest
from compressor.data import EvaluationData, Preprocessing, Sample, open_data
from compressor.errors import BadInput
from compressor.factorize import TiedMetric, spatial_errors, tied_singular_values, weighted_singular_values
from compressor.lowrank import Factors, Rewriting, as_matrix, stored_error, weight_file_bytes
from compressor.model import Model
from compressor.planning import (
    Budget,
    CalibrationResult,
    LayerPlan,
    MeasuredLayer,
    Plan,
    apply_edits,
    choose_ranks,
    default_budget,
    predicted_loss,
    rank_caps,
    read_plan,
    window_rule_advice,
)
from compressor.progress import Progress

# The exponents of the allocation, of which the one with the least loss on holdout data is kept.
ALLOCATION_POWERS = (1.0, 0.5, 0.0)

# How often moments are taken anew at a compressed model, on the way to a budget that the first estimate cannot see.
STAGES = 1

# Whether an allocation in which the window rule caps the ranks is tried too, where the rule applies.
WINDOW_CAPS = True

# Of both losses, predicted and measured: nearer than this factor the second-order estimate is trusted.
TRUSTED = 1.5

# Examples of data that are named.
DEFAULT_SAMPLES = 128

logger = logging.getLogger(__name__)


class NotFinite(BadInput):
    """No allocation of this size gave finite predictions; a larger one may."""


@dataclass(frozen=True)
class PlannedModel:
    """A plan and, with calibration, what is computed of it already: factors by layer, changed statistics by tensor.

    `weighted` are then the layers in the metric of the loss, as the dense model has them.
    """

    plan: Plan
    factors: Mapping[str, Factors] = field(default_factory=dict)
    statistics: Mapping[str, tuple[str, Tensor]] = field(default_factory=dict)
    weighted: Sequence[MeasuredLayer] = ()


def open_calibration_data(
    calibration: Any, preprocessing: Preprocessing, samples: int | None, sequence_length: int | None
) -> EvaluationData:
    """At most `samples` examples, of the training split of built-in data; by default all batches, and 128 of others.

    Texts are cut into windows of `sequence_length` tokens, of the model's own length by default.
    """
    preprocessing = replace(preprocessing, sequence_length=sequence_length or preprocessing.sequence_length)
    # One window for the moments and one to hold back.
    sample = Sample("train", samples, DEFAULT_SAMPLES, least_windows=2, option="calibration")
    data = open_data(calibration, preprocessing, sample)
    if sequence_length is not None and data.batches:
        raise BadInput(
            "calibration_sequence_length cuts texts, and none were given for calibration",
            option="calibration_sequence_length",
            remedy="leave it out, or give batches of that length",
        )
    return data


def plan_ranks(
    subject: Model,
    measured: Sequence[MeasuredLayer],
    budget: Budget | None,
    given: Plan | str | Path | None,
    form: FormRequest,
    shard_size: int,
    calibrated: Calibration | None = None,
    progress: Progress | None = None,
    *,
    weighted: Sequence[MeasuredLayer] | None = None,
    refine: bool = True,
) -> PlannedModel:
    """A rank and a form for every layer: those of a `given` plan, or what the budget leaves them.

    With calibration the allocation is the one of several that loses least on the holdout data, the window rule's caps
    on the ranks among them; compensation and a further stage are kept where they lose less still, and so is fitting the
    factors, with `refine`. Raises `BadInput` for a plan that does not fit the model, or a budget that cannot be met.

    `weighted` is what `weighted_layers` gives, for a caller that plans several times.
    """
    checkpoint = subject.checkpoint
    digest = subject.digest
    chosen = budget or default_budget(measured, subject.recipe.family)
    if given is not None:
        edited = given if isinstance(given, Plan) else read_plan(Path(given))
        where = "the plan" if isinstance(given, Plan) else str(given)
        if edited.digest is not None and digest is not None and edited.digest != digest:
            logger.warning("the plan was made for other weights than those of %s", subject.name)
        if (edited.calibrated or edited.calibration is not None) and calibrated is None:
            logger.warning("the plan was made with calibration data: pass them too, for factors as good as its ranks")
        chosen = Budget("plan")

    def file_bytes(layers: tuple[LayerPlan, ...]) -> int:
        plan = Plan(subject.name, digest, chosen, layers)
        return weight_file_bytes(Rewriting(checkpoint, subject.recipe, subject.layers, plan), shard_size)

    def allocated(layers: Sequence[MeasuredLayer], budget: Budget, power: float = 1.0) -> tuple[LayerPlan, ...]:
        if given is not None:
            return apply_edits(edited, layers, where)
        return choose_ranks(layers, budget, form, file_bytes, power)

    advice = None if budget else window_rule_advice(measured, subject.recipe.family, form)
    if calibrated is None:
        return PlannedModel(Plan(subject.name, digest, chosen, allocated(measured, chosen), advice))
    powers: Sequence[float | None] = ALLOCATION_POWERS if given is None else (None,)
    caps = rank_caps(measured, subject.recipe.family) if WINDOW_CAPS and given is None else {}
    weighted = weighted if weighted is not None else weighted_layers(measured, calibrated)
    search = _Search(weighted, calibrated, allocated, powers, caps, progress)
    best = search.best(chosen)
    for _ in range(STAGES if given is None and not best.as_predicted else 0):
        try:
            halfway = search.best(Budget("keep", math.sqrt(best.kept)))
            fresh = recalibrate(calibrated, halfway.solution.modules, progress)
            anew = replace(search, weighted=weighted_layers(measured, fresh), calibrated=fresh)
            best = min(best, anew.best(chosen), key=lambda found: found.loss)
        except BadInput as error:  # what was found without a stage stands
            logger.info("no stage: %s", error)
    if refine:
        best = min(best, best.with_refined_factors(progress), key=lambda found: found.loss)
    if not math.isfinite(best.loss):
        raise NotFinite(
            "the compressed model's predictions on the calibration data are not finite",
            where=subject.name,
            remedy="keep more, or use the model in a wider dtype",
        )
    result = CalibrationResult(
        examples=calibrated.data.examples,
        holdout=calibrated.data.holdout_examples,
        power=best.power,
        predicted_loss=best.predicted,
        holdout_loss=best.loss,
        capped=best.capped,
        refined=best.refined,
        unit=calibrated.unit,
        unused=calibrated.data.unused,
    )
    factors = _with_errors(calibrated, best)
    layers = tuple(replace(p, error=factors[p.name].error) if p.name in factors else p for p in best.layers)
    plan = Plan(subject.name, digest, chosen, layers, advice, calibration=result)
    return PlannedModel(plan, factors, _by_tensor(subject, best.solution.statistics), weighted)


def _with_errors(calibrated: Calibration, found: _Candidate) -> dict[str, Factors]:
    """The factors that were chosen, each with its error in the metric of the dense model, however they were found."""
    factors = {}
    for plan in found.layers:
        if plan.rank is None:
            continue
        layer, tensors = calibrated.layers[plan.name], found.solution.factors[plan.name]
        weight = getattr(calibrated.model.get_submodule(layer.module), layer.parameter)
        matrix = as_matrix(layer, weight.detach().to(calibrated.device)).to(torch.float64)
        error = stored_error(layer, plan, tensors, matrix, calibrated.metrics.get(plan.name))
        factors[plan.name] = Factors(dict(tensors), error)
    return factors


def _by_tensor(subject: Model, statistics: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """Changed tensors by their names in the checkpoint, with those in the model, and in its dtypes."""
    found = {}
    for name, info in subject.checkpoint.tensors.items():
        in_model = name if subject.architecture is None else subject.architecture.module_name(name)
        if in_model is not None and in_model in statistics:
            found[name] = (in_model, statistics[in_model].to(info.dtype))
    return found


@dataclass(frozen=True)
class _Candidate:
    """Ranks, the layers that they give, and what these cost: to second order, and on the holdout examples.

    The layers of an allocation that is only compared are not kept: each is as large as the compressed model.
    """

    calibrated: Calibration
    layers: tuple[LayerPlan, ...]
    power: float | None
    predicted: float
    loss: float
    solution: Compensated = field(default_factory=lambda: Compensated({}, {}))
    capped: bool = False
    refined: bool = False

    @property
    def kept(self) -> float:
        return sum(p.parameters for p in self.layers) / sum(p.dense_parameters for p in self.layers)

    @property
    def as_predicted(self) -> bool:
        return self.predicted / TRUSTED <= self.loss <= self.predicted * TRUSTED

    def with_solution(self, solution: Compensated) -> _Candidate:
        return replace(self, solution=solution, loss=holdout_loss(self.calibrated, solution.modules))

    def with_refined_factors(self, progress: Progress | None) -> _Candidate:
        return replace(self.with_solution(refine_factors(self.calibrated, self.solution, progress)), refined=True)


@dataclass(frozen=True)
class _Search:
    """What the candidates for a budget are made from."""

    weighted: Sequence[MeasuredLayer]
    calibrated: Calibration
    allocated: Callable[..., tuple[LayerPlan, ...]]
    powers: Sequence[float | None]
    caps: Mapping[str, int]
    progress: Progress | None

    def best(self, budget: Budget) -> _Candidate:
        """The allocation that loses least on the holdout examples, compensated where that loses less.

        Beside those of the powers stands the best of them under the window rule's caps, where these change it.
        """
        candidates = []
        for power in self.powers:
            candidates.append(self._candidate(budget, power))
            if self.progress:
                self.progress("allocate", len(candidates), len(self.powers))
        found = min(candidates, key=lambda each: each.loss)
        if self.caps:
            found = min(found, self._capped(found, budget), key=lambda each: each.loss)
        compensated = found.with_solution(compensate(self.calibrated, found.layers, self.progress))
        allocation = f"{found.power}, capped" if found.capped else f"{found.power}"
        logger.info("allocation power %s: %.5f, compensated %.5f", allocation, found.loss, compensated.loss)
        if compensated.loss < found.loss:
            return compensated
        return replace(found, solution=uncompensated(self.calibrated, found.layers))

    def _candidate(self, budget: Budget, power: float | None) -> _Candidate:
        layers = (
            self.allocated(self.weighted, budget) if power is None else self.allocated(self.weighted, budget, power)
        )
        return self._measured(layers, power)

    def _capped(self, found: _Candidate, budget: Budget) -> _Candidate:
        """The same allocation under the caps; `found` itself where they change nothing."""
        under_caps = [replace(m, rank_cap=self.caps.get(m.layer.name)) for m in self.weighted]
        try:
            layers = self.allocated(under_caps, budget, found.power)
        except BadInput:
            # Whether ranks are found for a size in bytes depends on the file's header, and so a little on the ranks.
            return found
        if layers == found.layers:
            return found
        return replace(self._measured(layers, found.power), capped=True)

    def _measured(self, layers: tuple[LayerPlan, ...], power: float | None) -> _Candidate:
        loss = holdout_loss(self.calibrated, uncompensated(self.calibrated, layers).modules)
        return _Candidate(self.calibrated, layers, power, predicted_loss(self.weighted, layers), loss)


def weighted_layers(measured: Sequence[MeasuredLayer], calibrated: Calibration) -> list[MeasuredLayer]:
    """The layers with their singular values in the metric of the loss; what calibration did not reach stays dense."""
    weighted = []
    for m in measured:
        if m.layer.name not in calibrated.metrics:
            weighted.append(replace(m, stays_dense="no calibration example reached it with an effect on the outputs"))
            continue
        weight = getattr(calibrated.model.get_submodule(m.layer.module), m.layer.parameter)
        assert isinstance(weight, Tensor)
        weight, metric = weight.detach().to(calibrated.device), calibrated.metrics[m.layer.name]
        matrix = as_matrix(m.layer, weight)
        uses, spatial = calibrated.uses[m.layer.name], None
        if isinstance(metric, TiedMetric):
            values = tied_singular_values(matrix, metric)
        else:
            values = weighted_singular_values(matrix, metric)
            spatial = None if m.spatial_values is None else spatial_errors(weight, metric)
        weighted.append(replace(m, weighted_values=values, spatial_errors=spatial, uses=uses))
    return weighted
