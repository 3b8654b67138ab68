"""From measured layers to a plan and, with calibration, to the factors with the least holdout loss."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from compressor.calibration.calibration import Calibration
from compressor.calibration.candidates import Candidate, Judge, Search
from compressor.calibration.holdout import holdout_loss
from compressor.calibration.weighted_layers import weighted_layers
from compressor.choices import FormRequest
from compressor.errors import BadInput
from compressor.io import Checkpoint, Provenance
from compressor.lowrank import Factors, as_matrix, compressed_artifact, stored_error
from compressor.model import Model
from compressor.network import Layer
from compressor.planning import (
    PLANNING,
    Budget,
    CalibrationResult,
    LayerPlan,
    MeasuredLayer,
    Plan,
    PlanningSettings,
    TimeLimit,
    apply_edits,
    choose_ranks,
    default_budget,
    given_plan,
    plan_by_size,
    predicted_loss,
    rank_caps,
    window_rule_advice,
    with_latency,
)
from compressor.quantize import scale_dtype
from compressor.torch_state import in_float64

logger = logging.getLogger(__name__)


class NotFinite(BadInput):
    """The predictions of every allocation of this size are not finite; those of a larger one may be."""


@dataclass(frozen=True)
class PlannedModel:
    """A plan and, with calibration, the factors by layer and the changed statistics by tensor.

    `weighted` are then the layers in the metric of the loss, as measured at the dense model. The factors are on disk,
    and read when they are asked for; `solution` is what they are called in the journal. `warnings` are sentences about
    the plan. `refine` refines the factors where that is yet to be done.
    """

    plan: Plan
    factors: Mapping[str, Factors] = field(default_factory=dict)
    statistics: Mapping[str, tuple[str, Tensor]] = field(default_factory=dict)
    weighted: Sequence[MeasuredLayer] = ()
    warnings: tuple[str, ...] = ()
    solution: str = ""
    refine: Callable[[], PlannedModel] | None = field(default=None, repr=False, compare=False)

    @property
    def is_refined(self) -> bool:
        """Whether its factors were refined, and lost less for it."""
        return self.plan.calibration is not None and self.plan.calibration.refined


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What a plan must meet: a budget, or the ranks of a given plan; without either the default budget applies.

    `limit` is what a budget that limits the latency comes to. `shard_size` is the most bytes of a weight file, and
    `provenance` is in what a file says of itself: both are part of the size that a budget is about. `bytes_of` says
    that size of what is written in another way, such as a difference.
    """

    budget: Budget | None = None
    given: Plan | str | Path | None = None
    form: FormRequest = "auto"
    shard_size: int
    provenance: Provenance | None = None
    settings: PlanningSettings = PLANNING
    limit: TimeLimit | None = None
    bytes_of: Callable[[Plan], int] | None = None

    def file_bytes(self, subject: Model, plan: Plan) -> int:
        """Size of the weight files that a plan leads to, headers included, without writing them."""
        if self.bytes_of is not None:
            return self.bytes_of(plan)
        rewriting = replace(subject.rewriting(plan), provenance=self.provenance)
        return compressed_artifact(rewriting, self.shard_size).bytes


def plan_ranks(
    subject: Model,
    measured: Sequence[MeasuredLayer],
    request: PlanRequest,
    *,
    calibration: Calibration | None = None,
    weighted: Sequence[MeasuredLayer] | None = None,
    judge: Judge = holdout_loss,
) -> PlannedModel:
    """Choose a rank and a form for every layer: those of a given plan, or those that the budget allows.

    With calibration they are found by a `Search`, and the factors are refined if the settings say so. Raises `BadInput`
    for a plan that does not fit the model, or a budget that cannot be met. `weighted` is the result of
    `weighted_layers`, for a caller that plans several times.
    """
    allocation = Allocation.of(subject, measured, request, calibrated=calibration is not None)
    if calibration is None:
        return allocation.without_data()
    return allocation.searched(calibration, weighted, judge).refined()


def plan_unrefined(
    subject: Model,
    measured: Sequence[MeasuredLayer],
    request: PlanRequest,
    *,
    calibration: Calibration | None = None,
    weighted: Sequence[MeasuredLayer] | None = None,
) -> PlannedModel:
    """The same but for the refinement, which is left to `PlannedModel.refine`."""
    allocation = Allocation.of(subject, measured, request, calibrated=calibration is not None)
    if calibration is None:
        return allocation.without_data()
    searched = allocation.searched(calibration, weighted, holdout_loss)
    # Of many sizes only the best of each is refined.
    searched = replace(searched, found=replace(searched.found, close=()))
    return replace(searched.planned(searched.found), refine=searched.refined if calibration.settings.refine else None)


@dataclass(frozen=True)
class Allocation:
    """What ranks are chosen by: the measured layers and the request; `plan` is without layers yet."""

    subject: Model
    measured: Sequence[MeasuredLayer]
    request: PlanRequest
    plan: Plan
    given: Plan | None
    where: str

    @classmethod
    def of(
        cls, subject: Model, measured: Sequence[MeasuredLayer], request: PlanRequest, *, calibrated: bool
    ) -> Allocation:
        budget = request.budget or default_budget(measured, subject.recipe.family, request.settings)
        advice = None if request.budget else window_rule_advice(measured, subject.recipe.family, request.form)
        given, where = (None, "") if request.given is None else given_plan(request.given)
        if given is not None:
            _warn_of_other_origin(given, subject, calibrated=calibrated)
        device = next((m.latency.profile.name for m in measured if m.latency is not None), None)
        kind = budget if given is None else Budget("plan")
        plan = Plan(subject.name, subject.digest, kind, (), advice, device=device)
        return cls(subject, measured, request, plan, given, where)

    def layers(self, layers: Sequence[MeasuredLayer], budget: Budget, exponent: float = 1.0) -> tuple[LayerPlan, ...]:
        """The ranks and forms of all layers."""
        if self.given is not None:
            return apply_edits(self.given, layers, self.where)
        request = self.request
        return choose_ranks(
            layers, budget, request.form, file_bytes=self._file_bytes, exponent=exponent, limit=request.limit
        )

    def _file_bytes(self, layers: tuple[LayerPlan, ...]) -> int:
        return self.request.file_bytes(self.subject, replace(self.plan, layers=layers))

    def without_data(self) -> PlannedModel:
        layers = with_latency(self.measured, self.layers(self.measured, self.plan.budget))
        return PlannedModel(replace(self.plan, layers=layers))

    def searched(self, calibration: Calibration, weighted: Sequence[MeasuredLayer] | None, judge: Judge) -> Searched:
        """The candidate with the least holdout loss."""
        settings = calibration.settings
        weighted = weighted if weighted is not None else weighted_layers(self.measured, calibration)
        search = Search(
            calibration, weighted, self.layers, settings.exponents, settings.truncation_penalties, judge=judge
        )
        if self.given is not None:
            found = replace(search, exponents=(1.0,), penalties=()).find(self.plan.budget)
            return Searched(self, search, replace(found, exponent=None))
        caps = rank_caps(self.measured, self.subject.recipe.family) if settings.window_caps else {}
        search = replace(search, caps=caps, rounds=settings.recalibration_rounds)
        return Searched(self, search, search.find(self.plan.budget))


@dataclass(frozen=True)
class Searched:
    """The candidate that a search has found, whose factors may be refined."""

    allocation: Allocation
    search: Search
    found: Candidate

    def refined(self) -> PlannedModel:
        return self.planned(self.search.refined(self.found))

    def planned(self, found: Candidate) -> PlannedModel:
        """The plan with the factors of a candidate."""
        subject, measured, calibration = self.allocation.subject, self.allocation.measured, self.search.calibration
        if not math.isfinite(found.loss):
            raise NotFinite(
                "the compressed model's predictions on the calibration data are not finite",
                where=subject.name,
                remedy="keep more, or use the model in a wider dtype",
            )
        weighted, request = self.search.weighted, self.allocation.request
        factors = _with_errors(subject, calibration, found)
        layers = tuple(replace(p, error=factors.errors.get(p.name, p.error)) for p in found.layers)
        layers = with_latency(measured, layers)
        plan = replace(self.allocation.plan, layers=layers, calibration=_result(calibration, found))
        warnings = () if self.allocation.given is not None else _loss_for_speed(weighted, found, request)
        statistics = _by_tensor(subject, found.solved.statistics)
        return PlannedModel(plan, factors, statistics, weighted, warnings, found.name)


def _loss_for_speed(weighted: Sequence[MeasuredLayer], found: Candidate, request: PlanRequest) -> tuple[str, ...]:
    """A warning where a plan for speed is predicted to lose much more than one of the same size would."""
    if found.exponent is None or all(m.latency is None for m in weighted):
        return ()
    alike = [replace(m, latency=None) for m in weighted]
    size = sum(layer.parameters for layer in found.layers)
    layers = plan_by_size(alike, size, request.form, unit="parameters", exponent=found.exponent)
    assert layers is not None, "what is chosen for speed is a choice for size"
    ours, theirs = predicted_loss(weighted, found.layers), predicted_loss(alike, layers)
    if theirs <= 0 or ours <= request.settings.most_loss_for_speed * theirs:
        return ()
    return (
        f"for its speed this model is predicted to lose {ours / theirs:.3g} times what one of its size would with"
        f" `prefer='size'` ({ours:.2g} instead of {theirs:.2g} {found.calibration.unit}): few layers are faster as"
        " pairs here, and these are cut deep; larger batches (`batch`) leave more layers to choose from",
    )


def _warn_of_other_origin(plan: Plan, subject: Model, *, calibrated: bool) -> None:
    """Warn if a plan was made for other weights, or with calibration data that are missing now."""
    if plan.digest is not None and subject.digest is not None and plan.digest != subject.digest:
        logger.warning("the plan was made for other weights than those of %s", subject.name)
    if (plan.calibrated or plan.calibration is not None) and not calibrated:
        logger.warning(
            "the plan was made with calibration data: pass them too, or `calibration='self'` where the model made them"
            " itself, for factors as good as its ranks"
        )


def _result(calibration: Calibration, found: Candidate) -> CalibrationResult:
    return CalibrationResult(
        examples=calibration.data.examples,
        holdout=calibration.data.holdout_examples,
        exponent=found.exponent,
        predicted_loss=found.predicted,
        holdout_loss=found.loss,
        capped=found.menu.capped,
        refined=found.refined,
        unit=calibration.unit,
        unused=calibration.data.unused,
        made=calibration.data.made,
    )


@dataclass(frozen=True, eq=False)
class ChosenFactors(Mapping[str, Factors]):
    """The factors that were chosen, as they are stored, and their errors; tensors are read when they are asked for."""

    checkpoint: Checkpoint
    layers: Mapping[str, Layer]
    tensors: Mapping[str, Mapping[str, Tensor]]
    errors: Mapping[str, float]

    def __getitem__(self, name: str) -> Factors:
        tensors = _in_stored_dtypes(self.checkpoint, self.layers[name], self.tensors[name])
        return Factors(tensors, self.errors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.errors)

    def __len__(self) -> int:
        return len(self.errors)


def _with_errors(subject: Model, calibration: Calibration, found: Candidate) -> ChosenFactors:
    """The factors that were chosen, each with its error in the metric of the dense model."""
    errors = {}
    for plan in found.layers:
        if plan.rank is None:
            continue
        layer = calibration.layers[plan.name]
        tensors = _in_stored_dtypes(subject.checkpoint, layer, found.solved.factors[plan.name])
        matrix = in_float64(as_matrix(layer, calibration.weight(layer)))
        metric = calibration.metrics.get(plan.name)
        start = calibration.start(layer, plan.share)
        errors[plan.name] = stored_error(layer, plan, tensors, matrix=matrix, metric=metric, start=start)
    return ChosenFactors(subject.checkpoint, calibration.layers, found.solved.factors, errors)


def _in_stored_dtypes(checkpoint: Checkpoint, layer: Layer, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Factors in the dtypes of the checkpoint, where the configuration names another one to compute in."""

    def dtype(tensor: str) -> torch.dtype:
        return checkpoint.tensors[checkpoint.aliases.get(tensor, tensor)].dtype

    def stored_in(name: str) -> torch.dtype:
        if layer.bias is not None and name.endswith("bias"):
            return dtype(layer.bias)
        own = dtype(layer.tensor)
        return scale_dtype(own) if name.endswith("weight_scale") else own

    return {
        name: tensor.to(stored_in(name)) if tensor.is_floating_point() else tensor for name, tensor in factors.items()
    }


def _by_tensor(subject: Model, statistics: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """Changed tensors by their names in the checkpoint, with their names in the model, in the checkpoint's dtypes."""
    found = {}
    for name, info in subject.checkpoint.tensors.items():
        in_model = name if subject.architecture is None else subject.architecture.module_name(name)
        if in_model is not None and in_model in statistics:
            found[name] = (in_model, statistics[in_model].to(info.dtype))
    return found
