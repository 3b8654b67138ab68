"""From measured layers to a plan and, with calibration, to the factors with the least holdout loss."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.calibration.activation_cache import CachedFactors
from compressor.calibration.calibrate import recalibrate
from compressor.calibration.calibration import Calibration
from compressor.calibration.compensation import (
    Compensated,
    compensate,
    only_compared,
    uncompensated,
)
from compressor.calibration.decompositions import decompose_layers, decomposition_of, own_errors
from compressor.calibration.holdout import holdout_loss
from compressor.calibration.refinement import refine
from compressor.calibration.replacements import Replacements, with_statistics
from compressor.calibration.settings import CALIBRATION, CalibrationSettings
from compressor.calibration.starts import starts_in_metric
from compressor.choices import FormRequest
from compressor.data import EvaluationData, Preprocessing, Sample, open_data
from compressor.engine import Journal
from compressor.errors import BadInput
from compressor.forms import FORMS, InitialForm, PairForm, from_initial
from compressor.io import Checkpoint, Provenance
from compressor.lowrank import Factors, as_matrix, compressed_artifact, stored_error
from compressor.measure import Spectrum, truncation_errors
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
from compressor.torch_state import in_float64

logger = logging.getLogger(__name__)

# Chooses a rank and a form for every layer within a budget, by an exponent; raises `BadInput` if it cannot be met.
Allocate = Callable[[Sequence[MeasuredLayer], Budget, float], tuple[LayerPlan, ...]]

# The loss of a calibrated model with other modules in their places, by which candidates are compared.
Judge = Callable[[Calibration, Mapping[str, nn.Module]], float]


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


def open_calibration_data(
    calibration: Any,
    preprocessing: Preprocessing,
    *,
    samples: int | None,
    sequence_length: int | None,
    settings: CalibrationSettings = CALIBRATION,
) -> EvaluationData:
    """Open at most `samples` examples; of built-in data those of the training split.

    By default all batches of data in batches are used, and 128 examples of other data. Texts are cut into windows of
    `sequence_length` tokens, by default the model's own length.
    """
    preprocessing = replace(preprocessing, sequence_length=sequence_length or preprocessing.sequence_length)
    # One window to fit and one holdout window.
    sample = Sample("train", samples, settings.samples, least_windows=2, option="calibration")
    data = open_data(calibration, preprocessing, sample)
    if sequence_length is not None and data.batches:
        raise BadInput(
            "calibration_sequence_length cuts texts, and none were given for calibration",
            option="calibration_sequence_length",
            remedy="leave it out, or give batches of that length",
        )
    return data


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What a plan must meet: a budget, or the ranks of a given plan; without either the default budget applies.

    `limit` is what a budget that limits the latency comes to. `shard_size` is the most bytes of a weight file, and
    `provenance` is in what a file says of itself: both are part of the size that a budget is about.
    """

    budget: Budget | None = None
    given: Plan | str | Path | None = None
    form: FormRequest = "auto"
    shard_size: int
    provenance: Provenance | None = None
    settings: PlanningSettings = PLANNING
    limit: TimeLimit | None = None

    def file_bytes(self, subject: Model, plan: Plan) -> int:
        """Size of the weight files that a plan leads to, headers included, without writing them."""
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
    allocation = _Allocation.of(subject, measured, request, calibrated=calibration is not None)
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
    allocation = _Allocation.of(subject, measured, request, calibrated=calibration is not None)
    if calibration is None:
        return allocation.without_data()
    searched = allocation.searched(calibration, weighted, holdout_loss)
    return replace(searched.planned(searched.found), refine=searched.refined if calibration.settings.refine else None)


@dataclass(frozen=True)
class SentPlan:
    """A plan without refinement from another process, whose factors are in a journal that both processes see.

    `calibrated` is what the calibration is called whose factors they are, `errors` are those of the layers, and `moved`
    are the statistics of batch normalizations by place.
    """

    plan: Plan
    solution: str
    calibrated: str
    errors: Mapping[str, float]
    statistics: Mapping[str, tuple[str, Tensor]]
    moved: Mapping[str, Mapping[str, Tensor]]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class CalibratedRequest:
    """A request for a plan of a calibrated model, which may be planned for in another process."""

    subject: Model
    measured: Sequence[MeasuredLayer]
    request: PlanRequest
    calibration: Calibration
    weighted: Sequence[MeasuredLayer]

    def sent(self, journal: Journal) -> SentPlan:
        """The plan without refinement, its factors kept in the journal.

        Raises `BadInput` as `plan_unrefined`.
        """
        searched = self._allocation.searched(self.calibration, self.weighted, holdout_loss)
        found, planned = searched.found, searched.planned(searched.found)
        kept = self._factors(journal)
        for name, tensors in found.solved.factors.items():
            kept.put(name, tensors)
        assert found.exponent is not None
        # On the CPU: the accelerator of a worker is another one.
        return SentPlan(
            plan=planned.plan,
            solution=planned.solution,
            calibrated=found.calibration.name,
            errors={plan.name: plan.error for plan in planned.plan.layers if plan.rank is not None},
            statistics={name: (place, each.cpu()) for name, (place, each) in planned.statistics.items()},
            moved={
                place: {name: each.cpu() for name, each in named.items()} for place, named in found.solved.moved.items()
            },
            warnings=planned.warnings,
        )

    def keep_factors_alone(self, journal: Journal) -> None:
        """Remove what the factors were found by, which nobody goes on from."""
        journal.keep_only(_FOUND)

    def received(self, sent: SentPlan, journal: Journal) -> PlannedModel | None:
        """The plan as one of this process, its factors read from the journal; None where they are not there."""
        if not all(journal.part(_FOUND).holds(name) for name in sent.errors):
            return None
        calibration, result = replace(self.calibration, name=sent.calibrated), sent.plan.calibration
        assert result is not None
        factors, model = self._factors(journal), calibration.model
        for name in sent.errors:
            factors.take(name)
        moved = {place: with_statistics(model.get_submodule(place), each) for place, each in sent.moved.items()}
        low_rank = [plan for plan in sent.plan.layers if plan.rank is not None]
        found = Candidate(
            calibration,
            sent.plan.layers,
            result.exponent,
            result.predicted_loss,
            result.holdout_loss,
            Compensated(Replacements(calibration, low_rank, factors, moved=moved)),
            result.capped,
            name=sent.solution,
        )
        allocation, settings = self._allocation, calibration.settings
        search = Search(self.calibration, self.weighted, allocation.layers, settings.exponents)
        return PlannedModel(
            sent.plan,
            _ChosenFactors(self.subject.checkpoint, calibration.layers, factors, sent.errors),
            sent.statistics,
            self.weighted,
            sent.warnings,
            sent.solution,
            refine=_Searched(allocation, search, found).refined if settings.refine else None,
        )

    @property
    def _allocation(self) -> _Allocation:
        return _Allocation.of(self.subject, self.measured, self.request, calibrated=True)

    def _factors(self, journal: Journal) -> CachedFactors:
        return CachedFactors(self.calibration.run.device, journal.part(_FOUND))


# The part of a journal that the factors of a sent plan are in.
_FOUND = "found"


@dataclass(frozen=True)
class _Allocation:
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
    ) -> _Allocation:
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

    def searched(self, calibration: Calibration, weighted: Sequence[MeasuredLayer] | None, judge: Judge) -> _Searched:
        """The candidate with the least holdout loss."""
        settings = calibration.settings
        weighted = weighted if weighted is not None else weighted_layers(self.measured, calibration)
        search = Search(calibration, weighted, self.layers, settings.exponents, judge=judge)
        if self.given is not None:
            found = replace(search, exponents=(1.0,)).find(self.plan.budget)
            return _Searched(self, search, replace(found, exponent=None))
        caps = rank_caps(self.measured, self.subject.recipe.family) if settings.window_caps else {}
        search = replace(search, caps=caps, rounds=settings.recalibration_rounds)
        return _Searched(self, search, search.find(self.plan.budget))


@dataclass(frozen=True)
class _Searched:
    """The candidate that a search has found, whose factors may be refined."""

    allocation: _Allocation
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
        capped=found.capped,
        refined=found.refined,
        unit=calibration.unit,
        unused=calibration.data.unused,
        made=calibration.data.made,
    )


@dataclass(frozen=True, eq=False)
class _ChosenFactors(Mapping[str, Factors]):
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


def _with_errors(subject: Model, calibration: Calibration, found: Candidate) -> _ChosenFactors:
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
    return _ChosenFactors(subject.checkpoint, calibration.layers, found.solved.factors, errors)


def _in_stored_dtypes(checkpoint: Checkpoint, layer: Layer, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Factors in the dtypes of the checkpoint, where the configuration names another one to compute in."""

    def dtype(tensor: str) -> torch.dtype:
        return checkpoint.tensors[checkpoint.aliases.get(tensor, tensor)].dtype

    bias = None if layer.bias is None else dtype(layer.bias)
    return {
        name: tensor.to(bias if bias is not None and name.endswith("bias") else dtype(layer.tensor))
        if tensor.is_floating_point()
        else tensor
        for name, tensor in factors.items()
    }


def _by_tensor(subject: Model, statistics: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """Changed tensors by their names in the checkpoint, with their names in the model, in the checkpoint's dtypes."""
    found = {}
    for name, info in subject.checkpoint.tensors.items():
        in_model = name if subject.architecture is None else subject.architecture.module_name(name)
        if in_model is not None and in_model in statistics:
            found[name] = (in_model, statistics[in_model].to(info.dtype))
    return found


@dataclass(frozen=True)
class Candidate:
    """Ranks, the layers that they give, and their loss: predicted to second order, and on the holdout.

    The solution of an allocation that is only compared is not kept: on disk it is as large as the compressed model.
    `name` is that of the solution in the journal.
    """

    calibration: Calibration
    layers: tuple[LayerPlan, ...]
    exponent: float | None
    predicted: float
    loss: float
    solution: Compensated | None = None
    capped: bool = False
    refined: bool = False
    name: str = ""

    @property
    def solved(self) -> Compensated:
        """The solution, of a candidate that is not only compared."""
        assert self.solution is not None
        return self.solution

    @property
    def kept(self) -> float:
        """Share of the parameters that are kept."""
        return sum(p.parameters for p in self.layers) / sum(p.dense_parameters for p in self.layers)

    @property
    def as_predicted(self) -> bool:
        """Whether the second-order estimate can be trusted."""
        factor = self.calibration.settings.trust_factor
        return self.predicted / factor <= self.loss <= self.predicted * factor


@dataclass(frozen=True)
class Search:
    """A search for the ranks and factors with the least holdout loss within a budget.

    `weighted` are the layers in the metric of the loss. `caps` are the ranks that the window rule allows, by layer;
    `judge` computes the loss of a candidate.
    """

    calibration: Calibration
    weighted: Sequence[MeasuredLayer]
    allocate: Allocate
    exponents: Sequence[float]
    caps: Mapping[str, int] = field(default_factory=dict)
    rounds: int = 0
    judge: Judge = holdout_loss

    def find(self, budget: Budget) -> Candidate:
        """Find the best candidate, compensated where that lowers its loss.

        Where the second-order estimate of what truncation alone costs cannot be trusted, there are rounds of
        recalibration before: the moments are taken again at a model that is compressed half as far.
        """
        if not self._compares:
            return self._only(budget)
        best = self.best(budget)
        for _ in range(0 if best.as_predicted else self.rounds):
            try:
                best = min(best, self._halfway(best).best(budget), key=_loss)
            except BadInput as error:  # the candidate so far remains the best
                logger.info("no recalibration: %s", error)
        best = replace(self, calibration=best.calibration)._compensated(best)
        # What follows needs none of the moments that were taken again, and they go with their calibration.
        return replace(best, calibration=replace(self.calibration, name=best.calibration.name))

    def _halfway(self, found: Candidate) -> Search:
        """The search by the moments at a model that is compressed half as far: by the square root of the share kept."""
        assert found.exponent is not None
        layers = self.allocate(self.weighted, Budget("keep", math.sqrt(found.kept)), found.exponent)
        again = recalibrate(self.calibration, only_compared(self.calibration, layers), _name(layers))
        return replace(self, weighted=weighted_layers(self.weighted, again), calibration=again)

    def refined(self, found: Candidate) -> Candidate:
        """The candidate with refined factors, if the settings say so and the loss falls."""
        if not self.calibration.settings.refine:
            return found
        name = f"{found.calibration.name}/refined/{_name(found.layers)}"
        refined = self._solved(found, refine(found.calibration, found.solved, name), name)
        return min(found, replace(refined, refined=True), key=_loss)

    def best(self, budget: Budget) -> Candidate:
        """The allocation with the least loss, its layers truncated as they are.

        Besides those by each exponent, the best of them is tried under the window rule's caps, and without initial
        weights, where that changes it.
        """
        candidates = []
        for exponent in self.exponents:
            candidates.append(self._measured(self.allocate(self.weighted, budget, exponent), exponent))
            self.calibration.run.report("allocate", len(candidates), len(self.exponents))
        found = min(candidates, key=_loss)
        if self.caps:
            capped = [replace(m, rank_cap=self.caps.get(m.layer.name)) for m in self.weighted]
            found = min(found, self._tried(capped, found, budget, capped=True), key=_loss)
        if any(m.start is not None for m in self.weighted):
            found = min(found, self._tried(_without_starts(self.weighted), found, budget), key=_loss)
        return found

    def _only(self, budget: Budget) -> Candidate:
        """The only candidate there is."""
        [exponent] = self.exponents
        found = self._candidate(self.allocate(self.weighted, budget, exponent), exponent, math.inf)
        self.calibration.run.report("allocate", 1, 1)
        return self._solved(found, uncompensated(self.calibration, found.layers), self._truncated_name(found))

    def _compensated(self, found: Candidate) -> Candidate:
        """The candidate with its layers refitted, if the settings say so and the loss falls."""
        if self.calibration.settings.compensate:
            name = f"{self.calibration.name}/compensated/{_name(found.layers)}"
            compensated = self._solved(found, compensate(self.calibration, found.layers, name), name)
            allocation = f"{found.exponent}, capped" if found.capped else f"{found.exponent}"
            logger.info("allocation exponent %s: %.5f, compensated %.5f", allocation, found.loss, compensated.loss)
            if compensated.loss < found.loss:
                return compensated
        solution = uncompensated(self.calibration, found.layers)
        return replace(found, solution=solution, name=self._truncated_name(found))

    @property
    def _compares(self) -> bool:
        """Whether there is more than one candidate: else the only one is made once, as it will be stored."""
        more = len(self.exponents) > 1 or bool(self.caps) or any(m.start is not None for m in self.weighted)
        return more or self.calibration.settings.compensate

    def _truncated_name(self, found: Candidate) -> str:
        return f"{self.calibration.name}/truncated/{_name(found.layers)}"

    def _solved(self, found: Candidate, solution: Compensated, name: str) -> Candidate:
        judged = partial(self.judge, found.calibration, solution.modules)
        loss = found.calibration.cache.journal.value(f"{name}/loss", judged)
        return replace(found, solution=solution, loss=loss, name=name)

    def _tried(
        self, measured: Sequence[MeasuredLayer], found: Candidate, budget: Budget, *, capped: bool = False
    ) -> Candidate:
        """The allocation by the same exponent with fewer choices; `found` itself where they change nothing."""
        assert found.exponent is not None
        try:
            layers = self.allocate(measured, budget, found.exponent)
        except BadInput:
            # Whether ranks are found for a size in bytes depends on the file's header, and so a little on the ranks.
            return found
        if layers == found.layers:
            return found
        return replace(self._measured(layers, found.exponent), capped=capped)

    def _measured(self, layers: tuple[LayerPlan, ...], exponent: float) -> Candidate:
        def judged() -> float:
            return self.judge(self.calibration, only_compared(self.calibration, layers))

        name = f"{self.calibration.name}/loss/{_name(layers)}"
        loss = self.calibration.cache.journal.value(name, judged)
        return self._candidate(layers, exponent, loss)

    def _candidate(self, layers: tuple[LayerPlan, ...], exponent: float, loss: float) -> Candidate:
        return Candidate(self.calibration, layers, exponent, predicted_loss(self.weighted, layers), loss)


def _without_starts(weighted: Sequence[MeasuredLayer]) -> list[MeasuredLayer]:
    """The layers without the forms that begin at initial weights."""

    def of_matrix(values: Mapping[str, Spectrum]) -> dict[str, Spectrum]:
        return {form: each for form, each in values.items() if not from_initial(form)}

    return [
        replace(m, start=None, own_values=of_matrix(m.own_values), own_errors=of_matrix(m.own_errors)) for m in weighted
    ]


def _name(layers: Sequence[LayerPlan]) -> str:
    """The name of a plan in the journal: a digest of its ranks, forms, and shares of the initial weights."""
    chosen = json.dumps([[layer.name, layer.form, layer.rank, layer.share] for layer in layers])
    return hashlib.sha256(chosen.encode()).hexdigest()[:16]


def _loss(candidate: Candidate) -> float:
    return candidate.loss


def weighted_layers(measured: Sequence[MeasuredLayer], calibration: Calibration) -> list[MeasuredLayer]:
    """The layers with their singular values in the metric of the loss; a layer that no example reached stays dense.

    Of a layer with a start the share is the predicted one where that is used, else the best fit in this metric.
    """
    reached = [m for m in measured if m.layer.name in calibration.metrics]
    decompose_layers(calibration, [(m.layer, None) for m in reached])
    starts = starts_in_metric(calibration, [(m.layer, m.start) for m in reached if m.start is not None])
    reached = [m if m.start is None else replace(m, start=next(starts)) for m in reached]
    decompose_layers(calibration, [(m.layer, m.start.share) for m in reached if m.start is not None])
    found = own_errors(calibration, [asked for m in reached for asked in _asked(m)])
    weighted = {}
    for m in reached:
        own: dict[str, Spectrum] = {}
        for _ in _asked(m):
            own |= next(found)
        weighted[m.layer.name] = _weighted(m, calibration, own)
    unreached = "no calibration example reached it with an effect on the outputs"
    return [weighted.get(m.layer.name) or replace(m, stays_dense=unreached) for m in measured]


def _asked(m: MeasuredLayer) -> list[tuple[Layer, float | None, Sequence[str]]]:
    """The forms of a layer whose errors are not those of a truncated SVD: of its matrix, and of what training wrote."""
    of_layer = [form for form in m.own_values if not from_initial(form)]
    of_written = [form for form in m.own_values if _of_own_errors(FORMS[form])]
    share = None if m.start is None else m.start.share
    asked = ((m.layer, None, of_layer), (m.layer, share, of_written))
    return [(layer, share, forms) for layer, share, forms in asked if forms]


def _of_own_errors(form: PairForm) -> bool:
    """Whether what training wrote errs otherwise in a form than its truncated SVD."""
    return isinstance(form, InitialForm) and form.pair.has_own_errors


def _weighted(m: MeasuredLayer, calibration: Calibration, own: Mapping[str, Spectrum]) -> MeasuredLayer:
    """A layer with its values in the metric; what training wrote errs relative to the whole layer too."""
    values, errors = decomposition_of(calibration, m.layer).values, dict(own)
    if m.start is not None:
        written = decomposition_of(calibration, m.layer, calibration.start(m.layer, m.start.share)).values
        total, of_written = (float(np.square(each).sum()) for each in (values, written))
        relative = math.sqrt(of_written / total) if total > 0 else 0.0
        for form in m.own_values:
            if from_initial(form):
                errors[form] = relative * (own[form] if form in own else truncation_errors(written))
    return replace(m, weighted_values=values, own_errors=errors, uses=calibration.uses[m.layer.name])
