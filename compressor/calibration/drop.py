"""A budget of quality: sizes are tried in memory until the smallest whose measured drop is allowed is found."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import nn

from compressor.arguments import Percent
from compressor.calibration.calibration import Calibration
from compressor.calibration.search import NotFinite, PlannedModel, PlanRequest, plan_unrefined
from compressor.calibration.sent_plans import CalibratedRequest, SentPlan
from compressor.calibration.shared import SharedCalibration
from compressor.calibration.weighted_layers import weighted_layers
from compressor.data import EvaluationData
from compressor.engine import Engine, Fingerprint, Journal, Run
from compressor.errors import BadInput, QualityGateNotMet
from compressor.evaluation import PARTS, Quality, drop_error, measure_quality, quality_drop
from compressor.lowrank import KeptDecompositions, Rewriting, rewritten_factors, rewritten_module
from compressor.model import Model, SentModel, on_device
from compressor.planning import (
    Budget,
    DropSearch,
    MeasuredLayer,
    Sizes,
    Trial,
    choose_ranks,
    predicted_loss,
    search_by_drop,
    smallest_found,
    smallest_size,
    within_limit,
)
from compressor.torch_state import neutral_torch_state

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DropGate:
    """What drops in quality are measured on."""

    data: EvaluationData
    run: Run
    decompositions: KeptDecompositions | None = None

    def baseline(self, subject: Model) -> Quality:
        """The quality of the dense model; `BadInput` where it is not finite."""
        quality = self._measured("quality of the dense model", lambda: subject.streamed)
        if 0 < len(quality.replicates) < PARTS:
            logger.warning(
                "%s has only %d parts to estimate the standard error of a drop in %s from, where %d are better",
                self.data.name,
                len(quality.replicates),
                quality.metric,
                PARTS,
            )
        if not math.isfinite(quality.value):
            raise BadInput(
                f"the model's own {quality.metric} on {self.data.name} is not finite",
                where=subject.name,
                remedy="use the model in a wider dtype, or the data it was trained for",
            )
        return quality

    def quality(self, subject: Model, planned: PlannedModel) -> Quality:
        """That of the model that a plan leads to."""

        def compressed() -> nn.Module:
            rewriting = self._rewriting(subject, planned)
            return rewritten_module(rewriting, subject.streamed, self.run, done=lambda _name, _error: None)

        return self._measured(_name(planned), compressed)

    def qualities(self, subject: Model, planned: Sequence[PlannedModel]) -> Iterator[Quality]:
        """Those of the models that some plans lead to, of several each measured by a job."""
        if len(planned) < 2:
            yield from (self.quality(subject, each) for each in planned)
            return
        journal, data = self.run.journal, self.data.in_memory()
        jobs = (self._job(subject, each, data) for each in planned if not journal.knows(_name(each)))
        measured = self.run.engine.map(_quality, jobs)
        for each in planned:
            yield Quality.of_record(journal.value(_name(each), lambda: next(measured).recorded()))

    def _job(self, subject: Model, planned: PlannedModel, data: EvaluationData) -> _Evaluation:
        """A model that is to be measured, with its factors, of which each was found by a job of its own."""
        rewriting = self._rewriting(subject, planned)
        factors = {
            # On the CPU: the accelerator of a worker is another one.
            layer.name: replace(found, tensors={name: each.cpu() for name, each in found.tensors.items()})
            for layer, _, found in rewritten_factors(rewriting, self.run)
        }
        sent = PlannedModel(planned.plan, factors, planned.statistics)
        return _Evaluation(subject.sent(), sent, data, self.run.job_device)

    def _rewriting(self, subject: Model, planned: PlannedModel) -> Rewriting:
        return replace(
            subject.rewriting(planned.plan),
            factors=planned.factors,
            statistics=planned.statistics,
            decompositions=self.decompositions,
        )

    def _measured(self, name: str, model: Callable[[], nn.Module]) -> Quality:
        """The quality of a model, measured once also by a run that is interrupted."""

        def measured() -> dict[str, Any]:
            return measure_quality(model(), self.data, device=self.run.device, replicates=True).recorded()

        return Quality.of_record(self.run.journal.value(name, measured))


def _name(planned: PlannedModel) -> str:
    """What the quality of the model that a plan leads to is called in the journal."""
    chosen = [(layer.name, layer.form, layer.rank, layer.share) for layer in planned.plan.layers]
    return f"quality of {planned.solution} {chosen}"


@dataclass(frozen=True)
class _Evaluation:
    """A compressed model that is to be measured where its dense one is opened from files."""

    model: SentModel
    planned: PlannedModel
    data: EvaluationData
    device: torch.device


def _quality(asked: _Evaluation) -> Quality:
    return DropGate(asked.data, Run(asked.device)).quality(asked.model.opened(), asked.planned)


@dataclass(frozen=True)
class _Attempt:
    """A size that is to be planned, with calibration, and measured where the dense model is opened from files."""

    model: SentModel
    calibration: SharedCalibration
    measured: Sequence[MeasuredLayer]
    weighted: Sequence[MeasuredLayer]
    request: PlanRequest
    data: EvaluationData
    folder: Path
    stays: bool
    """Whether an interrupted run may go on from what is in the folder."""

    def opened(self) -> Journal:
        """Its journal, once a worker that died has let go of it."""
        assert self.request.budget is not None
        path = self.folder / repr(self.request.budget.value)
        return Journal.open(path, Fingerprint(), option="work_dir", patience=60.0)


@dataclass(frozen=True)
class _Attempted:
    """What an attempt came to: nothing where no prediction is finite; None in its place where it was not made."""

    plan: SentPlan | None = None
    quality: Quality | None = None


def _attempted(asked: _Attempt) -> _Attempted | None:
    """Plan and measure a size, from where a worker that died had left it; None where the files are not seen."""
    if not (asked.folder.is_dir() and asked.calibration.is_seen):
        return None
    journal = asked.opened()
    try:
        with neutral_torch_state():
            return _attempt(asked, journal)
    finally:
        journal.close()


def _attempt(asked: _Attempt, journal: Journal) -> _Attempted:
    subject, device = asked.model.opened(), asked.calibration.device
    with on_device(device, subject.streamed):
        calibration = asked.calibration.opened(subject.streamed, journal)
        planning = CalibratedRequest(subject, asked.measured, asked.request, calibration, asked.weighted)
        try:
            sent = planning.sent(journal)
        except NotFinite:
            return _Attempted()
        gate = DropGate(asked.data, calibration.run)
        planned = planning.received(sent, journal)
        assert planned is not None
        found = _Attempted(sent, gate.quality(subject, planned))
    if not asked.stays:
        planning.keep_factors_alone(journal)
    return found


@dataclass(frozen=True)
class _Received:
    """What an attempt came to, in the process of the search."""

    planned: PlannedModel | None = None
    quality: Quality | None = None


def _in_workers(planning: CalibratedRequest, gate: DropGate, keeps: Sequence[float]) -> Iterator[_Received | None]:
    """Plan and measure sizes with calibration in the workers of a run, a size in each; None where these do not see its
    files."""
    run = gate.run
    folder = run.journal.folder("attempts").absolute()  # workers may be at work in another one
    model, calibration, data = (
        planning.subject.sent(),
        SharedCalibration.of(planning.calibration),
        gate.data.in_memory(),
    )
    sizes = [replace(planning, request=replace(planning.request, budget=Budget("keep", keep))) for keep in keeps]
    asked = [
        _Attempt(
            model=model,
            calibration=calibration,
            measured=each.measured,
            weighted=each.weighted,
            request=each.request,
            data=data,
            folder=folder,
            stays=run.journal.kept,
        )
        for each in sizes
    ]
    for size, attempt, attempted in zip(sizes, asked, run.engine.map(_attempted, asked), strict=True):
        found = None if attempted is None else _received(size, attempt, attempted)
        if found is None:
            logger.warning(
                "a size is planned in this process: not all workers see %s; give a work folder (`work_dir`) that all"
                " machines share",
                folder,
            )
        yield found


def _received(size: CalibratedRequest, asked: _Attempt, attempted: _Attempted) -> _Received | None:
    """What a worker has found; None where its factors are not here: another machine may have a folder of that name."""
    if attempted.plan is None:
        return _Received()
    journal = asked.opened()
    if not asked.stays:
        journal.go_with_object()
    planned = size.received(attempted.plan, journal)
    return None if planned is None else _Received(planned, attempted.quality)


class Planner(Protocol):
    """Makes a plan for a size, whose factors are yet to be refined; `plan_unrefined` or a stand-in."""

    def __call__(
        self,
        subject: Model,
        measured: Sequence[MeasuredLayer],
        request: PlanRequest,
        *,
        calibration: Calibration | None = None,
        weighted: Sequence[MeasuredLayer] | None = None,
    ) -> PlannedModel: ...


def tried_at_once(subject: Model, data: EvaluationData, engine: Engine) -> int:
    """How many sizes are tried at a time: as many as there are workers, if these can open the model."""
    return engine.workers if subject.files is not None and data.metric is None else 1


def plan_within_drop(
    subject: Model,
    measured: Sequence[MeasuredLayer],
    request: PlanRequest,
    *,
    gate: DropGate,
    calibration: Calibration | None = None,
    planner: Planner = plan_unrefined,
) -> PlannedModel:
    """Find the smallest plan whose model is worse than the dense one by at most the budget, one standard error added.

    Sizes are tried without refinement. Then the smallest that holds is refined, and the next smaller ones of those that
    were tried, as long as they hold. As many sizes are tried at a time as there are workers: without calibration these
    measure what is planned here, and with it each plans its size too, whatever the `planner`.

    Raises `QualityGateNotMet`, naming the closest size that was tried, when only the dense model is good enough, and
    `BadInput` when the dense model has no finite score, or the budget is out of its metric's range.
    """
    budget, settings = request.budget, request.settings
    assert budget is not None
    limit = budget.value
    assert limit is not None
    require_possible_drop(limit, gate.data)
    baseline = gate.baseline(subject)
    layers = measured if calibration is None else weighted_layers(measured, calibration)
    eligible = sum(m.layer.parameters for m in measured)
    at_once = tried_at_once(subject, gate.data, gate.run.engine)
    refined = settings.most_refined if calibration is not None and calibration.settings.refine else 0
    most = at_once * settings.rounds(at_once) + refined
    trials = _Trials(
        subject=subject,
        gate=gate,
        baseline=baseline,
        limit=limit,
        eligible=eligible,
        kept=max(1, refined),
        most=most,
    )

    def planned_at(keep: float) -> PlannedModel | None:
        at_size = replace(request, budget=Budget("keep", keep))
        try:
            return planner(subject, measured, at_size, calibration=calibration, weighted=layers)
        except NotFinite:
            return None

    def measure(keeps: Sequence[float]) -> list[Trial]:
        if calibration is None or at_once == 1:
            return trials.measure(keeps, [planned_at(keep) for keep in keeps])
        planning = CalibratedRequest(subject, measured, request, calibration, layers)
        plans, qualities = list[PlannedModel | None](), dict[str, Quality]()
        for keep, found in zip(keeps, _in_workers(planning, gate, keeps), strict=True):
            plans.append(planned_at(keep) if found is None else found.planned)
            if found is not None and found.planned is not None and found.quality is not None:
                qualities[_name(found.planned)] = found.quality
        return trials.measure(keeps, plans, qualities)

    # Half a parameter more, so that asking for the smallest size is not rounded to less than it.
    least = min(1.0, (smallest_size(layers, request.form, "parameters") + 0.5) / eligible)
    predictable = calibration is not None and limit > 0 and baseline.higher_is_better is None
    first = _first_guess(layers, request, trials, least=least) if predictable else None
    sizes = Sizes(eligible, least, max(least, (least + 1) / 2) if first is None else first, at_once)
    tried = search_by_drop(measure, limit, sizes, settings=settings)
    refinements = list(trials.refined())
    tried = (*tried, *(each.trial for each in refinements))
    gate.run.report("search", most, most)
    search = DropSearch(baseline.metric, gate.data.name, baseline.count, limit, tried, baseline.higher_is_better)
    plans = [*trials.candidates, *refinements]
    found = smallest_found([each.trial for each in plans], limit)
    if found is None:
        raise QualityGateNotMet(_nothing_holds(subject.name, search))
    [chosen] = [each.planned for each in plans if each.trial is found]
    return replace(chosen, plan=replace(chosen.plan, budget=budget, search=search))


def within_drop(subject: Model, planned: PlannedModel, *, gate: DropGate, limit: float) -> PlannedModel:
    """The plan itself, with the drop that was measured; `QualityGateNotMet` where it is larger than the limit.

    One standard error is added to the drop. Raises `BadInput` as `plan_within_drop`.
    """
    require_possible_drop(limit, gate.data)
    baseline = gate.baseline(subject)
    share = planned.plan.eligible_after / planned.plan.eligible_before
    trial = _trial(share, planned, gate.quality(subject, planned), baseline=baseline)
    gate.run.report("search", 1, 1)
    search = DropSearch(
        baseline.metric, gate.data.name, baseline.count, limit, (trial,), higher_is_better=baseline.higher_is_better
    )
    if not within_limit(trial.bound, limit):
        raise QualityGateNotMet(
            f"{subject.name}: what {planned.plan.budget} allows loses {trial.drop:.4g} of {baseline.metric} on"
            f" {gate.data.name}, and its standard error of {trial.standard_error:.2g} is to be added: more than"
            f" `max_drop` {limit:g}; keep more, or allow a larger drop"
        )
    return replace(planned, plan=replace(planned.plan, search=search))


@dataclass(frozen=True)
class _Measured:
    """A plan, and what its model loses."""

    trial: Trial
    planned: PlannedModel


@dataclass(kw_only=True)
class _Trials:
    """The sizes that were tried, by the number of parameters that they store, and the plans that may be chosen.

    These `candidates` are the smallest that holds, and of smaller ones the largest, `kept` in all. There are at most
    `most` trials.
    """

    subject: Model
    gate: DropGate
    baseline: Quality
    limit: float
    eligible: int
    kept: int
    most: int
    by_size: dict[int, Trial] = field(default_factory=dict)
    candidates: list[_Measured] = field(default_factory=list)

    def measure(
        self,
        keeps: Sequence[float],
        plans: Sequence[PlannedModel | None],
        qualities: Mapping[str, Quality] = MappingProxyType({}),
    ) -> list[Trial]:
        """The trials of some sizes by their plans, of which there are none where nothing is finite.

        Of some the `qualities` are known, by what they are called in the journal.
        """
        asked = list(zip(keeps, plans, strict=True))
        by_size = {each.plan.eligible_after: (keep, each) for keep, each in asked if each is not None}
        new = [each for size, each in by_size.items() if size not in self.by_size]
        found = self.gate.qualities(self.subject, [each for _, each in new if _name(each) not in qualities])
        for keep, planned in new:
            name = _name(planned)
            quality = qualities[name] if name in qualities else next(found)
            self._add(_Measured(_trial(keep, planned, quality, baseline=self.baseline), planned))
            self.gate.run.report("search", len(self.by_size), self.most)
        return [
            Trial(keep, round(keep * self.eligible), math.inf, math.inf)
            if each is None
            else self.by_size[each.plan.eligible_after]
            for keep, each in asked
        ]

    def _add(self, new: _Measured) -> None:
        """Note a size that was tried, and keep its plan if it may be chosen."""
        self.by_size[new.trial.parameters] = new.trial
        among = [each for each in (*self.candidates, new) if each.trial.parameters < self.eligible]
        best = smallest_found([each.trial for each in among], self.limit)
        largest = self.eligible if best is None else best.parameters
        among = [each for each in among if each.trial.parameters <= largest]
        self.candidates = sorted(among, key=lambda each: -each.trial.parameters)[: self.kept]

    def refined(self) -> Iterator[_Measured]:
        """The candidates refined, the largest first, as long as they hold; measured are those whose loss fell."""
        for count, candidate in enumerate(self.candidates, start=1):
            if candidate.planned.refine is None:
                return
            trial, refined = candidate.trial, candidate.planned.refine()
            if refined.is_refined:
                quality = self.gate.quality(self.subject, refined)
                trial = _trial(trial.keep, refined, quality, baseline=self.baseline)
                self.gate.run.report("search", len(self.by_size) + count, self.most)
                yield _Measured(trial, refined)
            if not within_limit(trial.bound, self.limit):
                return


def _trial(keep: float, planned: PlannedModel, quality: Quality, *, baseline: Quality) -> Trial:
    """What the model of a plan, of that quality, loses."""
    # No change is 0.0, and not -0.0, which would be printed.
    drop, error = quality_drop(baseline, quality) + 0.0, drop_error(baseline, quality)
    how = ", refined" if planned.is_refined else ""
    logger.info("keep %.4f%s: drop %.4g (%s)", keep, how, drop, baseline.metric)
    return Trial(keep, planned.plan.eligible_after, drop, error, planned.is_refined)


def require_possible_drop(limit: float, data: EvaluationData) -> None:
    """Raise `BadInput` for a drop out of the metric's range, or data of too few examples for a standard error."""
    if data.count < 2:
        one, more = ("one batch", "ten") if data.batches else ("one example", "a hundred")
        what = f"{one} cannot say how sure a measured drop is"
        raise BadInput(what, where=data.name, remedy=f"give more, {more} or so")
    of_accuracy = data.metric is None and data.task != "language-modeling"
    if isinstance(limit, Percent) and not of_accuracy:
        measured = "a metric of your own" if data.metric is not None else "perplexity"
        what = f"`max_drop` {100 * limit:g}% is of accuracy, and {data.name} is measured in {measured}"
        raise BadInput(what, option="max_drop", remedy="give it in that unit, such as 0.5")
    if of_accuracy and limit > 1:
        raise BadInput(
            f"`max_drop` {limit:g} is out of range: the accuracy on {data.name} is a fraction",
            option="max_drop",
            remedy="give a number from 0 to 1, such as 0.01 for one point",
        )


def _first_guess(measured: Sequence[MeasuredLayer], request: PlanRequest, trials: _Trials, *, least: float) -> float:
    """The size whose predicted loss is the allowed drop; `measured` are the layers in the metric of the loss.

    A perplexity P becomes P exp(loss). By Pinsker's inequality (Cover and Thomas, Elements of Information Theory, lemma
    11.6.1) the probability that a prediction has of being right falls by at most sqrt(loss / 2).
    """
    limit, baseline = trials.limit, trials.baseline
    allowed = math.log1p(limit / baseline.value) if baseline.metric == "perplexity" else 2 * limit**2
    low, high = least, 1.0
    # To one part in a thousand, far closer than the prediction is.
    for _ in range(10):
        keep = (low + high) / 2
        layers = choose_ranks(measured, Budget("keep", keep), request.form, file_bytes=lambda _: 0)
        if predicted_loss(measured, layers) <= allowed:
            high = keep
        else:
            low = keep
    return max(least, min(high, request.settings.largest_first_keep))


def _nothing_holds(name: str, search: DropSearch) -> str:
    closest: Trial = min(search.trials, key=lambda trial: (trial.bound, trial.parameters))
    return (
        f"{name}: no size was found that loses at most {search.limit:g} of {search.metric} on {search.data}, in"
        f" {search.evaluations} evaluations; the closest, `keep={closest.keep:.3f}` ({closest.parameters:,} eligible"
        f" parameters), loses {closest.drop:.4g}, and its standard error of {closest.standard_error:.2g} is to be added"
    )
