"""Choose a rank and a form for every layer within a budget, with the reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from compressor.choices import FormRequest
from compressor.display import DisplayedLayers
from compressor.formatting import format_percent
from compressor.forms import (
    DENSE,
    Count,
    factorized_shape,
    from_initial,
    has_own_errors,
    pair_forms,
    pair_of,
    stored_bytes,
    stored_parameters,
)
from compressor.initial import InitialFound, Start
from compressor.io import portable_name
from compressor.measure import EPSILON, Spectrum, frobenius_rank, truncation_errors
from compressor.network import Layer
from compressor.planning.allocation import Choices, LimitedChoices, allocate, allocate_within, even_shares
from compressor.planning.budget import Budget
from compressor.planning.drop_search import DropSearch
from compressor.planning.latency import LayerLatency, Seconds, WorkloadLatency
from compressor.planning.settings import PLANNING, PlanningSettings

PLAN_SCHEMA_VERSION = 1

# The relative precision of float64, in which errors are computed.
ROUNDING = float(np.finfo(np.float64).eps)

# `auto` stores every linear layer in whichever pair is smaller at its rank.


@dataclass(frozen=True)
class LayerPlan:
    """The rank, form and size of one eligible layer, and why.

    Attributes:
        name: The layer's name in the checkpoint.
        shape: `(d_out, d_in)` of its matrix.
        kind: What the layer is, as `Layer.kind` says.
        rank: The rank of its pair; None if it stays dense.
        form: The form of its pair, or `dense`.
        parameters: The numbers that it stores.
        error: The relative error of its matrix: in the Frobenius norm, or with calibration in the metric of the loss
            (`Plan.error_name` says which). Of the stored factors once they exist, of the best pair of the rank before.
        reason: Why this rank, in words.
        latency: Seconds of the layer in each workload, dense and as it was chosen; None where speed was not asked for.
        share: The share of its initial weights that a layer in a form of what training wrote still has; None in others.
    """

    name: str
    shape: tuple[int, int]
    kind: str
    rank: int | None
    form: str
    parameters: int
    error: float
    reason: str
    latency: tuple[WorkloadLatency, ...] | None = None
    share: float | None = None

    @property
    def dense_parameters(self) -> int:
        return self.shape[0] * self.shape[1]

    def to_dict(self) -> dict[str, Any]:
        document = asdict(self) | {"shape": list(self.shape)}
        latency, share = document.pop("latency"), document.pop("share")
        document |= {} if latency is None else {"latency": list(latency)}
        return document if share is None else document | {"share": share}


# What a calibrated loss is in: of models that predict classes or tokens, and of all others.
LossUnit = Literal["nats per prediction", "half the squared change of the outputs"]


@dataclass(frozen=True)
class CalibrationResult:
    """How a calibrated plan was chosen, and what it is expected to cost.

    `predicted_loss` is the increase of loss per prediction to second order, and `holdout_loss` the increase measured
    on the holdout examples, against the dense model's own predictions; both in `unit`. Where they differ much the
    second-order estimate no longer holds. `exponent` is the exponent of the allocation that did best there, so that the
    holdout loss is a little optimistic; None where the ranks were given. `capped` tells whether the window rule's
    caps on the ranks lost less there, before compensation, than the allocation without them, and `refined` whether the
    factors are those fitted to the dense blocks, because they lose less there. `unused` says what part of the data
    given was not used, empty if all was, and `made` what the examples are where the model made them itself.
    """

    examples: int
    holdout: int
    exponent: float | None
    predicted_loss: float
    holdout_loss: float
    capped: bool = False
    refined: bool = False
    unit: LossUnit = "nats per prediction"
    unused: str = ""
    made: str = ""


@dataclass(frozen=True, repr=False)
class Plan(DisplayedLayers):
    """The rank and form of every eligible layer of one model: editable as JSON, and applied with `compress(plan=...)`.

    Attributes:
        source: The model.
        digest: The SHA-256 of the checkpoint that was measured; None for a module in memory.
        budget: What was asked for.
        layers: The eligible layers.
        advice: What the measurements suggest, or None.
        calibration: How calibration data chose the ranks, and the loss that is expected; None without.
        calibrated: Whether a plan that was read from a file had been made with calibration data.
        search: How `max_drop` found the size; None for another budget.
        device: The device that it is to be fast on; None where speed was not asked for.
        initial: The initial weights that were looked for, and the layers that have some of them; None where none were.
        schema_version: The version of the JSON document.

    Example:
        >>> plan = compressor.plan("model.safetensors", keep=0.5)
        >>> {layer.name: layer.rank for layer in plan.layers}
        >>> small = compressor.compress("model.safetensors", output="small.safetensors", plan=plan)
    """

    source: str
    digest: str | None
    budget: Budget
    layers: tuple[LayerPlan, ...]
    advice: str | None = None
    calibration: CalibrationResult | None = None
    calibrated: bool = False
    search: DropSearch | None = None
    device: str | None = None
    initial: InitialFound | None = None
    schema_version: int = PLAN_SCHEMA_VERSION

    def __repr__(self) -> str:
        return (
            f"<Plan for {self.source} ({self.budget}): {self.factorized} of {len(self.layers)} layers factorized,"
            f" {format_percent(self.eligible_after, self.eligible_before)} of the eligible parameters kept>"
        )

    @property
    def factorized(self) -> int:
        """How many layers become factor pairs."""
        return sum(layer.rank is not None for layer in self.layers)

    @property
    def eligible_before(self) -> int:
        return sum(layer.dense_parameters for layer in self.layers)

    @property
    def eligible_after(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def error_name(self) -> Literal["relative loss error", "relative Frobenius error"]:
        """What the error of a layer measures."""
        return "relative Frobenius error" if self.calibration is None else "relative loss error"

    @property
    def predicted_latency(self) -> dict[str, float]:
        """Predicted time of all eligible layers together in each workload, as a ratio to the dense ones."""
        known = [layer.latency for layer in self.layers if layer.latency is not None]
        sums = (
            (each[0].workload, sum(of.predicted.chosen for of in each), sum(of.predicted.dense for of in each))
            for each in zip(*known, strict=True)
        )
        return {workload: chosen / dense for workload, chosen, dense in sums if dense > 0}

    def with_errors(self, errors: Mapping[str, float]) -> Plan:
        """The same plan with the errors of what is stored, where they are known."""
        return replace(self, layers=tuple(replace(p, error=errors.get(p.name, p.error)) for p in self.layers))

    def portable(self) -> Plan:
        """The same plan for a file that goes to others, without an absolute path of this machine."""
        search = None if self.search is None else replace(self.search, data=portable_name(self.search.data))
        return replace(self, source=portable_name(self.source), search=search)

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema_version": self.schema_version,
            "source": self.source,
            "digest": self.digest,
            "budget": self.budget.to_dict(),
            "eligible": {"before": self.eligible_before, "after": self.eligible_after},
            "advice": self.advice,
            "calibration": None if self.calibration is None else asdict(self.calibration),
            "search": None if self.search is None else self.search.to_dict(),
            "error_name": self.error_name,
            **({} if self.device is None else {"device": self.device}),
            **({} if self.initial is None else {"initial": self.initial.to_dict()}),
            "layers": [layer.to_dict() for layer in self.layers],
        }


@dataclass(frozen=True)
class MeasuredLayer:
    """An eligible layer with its singular values and what the window rule needs.

    `precision` is the relative precision of the stored numbers and `itemsize` their size in bytes. `above_edge` counts
    the singular values above the edge of what survives of the initialization, `surviving_share` says how much that is,
    and `rank_bound` is the memory window's bound where it is not vacuous; None where unknown. With calibration
    `weighted_values` are the singular values in the metric of the loss, and `uses` how often a prediction uses the
    layer; `stays_dense` says why a layer is not to be touched. A layer that shares a size stores no more than its pair
    of rank `rank_cap`, where there is one and this pair is smaller than the dense layer. Of a matrix `rounding_share`
    is rounding, and no tolerance is below it; `above_rounding` counts the singular values that are larger than any of
    the rounding's. By the name of each form with errors of its own that the layer can become, such as the spatial one,
    `own_values` has the singular values of the matrix that is factorized, and with calibration `own_errors` the
    relative errors of the pairs of rank 0, 1, .. in the metric of the loss. The thresholds are in `settings`.
    Ranks are multiples of `rank_multiple`. Where speed is asked for `latency` knows how long the layer takes, and the
    fastest form is chosen instead of the smallest one. Where the layer correlates with its initial weights, `start`
    says how, and for the forms of what training wrote `own_values` has the singular values of that.
    """

    layer: Layer
    singular_values: Spectrum
    itemsize: int
    precision: float = 0.0
    above_edge: int | None = None
    surviving_share: float | None = None
    unknown_start: str = ""
    rank_bound: int | None = None
    weighted_values: Spectrum | None = None
    uses: float = 1.0
    stays_dense: str | None = None
    rank_cap: int | None = None
    rounding_share: float = 0.0
    above_rounding: int | None = None
    own_values: Mapping[str, Spectrum] = field(default_factory=dict)
    own_errors: Mapping[str, Spectrum] = field(default_factory=dict)
    settings: PlanningSettings = PLANNING
    latency: LayerLatency | None = None
    rank_multiple: int = 1
    start: Start | None = None

    def ranks(self, largest: int, form: str = DENSE) -> npt.NDArray[np.int64]:
        """The ranks that are choices, up to the largest one; in a form of what training wrote from 0 on."""
        return np.arange(0 if from_initial(form) else self.rank_multiple, largest + 1, self.rank_multiple)

    def rounded(self, rank: int) -> int:
        """The smallest rank from a rank on that is a choice."""
        return -(-rank // self.rank_multiple) * self.rank_multiple

    def saves_time(self, form: str, ranks: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether the pairs are enough faster than the dense layer in each workload that uses it.

        Any pair is where speed is not asked for, and of an embedding, which is compressed only where that is asked for.
        """
        if self.latency is None or self.layer.kind == "embedding":
            return np.ones(len(ranks), dtype=np.bool_)
        most = (1 - self.settings.least_time_saving) * self.latency.dense(self.layer)
        return np.asarray((self.latency.seconds(self.layer, form, ranks) <= most[:, None]).all(axis=0))

    def demand(self, form: str, ranks: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """What is least for the best of forms that lose the same: time as a ratio to dense, else stored numbers.

        The ratio is the mean over the workloads.
        """
        if self.latency is not None:
            return np.asarray(self.latency.ratios(self.layer, form, ranks).mean(axis=0))
        return np.asarray(stored_parameters(factorized_shape(self.layer, form), form, ranks), dtype=np.float64)

    def errors(self, form: str) -> Spectrum:
        """Relative error of the pair of rank 0, 1, .. in a form: in the metric of the loss if known, else Frobenius."""
        if not has_own_errors(form):
            return truncation_errors(self.singular_values if self.weighted_values is None else self.weighted_values)
        if form in self.own_errors:
            return self.own_errors[form]
        return truncation_errors(self.own_values[form]) * self.relative_size(form)

    def relative_size(self, form: str) -> float:
        """The norm of what a form with errors of its own factorizes, beside that of the layer's matrix."""
        if not from_initial(form):
            return 1.0
        whole = float(np.linalg.norm(self.singular_values))
        return float(np.linalg.norm(self.own_values[form])) / whole if whole > 0 else 0.0

    def rank_within(self, form: str, tolerance: float) -> int:
        """The smallest rank of a form with errors of its own whose relative Frobenius error is at most a tolerance."""
        size = self.relative_size(form)
        least = 0 if from_initial(form) else 1
        return self.rounded(max(least, frobenius_rank(self.own_values[form], tolerance / size))) if size > 0 else least

    def forms_apart(self, request: FormRequest) -> list[str]:
        """The eligible forms that have errors of their own; of those of what training wrote the one that is asked for.

        A form is asked for where the layer can have it.
        """
        known = [form for form in self.own_values if form not in self.settings.excluded_forms]
        alike = _forms_alike(self.layer, request)
        return [
            form
            for form in known
            if (part := pair_of(form)) is None
            or ((part in alike or has_own_errors(part)) and self._start_gains(form, part))
        ]

    def _start_gains(self, form: str, pair: str) -> bool:
        """Whether a form of what training wrote errs clearly less, at some rank, than the same pair of the layer."""
        written, own = self.errors(form), self.errors(pair)
        ranks = min(len(written), len(own))
        return bool((written[:ranks] < (1 - self.settings.least_start_gain) * own[:ranks]).any())

    @property
    def total(self) -> float:
        """The loss per prediction of dropping the whole layer, to second order; 1 without calibration."""
        if self.weighted_values is None:
            return 1.0
        return self.uses / 2 * float(np.square(self.weighted_values).sum())

    @property
    def window_rule_applies(self) -> bool:
        """Whether little enough of the initialization survives, and some singular value exceeds its edge."""
        return not self.window_rule_obstacle

    @property
    def window_rule_obstacle(self) -> str:
        """Why the window rule does not apply, in a few words; empty where it does."""
        if self.above_edge is None or self.surviving_share is None:
            return self.unknown_start or "how much of the initialization survives is unknown"
        if self.surviving_share > self.settings.largest_surviving_share:
            return f"{self.surviving_share:.0%} of the initialization survives, which is too much"
        return "" if self.above_edge else "no singular value stands above what survives of the initialization"


def form_for(m: MeasuredLayer, rank: int, request: FormRequest) -> str:
    """The form of a pair of the layer's own matrix at this rank: the best, unless one is asked for."""
    forms = _forms_alike(m.layer, request)
    return forms[int(_demands(m, forms, np.array([rank]))[:, 0].argmin())]


def _demands(m: MeasuredLayer, forms: Sequence[str], ranks: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """What each form demands at each rank; infinite where it does not save time."""
    return np.stack([np.where(m.saves_time(form, ranks), m.demand(form, ranks), np.inf) for form in forms])


def _forms_alike(layer: Layer, request: FormRequest) -> list[str]:
    """The forms that lose the same at the same rank; the one that is asked for alone, where the layer can have it."""
    alike = [form.name for form in pair_forms(layer) if not form.has_own_errors]
    return [request] if request in alike else alike


def layer_plan(measured: MeasuredLayer, rank: int, form: str, *, reason: str) -> LayerPlan:
    """The plan for one layer at a rank; dense if the pair would save too little or the layer must stay dense."""
    layer = measured.layer
    if measured.stays_dense is not None:
        return dense_plan(layer, measured.stays_dense)
    sides = factorized_shape(layer, form)
    parameters = stored_parameters(sides, form, rank) if rank <= min(sides) else layer.parameters
    in_bytes = stored_bytes(sides, form, rank, itemsize=measured.itemsize)
    if parameters >= layer.parameters or in_bytes > _most_bytes(measured):
        saving = (
            "not be smaller"
            if parameters >= layer.parameters
            else f"save less than {measured.settings.least_layer_saving:.0%}"
        )
        return dense_plan(layer, f"a pair of rank {rank} ({reason}) would {saving}")
    if (
        measured.latency is not None
        and not from_initial(form)
        and not measured.saves_time(form, np.array([rank])).all()
    ):
        device = measured.latency.profile.name
        return dense_plan(layer, f"a pair of rank {rank} ({reason}) would not be faster on {device}")
    error = float(measured.errors(form)[rank])
    share = measured.start.share if measured.start is not None and from_initial(form) else None
    return LayerPlan(layer.name, layer.shape, layer.kind, rank, form, parameters, error, reason, share=share)


def _most_bytes(m: MeasuredLayer) -> float:
    """The largest size in bytes at which a pair is worth having two products."""
    return (1 - m.settings.least_layer_saving) * stored_bytes(m.layer.shape, DENSE, 0, itemsize=m.itemsize)


def dense_plan(layer: Layer, reason: str) -> LayerPlan:
    """The plan of a layer that stays as it is."""
    return LayerPlan(layer.name, layer.shape, layer.kind, None, DENSE, layer.parameters, 0.0, reason)


def predicted_loss(measured: Sequence[MeasuredLayer], layers: Sequence[LayerPlan]) -> float:
    """Loss per prediction that the ranks of calibrated layers cost to second order, in the unit of the calibration."""
    pairs = zip(measured, layers, strict=True)
    return sum(m.total * layer.error**2 for m, layer in pairs if m.weighted_values is not None)


def plan_by_tolerance(
    measured: Sequence[MeasuredLayer], tolerance: float, request: FormRequest
) -> tuple[LayerPlan, ...]:
    """Every layer at the smallest rank whose relative error is at most `tolerance`, in the smallest form at it.

    What rounding the factors to the layer's own dtype may add is allowed for; a layer whose dtype is coarser than the
    tolerance stays dense.
    """
    return tuple(_layer_by_tolerance(m, tolerance, request) for m in measured)


def _layer_by_tolerance(m: MeasuredLayer, tolerance: float, request: FormRequest) -> LayerPlan:
    reason = f"relative error <= {tolerance:g}"
    if tolerance < m.rounding_share:
        tolerance = m.rounding_share
        reason = f"relative error <= {tolerance:.2g}, which is rounding"
    if tolerance <= m.precision:
        return dense_plan(m.layer, f"rounding to its dtype alone may cost more than {tolerance:g}")
    truncation = math.sqrt(tolerance**2 - m.precision**2)
    rank = max(1, frobenius_rank(m.singular_values, truncation))
    if m.above_rounding is not None and max(1, m.above_rounding) < rank:
        rank, reason = max(1, m.above_rounding), "singular values above those of rounding"
    rank = m.rounded(rank)
    plan = layer_plan(m, rank, form_for(m, rank, request), reason=reason)
    return _better_form(plan, m, truncation, request=request, reason=reason)


def _better_form(
    plan: LayerPlan, m: MeasuredLayer, tolerance: float, *, request: FormRequest, reason: str
) -> LayerPlan:
    """The plan, or the best pair with an error of at most `tolerance` in a form with errors of its own.

    For speed what training wrote is no choice: such a layer takes as long as the dense one.
    """
    apart = [
        layer_plan(m, m.rank_within(form, tolerance), form, reason=reason)
        for form in m.forms_apart(request)
        if m.latency is None or not from_initial(form)
    ]
    return min([plan, *apart], key=lambda each: float(m.demand(each.form, np.array([each.rank or 0]))[0]))


def plan_by_window_rule(measured: Sequence[MeasuredLayer], request: FormRequest) -> tuple[LayerPlan, ...]:
    """Every layer at the rank that training wrote and the spectrum needs, whichever is smaller.

    The number of singular values above the edge of the surviving initialization, the Frobenius rank at 0.1, and the
    memory window's bound where it is not vacuous. A layer of which too little was forgotten, or too little is known,
    gets the tolerance that is safe without data. A spatial pair is taken where it is smaller at the error of 0.1: the
    edge and the bound say nothing of its matrix.
    """
    plans = []
    for m in measured:
        if not m.window_rule_applies or m.above_edge is None:
            plans.append(_layer_by_tolerance(m, m.settings.safe_tolerance, request))
            continue
        tolerance = m.settings.window_rule_tolerance
        ranks = {
            "singular values above the edge of its initialization": m.above_edge,
            f"relative error <= {tolerance:g}": frobenius_rank(m.singular_values, tolerance),
        }
        if m.above_rounding is not None:
            ranks["singular values above those of rounding"] = m.above_rounding
        if m.rank_bound is not None:
            ranks[f"rank bound of the memory window at epsilon {EPSILON:g}"] = m.rank_bound
        reason = min(ranks, key=lambda name: ranks[name])
        rank = m.rounded(max(1, ranks[reason]))
        plan = layer_plan(m, rank, form_for(m, rank, request), reason=f"window rule: {reason}")
        within = f"window rule: relative error <= {tolerance:g}"
        plans.append(_better_form(plan, m, tolerance, request=request, reason=within))
    return tuple(plans)


def plan_by_size(
    measured: Sequence[MeasuredLayer],
    budget: int | None,
    request: FormRequest,
    *,
    unit: Literal["parameters", "bytes"],
    exponent: float = 1.0,
    seconds: Seconds | None = None,
) -> tuple[LayerPlan, ...] | None:
    """Ranks of least summed `dropped loss / total loss ** exponent` with at most `budget` stored parameters or bytes.

    With `seconds` the layers together take at most so many in each workload; the budget may then be None.

    An `exponent` of 0 trusts the second-order loss, which holds while little is removed; 1 is relative to the layer's
    total loss, for when the estimate saturates. `comparable` describes the losses without calibration. None if even
    the smallest rank everywhere is larger.
    """
    choices = [layer_choices(m, request, unit, exponent=exponent) for m in measured]
    return _allocated(measured, choices, budget, seconds=seconds)


def _allocated(
    measured: Sequence[MeasuredLayer],
    choices: Sequence[LayerChoices],
    budget: int | None,
    *,
    seconds: Seconds | None = None,
) -> tuple[LayerPlan, ...] | None:
    chosen = chosen_within(measured, choices, budget, seconds=seconds)
    if chosen is None:
        return None
    plans = []
    for m, each, index in zip(measured, choices, chosen, strict=True):
        if each.forms[index] == DENSE:
            plans.append(dense_plan(m.layer, m.stays_dense or _dense_reason(m, each)))
        else:
            reason = "its share of the budget at least error"
            plans.append(layer_plan(m, int(each.ranks[index]), each.forms[index], reason=reason))
    return tuple(plans)


def _dense_reason(m: MeasuredLayer, choices: LayerChoices) -> str:
    """Why a layer stays dense in an allocation."""
    if m.latency is not None and len(choices.forms) == 1:
        measured = ", as was measured" if m.latency.measured else ""
        return f"every pair that saves bytes would be slower, or hardly faster, on {m.latency.profile.name}{measured}"
    return "keeping it dense is worth its size"


def chosen_within(
    measured: Sequence[MeasuredLayer],
    choices: Sequence[LayerChoices],
    budget: int | None,
    *,
    seconds: Seconds | None = None,
) -> list[int] | None:
    """Index of each layer's choice, with the least total loss within the budget; None if even the smallest exceed it.

    With `seconds` the layers together take at most so many in each workload; the budget may then be None. A file and a
    module list the same layers in different orders. They are allocated in the order of their names, so that neither
    ties nor the rounding of sums depend on it.
    """
    order = sorted(range(len(measured)), key=lambda place: measured[place].layer.name)
    measured, choices = [measured[place] for place in order], [choices[place] for place in order]
    chosen = _chosen(measured, choices, budget, seconds=seconds)
    if chosen is None:
        return None
    if not _in_loss(measured) and any(each.started.any() for each in choices):
        chosen = _with_start_or_without(measured, choices, chosen, budget=budget, seconds=seconds)
    by_place = dict(zip(order, chosen, strict=True))
    return [by_place[place] for place in range(len(order))]


def _with_start_or_without(
    measured: Sequence[MeasuredLayer],
    choices: Sequence[LayerChoices],
    chosen: list[int],
    *,
    budget: int | None,
    seconds: Seconds | None,
) -> list[int]:
    """What was chosen, or the choices without any initial weights, unless these are predicted to lose clearly more.

    What both lose is compared in one unit: beside an even share of the size without initial weights.
    """
    others = [each.unstarted() for each in choices]
    without = _chosen(measured, others, budget, seconds=seconds)
    if without is None:
        return chosen
    size = sum(float(each.choices.cost[index]) for each, index in zip(others, without, strict=True))
    places = [np.flatnonzero(~each.started)[index] for each, index in zip(choices, without, strict=True)]
    alone = _at_even_share(measured, [each.choices for each in others], size)
    losses = [_beside(each.choices, alone.mean(), own).loss for each, own in zip(choices, alone, strict=True)]
    with_start, others_lose = (
        sum(float(loss[index]) for loss, index in zip(losses, each, strict=True)) for each in (chosen, places)
    )
    most = min(m.settings.most_started_loss for m in measured)
    return chosen if with_start <= most * others_lose else [int(place) for place in places]


def _chosen(
    measured: Sequence[MeasuredLayer],
    choices: Sequence[LayerChoices],
    budget: int | None,
    *,
    seconds: Seconds | None,
) -> list[int] | None:
    """`chosen_within` for layers in a fixed order."""
    chosen = (
        None
        if budget is None
        else allocate(_losses_of(measured, choices, [each.choices for each in choices], budget=budget), budget)
    )
    # Whatever loses least at the size alone also does under limits that it keeps.
    kept = seconds is None or (chosen is not None and _within(choices, chosen, seconds))
    if seconds is not None and not kept and (budget is None or chosen is not None):
        chosen = _within_limits(measured, choices, budget, seconds=seconds)
    return chosen


def _in_loss(measured: Sequence[MeasuredLayer]) -> bool:
    """Whether losses are in the unit of the calibration, and so compare between layers."""
    return any(m.weighted_values is not None for m in measured)


def _losses_of(
    measured: Sequence[MeasuredLayer], layers: Sequence[LayerChoices], costed: Sequence[Choices], *, budget: float
) -> list[Choices]:
    """The choices of layers, of a cost, with losses that compare between layers."""
    if _in_loss(measured):
        return list(costed)
    return comparable(measured, costed, [each.started for each in layers], budget=budget)


def _within(choices: Sequence[LayerChoices], chosen: Sequence[int], seconds: Seconds) -> bool:
    taken = [each.seconds[:, index] for each, index in zip(choices, chosen, strict=True)]
    return bool((np.sum(taken, axis=0) <= seconds).all())


def _within_limits(
    measured: Sequence[MeasuredLayer], choices: Sequence[LayerChoices], budget: int | None, *, seconds: Seconds
) -> list[int] | None:
    """The allocation under limits on the time, and on the size where there is a budget."""
    if (seconds <= 0).any():
        return None
    limits = seconds if budget is None else np.append(seconds, budget)
    costs: list[npt.NDArray[np.float64]] = [
        each.seconds if budget is None else np.vstack([each.seconds, each.choices.cost.astype(np.float64)])
        for each in choices
    ]
    # Losses that are to be compared without data are those beside an even share of all limits alike.
    even = np.full(len(limits), 1 / len(limits)) / limits
    mixed = [Choices(even @ cost, each.choices.loss) for cost, each in zip(costs, choices, strict=True)]
    losses = _losses_of(measured, choices, mixed, budget=1.0)
    layers = [LimitedChoices(cost, each.loss) for cost, each in zip(costs, losses, strict=True)]
    return allocate_within(layers, limits)


def comparable(
    measured: Sequence[MeasuredLayer],
    choices: Sequence[Choices],
    started: Sequence[npt.NDArray[np.bool_]],
    *,
    budget: float,
) -> list[Choices]:
    """The choices with losses that compare between layers without data: beside those at an even share of `budget`.

    Were the inputs of every layer alike in all directions, a relative error e would leave the share 1 - e^2 of its
    outputs' energy, shares of layers in a row would multiply, and a layer's part in the loss of the network would be l
    = -log(1 - e^2). But inputs are not alike in all directions, by a factor that differs between layers and is unknown:
    one layer is ruined by an error that another does not notice. The factor cancels in l / l', where l' is what the
    same layer loses when all layers keep the same share of their size. So what is minimized is the sum of `l / mean l'
    + (l / l')^2 / 2`: both views weigh the same near the even share, and far from it the second keeps any layer from
    being given up for the others. Of k layers none loses more than sqrt(3 k) times l', for the even share has 3 k / 2.

    `started` tells which choices are forms of what training wrote. The factor is that of the layer whatever its form,
    and what the layer loses at an even share without them, w, is a second view of it. Nothing but the seed is a choice
    of no size, by which an even share may lose much more than w: l' is at most w. And where training wrote a matrix of
    low rank, an even share loses next to nothing because the form is exact there, not because of the inputs: l' is at
    least the share `least_started_loss` of its mean, or w if that is less.
    """
    own = _at_even_share(measured, choices, budget)
    without = own
    if any(of_start.any() for of_start in started):
        others = [Choices(each.cost[~mask], each.loss[~mask]) for each, mask in zip(choices, started, strict=True)]
        without = _at_even_share(measured, others, budget)
        own = np.minimum(own, without)
    mean = own.mean()
    least = np.array([m.settings.least_started_loss for m in measured]) * mean
    protected = np.maximum(own, np.minimum(without, least))
    return [_beside(each, mean, alone) for each, alone in zip(choices, protected, strict=True)]


def _beside(choices: Choices, mean: float, own: float) -> Choices:
    """The choices of a layer with their losses beside the mean and the layer's own at an even share."""
    return Choices(choices.cost, choices.loss / mean + np.square(choices.loss / own) / 2)


def _at_even_share(measured: Sequence[MeasuredLayer], choices: Sequence[Choices], budget: float) -> Spectrum:
    """What each layer loses at an even share of the budget."""
    even = even_shares(choices, budget)
    # What rounding does to a layer anyway is no loss.
    return np.array(
        [
            each.loss[index] + max(m.precision**2, ROUNDING)
            for m, each, index in zip(measured, choices, even, strict=True)
        ]
    )


def plan_by_file_size(
    measured: Sequence[MeasuredLayer],
    limit: int,
    request: FormRequest,
    *,
    file_bytes: Callable[[tuple[LayerPlan, ...]], int],
    exponent: float = 1.0,
    seconds: Seconds | None = None,
) -> tuple[LayerPlan, ...] | None:
    """The ranks of `plan_by_size` for weight files that have at most `limit` bytes by `file_bytes`.

    What the files hold besides the layers' numbers (other tensors, headers) depends a little on the ranks, so it is
    found by repetition. None when no plan was found within the limit.
    """

    def beside(layers: tuple[LayerPlan, ...]) -> int:
        numbers = sum(
            stored_bytes(factorized_shape(m.layer, layer.form), layer.form, layer.rank or 0, itemsize=m.itemsize)
            for m, layer in zip(measured, layers, strict=True)
        )
        return file_bytes(layers) - numbers

    choices = [layer_choices(m, request, "bytes", exponent=exponent) for m in measured]
    overhead = beside(tuple(dense_plan(m.layer, "") for m in measured))
    best: tuple[int, tuple[LayerPlan, ...]] | None = None
    tried: set[int] = set()
    while overhead not in tried:
        tried.add(overhead)
        layers = _allocated(measured, choices, limit - overhead, seconds=seconds)
        if layers is None:
            break
        size = file_bytes(layers)
        if size <= limit and (best is None or size > best[0]):
            best = (size, layers)
        overhead = beside(layers)
    return best[1] if best else None


def smallest_size(measured: Sequence[MeasuredLayer], request: FormRequest, unit: Literal["parameters", "bytes"]) -> int:
    """What the layers would store at their smallest ranks, the smallest budget that can be met."""
    return sum(int(layer_choices(m, request, unit).choices.cost.min()) for m in measured)


def has_pairs(measured: Sequence[MeasuredLayer], request: FormRequest) -> bool:
    """Whether any layer can become a pair at any rank."""
    return any(form != DENSE for m in measured for form in layer_choices(m, request, "parameters").forms)


def dense_seconds(measured: Sequence[MeasuredLayer]) -> Seconds:
    """Predicted seconds of all dense layers together in each workload."""
    return np.asarray(sum(m.latency.dense(m.layer) for m in measured if m.latency is not None))


def least_seconds(measured: Sequence[MeasuredLayer], request: FormRequest) -> Seconds:
    """The fewest seconds that the layers could take together, in each workload by itself."""
    return np.asarray(sum(layer_choices(m, request, "parameters").seconds.min(axis=1) for m in measured))


def with_latency(measured: Sequence[MeasuredLayer], layers: Sequence[LayerPlan]) -> tuple[LayerPlan, ...]:
    """The plans with the seconds that are predicted of them, where speed is asked for."""
    return tuple(
        plan if m.latency is None else replace(plan, latency=m.latency.of(m.layer, plan.form, plan.rank or 0))
        for m, plan in zip(measured, layers, strict=True)
    )


@dataclass(frozen=True)
class LayerChoices:
    """All choices for one layer: the cost, loss, form, and rank of each.

    `errors` are the relative errors of the choices, and `seconds` what they take in each workload, which are rows;
    there is none where speed is not asked for. The rank of a layer that stays dense is 0.
    """

    choices: Choices
    forms: Sequence[str]
    ranks: npt.NDArray[np.int64]
    errors: Spectrum
    seconds: Seconds

    @property
    def started(self) -> npt.NDArray[np.bool_]:
        """Which choices are forms of what training wrote."""
        return np.array([from_initial(form) for form in self.forms], dtype=np.bool_)

    def unstarted(self) -> LayerChoices:
        """The choices that need no initial weights."""
        rest = np.flatnonzero(~self.started).tolist()
        return LayerChoices(
            Choices(self.choices.cost[rest], self.choices.loss[rest]),
            [self.forms[place] for place in rest],
            self.ranks[rest],
            self.errors[rest],
            self.seconds[:, rest],
        )


def layer_choices(
    m: MeasuredLayer, request: FormRequest, unit: Literal["parameters", "bytes"], *, exponent: float = 1.0
) -> LayerChoices:
    """Every form and rank whose pair saves enough of the dense layer, in bytes and in time, and dense last.

    Under a cap there is no dense choice, and no pair that stores more than the layer's own at the cap: these sizes rise
    with the rank, and the cap says nothing of the matrix of a spatial pair.
    """
    layer = m.layer

    def parameters(form: str, ranks: Count) -> Count:
        return stored_parameters(factorized_shape(layer, form), form, ranks)

    def cost(form: str, ranks: Count) -> Count:
        if unit == "parameters":
            return parameters(form, ranks)
        return stored_bytes(factorized_shape(layer, form), form, ranks, itemsize=m.itemsize)

    largest, capped = layer.parameters - 1, False
    if m.rank_cap is not None and m.stays_dense is None:
        cap = m.rounded(max(1, m.rank_cap))
        at_cap = form_for(m, cap, request), cap
        in_bytes = stored_bytes(layer.shape, *at_cap, itemsize=m.itemsize)
        smaller = cap <= min(layer.shape) and parameters(*at_cap) <= largest and in_bytes <= _most_bytes(m)
        capped = smaller and bool(m.saves_time(at_cap[0], np.array([cap])).all())
        largest = parameters(*at_cap) if capped else largest
    forms: list[str] = []
    ranks, costs, errors, seconds = [], [], [], []
    for form, own in _ranks_of_forms(m, request):
        stored = stored_bytes(factorized_shape(layer, form), form, own, itemsize=m.itemsize)
        fitting = own[(parameters(form, own) <= largest) & (stored <= _most_bytes(m))]
        forms += [form] * len(fitting)
        ranks.append(fitting)
        costs.append(cost(form, fitting))
        errors.append(m.errors(form)[fitting])
        seconds.append(_seconds(m, form, fitting))
    if not capped:
        forms.append(DENSE)
        ranks.append(np.zeros(1, dtype=np.int64))
        costs.append(np.full(1, cost(DENSE, 0)))
        errors.append(np.zeros(1))
        seconds.append(_seconds(m, DENSE, np.zeros(1, dtype=np.int64)))
    error = np.concatenate(errors)
    choices = Choices(np.concatenate(costs), _losses(m, error, exponent))
    return LayerChoices(choices, forms, np.concatenate(ranks), error, np.concatenate(seconds, axis=1))


def _seconds(m: MeasuredLayer, form: str, ranks: npt.NDArray[np.int64]) -> Seconds:
    """What a form takes in each workload; no row where speed is not asked for."""
    return np.zeros((0, len(ranks))) if m.latency is None else m.latency.seconds(m.layer, form, ranks)


def _ranks_of_forms(m: MeasuredLayer, request: FormRequest) -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
    """The ranks at which each form is a choice: of forms that lose the same the best, unless one is asked for."""
    if m.stays_dense is not None:
        return
    ranks = m.ranks(len(m.singular_values))
    alike = _forms_alike(m.layer, request)
    demands = _demands(m, alike, ranks)
    best = demands.argmin(axis=0)
    for place, form in enumerate(alike):
        yield form, ranks[(best == place) & np.isfinite(demands[place])]
    for form in m.forms_apart(request):
        own = m.ranks(len(m.own_values[form]), form)
        # A size that is asked for may be met without becoming faster: such a layer takes as long as the dense one.
        yield form, own if from_initial(form) else own[m.saves_time(form, own)]


def _losses(m: MeasuredLayer, errors: Spectrum, exponent: float) -> Spectrum:
    """What a layer loses by relative errors: see `plan_by_size`, and without calibration `comparable`."""
    squared = np.square(errors)
    if m.weighted_values is None:
        return np.asarray(-np.log1p(-np.minimum(squared, 1 - ROUNDING)))
    return np.asarray((m.total ** (1 - exponent) if m.total > 0 else 0.0) * squared)
