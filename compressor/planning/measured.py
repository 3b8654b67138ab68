"""What is known of an eligible layer when its rank is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from compressor.choices import FormRequest
from compressor.forms import (
    DENSE,
    Count,
    factorized_shape,
    from_initial,
    has_own_errors,
    least_rank,
    pair_forms,
    pair_name,
    pair_of,
    quantization_of,
    stored_bytes,
    stored_parameters,
)
from compressor.initial import Start
from compressor.measure import Spectrum, frobenius_rank, truncation_errors
from compressor.network import Layer
from compressor.planning.latency import LayerLatency, Seconds
from compressor.planning.plan import LayerPlan, dense_plan
from compressor.planning.settings import PLANNING, PlanningSettings

# The relative precision of float64, in which errors are computed.
ROUNDING = float(np.finfo(np.float64).eps)


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
    says how, and for the forms of what training wrote `own_values` has the singular values of that. The loss of forms
    that truncate is multiplied by `truncation_penalty` where choices are compared; an infinite one leaves choices of
    rank 0 in other forms, and dense. `quantized` names the quantized forms that the layer may be stored in; they are
    choices where `own_errors` has their errors, without calibration in the Frobenius norm. Layers with the same name in
    `together` run in one product, and are to have one form and rank. Where `only_written` is set there is no choice but
    the forms of what training wrote, and dense: what is stored is the difference to a base.
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
    truncation_penalty: float = 1.0
    quantized: tuple[str, ...] = ()
    together: str | None = None
    only_written: bool = False

    def ranks(self, largest: int, form: str | None = None) -> npt.NDArray[np.int64]:
        """The ranks that are choices, up to the largest one; from 0 on in forms that have this rank."""
        return np.arange(self.rank_multiple if form is None or least_rank(form) else 0, largest + 1, self.rank_multiple)

    def quantized_ranks(self, form: str) -> npt.NDArray[np.int64]:
        """The ranks that are choices in a quantized form; of a pair below the full one, at which dense is smaller."""
        largest = len(self.own_errors[form]) - 1
        if pair_name(pair_of(form) or form) != DENSE:
            largest = min(largest, min(factorized_shape(self.layer, form)) - 1)
        return self.ranks(largest, form)

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
        return np.asarray(self.numbers(form, ranks), dtype=np.float64)

    def numbers(self, form: str, rank: Count) -> Count:
        """The numbers that the layer stores in a form; as it is where this is `dense`."""
        if form == DENSE and self.layer.stored is not None:
            return self.layer.stored.numbers + 0 * rank
        return stored_parameters(self.layer, form, rank)

    def nbytes(self, form: str, rank: Count) -> Count:
        """The bytes of these."""
        if form == DENSE and self.layer.stored is not None:
            return self.layer.stored.nbytes + 0 * rank
        return stored_bytes(self.layer, form, rank, itemsize=self.itemsize)

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
        alike, least = forms_alike(self.layer, request), self.settings.least_start_gain
        return [
            form
            for form in known
            if (part := pair_of(form)) is None
            or ((part in alike or has_own_errors(part)) and self._start_gains(form, part, least))
        ]

    def quantized_forms(self, request: FormRequest) -> list[str]:
        """The quantized forms whose errors are known; of pairs the one that is asked for, where the layer can have it.

        Of what training wrote only where it errs clearly less than the layer's own pair.
        """
        alike = forms_alike(self.layer, request)
        pairs = {form.name for form in pair_forms(self.layer) if form.name not in alike and not form.has_own_errors}

        def wanted(form: str) -> bool:
            pair = pair_name(pair_of(form) or form)
            return pair not in (*pairs, *self.settings.excluded_forms)

        known = [form for form in self.quantized if form in self.own_errors and wanted(form)]
        return [form for form in known if not from_initial(form) or self._quantized_start_gains(form)]

    def _quantized_start_gains(self, form: str) -> bool:
        """The same as `_start_gains` of a quantized form, beside the same form of the layer."""
        pair, least = pair_of(form), self.settings.least_quantized_start_gain
        return pair is None or pair not in self.own_errors or self._start_gains(form, pair, least)

    def _start_gains(self, form: str, pair: str, least: float) -> bool:
        """Whether a form of what training wrote errs clearly less, at some rank, than the same pair of the layer."""
        if self.only_written:
            return True
        written, own = self.errors(form), self.errors(pair)
        ranks = min(len(written), len(own))
        return bool((written[:ranks] < (1 - least) * own[:ranks]).any())

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
    forms = forms_alike(m.layer, request)
    return forms[int(form_demands(m, forms, np.array([rank]))[:, 0].argmin())]


def form_demands(m: MeasuredLayer, forms: Sequence[str], ranks: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """What each form demands at each rank; infinite where it does not save time."""
    return np.stack([np.where(m.saves_time(form, ranks), m.demand(form, ranks), np.inf) for form in forms])


def forms_alike(layer: Layer, request: FormRequest) -> list[str]:
    """The forms that lose the same at the same rank; the one that is asked for alone, where the layer can have it.

    A layer that is a pair already keeps its form, unless one is asked for.
    """
    alike = [form.name for form in pair_forms(layer) if not form.has_own_errors]
    own = None if layer.stored is None else layer.stored.form
    return next(([form] for form in (request, own) if form in alike), alike)


def most_bytes(m: MeasuredLayer) -> float:
    """The largest size in bytes at which a pair is worth having two products; what is a pair already has them."""
    if m.layer.stored is not None and m.layer.is_pair:
        return m.layer.stored.nbytes - 1
    return (1 - m.settings.least_layer_saving) * m.nbytes(DENSE, 0)


def stored_as(form: str, rank: int) -> str:
    """What a layer is stored as, in words."""
    quantization = quantization_of(form)
    bits = "" if quantization is None else f"{quantization.bits} bits"
    if pair_name(pair_of(form) or form) == DENSE:
        return f"{bits} with a correction of rank {rank}" if rank else bits
    return f"a pair of rank {rank}{' in ' if bits else ''}{bits}"


def layer_plan(measured: MeasuredLayer, rank: int, form: str, *, reason: str) -> LayerPlan:
    """The plan for one layer at a rank; dense if the pair would save too little or the layer must stay dense."""
    layer = measured.layer
    if measured.stays_dense is not None:
        return dense_plan(layer, measured.stays_dense)
    within = rank <= min(factorized_shape(layer, form)) and not exceeds_stored(layer, form, rank)
    parameters = stored_parameters(layer, form, rank) if within else layer.stored_parameters
    in_bytes = stored_bytes(layer, form, rank, itemsize=measured.itemsize)
    if parameters >= layer.stored_parameters or in_bytes > most_bytes(measured):
        saving = (
            "not be smaller"
            if parameters >= layer.stored_parameters
            else f"save less than {measured.settings.least_layer_saving:.0%}"
        )
        return dense_plan(layer, f"{stored_as(form, rank)} ({reason}) would {saving}")
    if (
        measured.latency is not None
        and not from_initial(form)
        and not measured.saves_time(form, np.array([rank])).all()
    ):
        device = measured.latency.profile.name
        return dense_plan(layer, f"{stored_as(form, rank)} ({reason}) would not be faster on {device}")
    error = float(measured.errors(form)[rank])
    share = measured.start.share if measured.start is not None and from_initial(form) else None
    return LayerPlan(
        *(layer.name, layer.shape, layer.kind, rank, form, parameters, error, reason),
        share=share,
        before=None if layer.stored is None else layer.stored.numbers,
        encoding=layer.encoding,
    )


def exceeds_stored(layer: Layer, form: str, rank: int) -> bool:
    """Whether a rank is larger than that of the pair that a layer is already."""
    own = None if layer.stored is None else layer.stored.rank
    return own is not None and quantization_of(form) is None and rank > own


def predicted_loss(measured: Sequence[MeasuredLayer], layers: Sequence[LayerPlan]) -> float:
    """Loss per prediction that the ranks of calibrated layers cost to second order, in the unit of the calibration."""
    pairs = zip(measured, layers, strict=True)
    return sum(m.total * layer.error**2 for m, layer in pairs if m.weighted_values is not None)


def dense_seconds(measured: Sequence[MeasuredLayer]) -> Seconds:
    """Predicted seconds of all dense layers together in each workload."""
    return np.asarray(sum(m.latency.dense(m.layer) for m in measured if m.latency is not None))


def with_latency(measured: Sequence[MeasuredLayer], layers: Sequence[LayerPlan]) -> tuple[LayerPlan, ...]:
    """The plans with the seconds that are predicted of them, where speed is asked for."""
    return tuple(
        plan if m.latency is None else replace(plan, latency=m.latency.of(m.layer, plan.form, plan.rank or 0))
        for m, plan in zip(measured, layers, strict=True)
    )
