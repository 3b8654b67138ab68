"""A budget of quality: sizes are tried in memory and measured, until the smallest that holds it is found."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import torch

from compressor.calibration.calibrate import Calibration
from compressor.calibration.search import NotFinite, PlannedModel, plan_ranks, weighted_layers
from compressor.choices import FormRequest
from compressor.data import EvaluationData
from compressor.errors import BadInput, QualityGateNotMet
from compressor.evaluation import Quality, drop_error, measure_quality, quality_drop
from compressor.lowrank import Rewriting, rewritten_module
from compressor.model import Model
from compressor.planning import (
    PLANNING,
    Budget,
    DropSearch,
    LayerPlan,
    MeasuredLayer,
    Trial,
    choose_ranks,
    predicted_loss,
    search_by_drop,
    smallest_found,
    smallest_size,
    within_limit,
)
from compressor.progress import Progress

logger = logging.getLogger(__name__)


def plan_within_drop(
    subject: Model,
    measured: list[MeasuredLayer],
    budget: Budget,
    form: FormRequest,
    shard_size: int,
    calibrated: Calibration | None,
    data: EvaluationData,
    device: torch.device,
    progress: Progress | None,
    *,
    refine: bool = True,
) -> PlannedModel:
    """The smallest plan found whose model is at most the budget worse than it on `data`, by one standard error.

    Raises `QualityGateNotMet`, naming the closest that was tried, when only the dense model is good enough, and
    `BadInput` when the dense model has no finite score, or the budget is none of its metric.
    """
    limit = budget.value
    assert limit is not None
    require_possible_drop(limit, data)
    dense = subject.with_separate_experts
    baseline = measure_quality(dense, data, device=device)
    if not math.isfinite(baseline.value):
        raise BadInput(
            f"the model's own {baseline.metric} on {data.name} is not finite",
            where=subject.name,
            remedy="use the model in a wider dtype, or the data it was trained for",
        )
    layers = measured if calibrated is None else weighted_layers(measured, calibrated)
    eligible = sum(m.layer.parameters for m in measured)
    best: PlannedModel | None = None
    tried: dict[int, Trial] = {}

    def measure(keep: float) -> Trial:
        nonlocal best
        size = Budget("keep", keep)
        try:
            planned = plan_ranks(
                subject, measured, size, None, form, shard_size, calibrated, progress, weighted=layers, refine=refine
            )
        except NotFinite:
            return Trial(keep, round(keep * eligible), math.inf, math.inf)
        stored = planned.plan.eligible_after
        if stored not in tried:
            rewriting = Rewriting(
                subject.checkpoint, subject.recipe, subject.layers, planned.plan, planned.factors, planned.statistics
            )
            compressed = rewritten_module(rewriting, dense, device, lambda _name, _error: None)
            quality = measure_quality(compressed, data, device=device)
            # No change is 0.0, and not -0.0, which would be printed.
            trial = Trial(keep, stored, quality_drop(baseline, quality) + 0.0, drop_error(baseline, quality))
            tried[stored] = trial
            logger.info("keep %.4f: drop %.4g (%s)", keep, trial.drop, baseline.metric)
            if within_limit(trial.bound, limit) and (best is None or stored < best.plan.eligible_after):
                best = planned
            if progress:
                progress("search", len(tried), PLANNING.most_trials)
        return tried[stored]

    # Half a parameter more, so that asking for the smallest size is not rounded to less than it.
    least = min(1.0, (smallest_size(layers, form, "parameters") + 0.5) / eligible)
    first = _first_guess(layers, limit, form, baseline, least, calibrated)
    trials = search_by_drop(measure, limit, eligible=eligible, least=least, first=first)
    if progress:
        progress("search", PLANNING.most_trials, PLANNING.most_trials)
    search = DropSearch(baseline.metric, data.name, baseline.count, limit, trials)
    found = smallest_found([t for t in trials if t.parameters < eligible], limit)
    if found is None or best is None:
        raise QualityGateNotMet(_nothing_holds(subject.name, search))
    return replace(best, plan=replace(best.plan, budget=budget, search=search))


def require_possible_drop(limit: float, data: EvaluationData) -> None:
    """Raise `BadInput` for a drop that the data's metric cannot have, or data that cannot say how sure a drop is."""
    if data.count < 2:
        raise BadInput(
            "one example cannot say how sure a measured drop is", where=data.name, remedy="give more, a hundred or so"
        )
    if data.task != "language-modeling" and limit > 1:
        raise BadInput(
            f"`max_drop` {limit:g} is out of range: the accuracy on {data.name} is a fraction",
            remedy="give a number from 0 to 1, such as 0.01 for one point",
        )


def _first_guess(
    measured: list[MeasuredLayer],
    limit: float,
    form: FormRequest,
    baseline: Quality,
    least: float,
    calibrated: Calibration | None,
) -> float:
    """What to try first: with calibration the size whose predicted loss would be the drop, else the middle.

    A perplexity P becomes P exp(loss). By Pinsker's inequality (Cover and Thomas, Elements of Information Theory, lemma
    11.6.1) the probability that a prediction has of being right falls by at most sqrt(loss / 2).
    """
    middle = max(least, (least + 1) / 2)
    if calibrated is None or limit <= 0:
        return middle
    allowed = math.log1p(limit / baseline.value) if baseline.metric == "perplexity" else 2 * limit**2
    low, high = least, 1.0
    # To one part in a thousand, which is far better than the prediction.
    for _ in range(10):
        keep = (low + high) / 2
        layers: tuple[LayerPlan, ...] = choose_ranks(measured, Budget("keep", keep), form, lambda _: 0)
        if predicted_loss(measured, layers) <= allowed:
            high = keep
        else:
            low = keep
    return max(least, min(high, PLANNING.largest_first_keep))


def _nothing_holds(name: str, search: DropSearch) -> str:
    closest: Trial = min(search.trials, key=lambda trial: (trial.bound, trial.parameters))
    return (
        f"{name}: no size was found that loses at most {search.limit:g} of {search.metric} on {search.data}, in"
        f" {search.evaluations} evaluations; the closest, `keep={closest.keep:.3f}` ({closest.parameters:,} eligible"
        f" parameters), loses {closest.drop:.4g}, and its standard error of {closest.standard_error:.2g} is to be added"
    )
