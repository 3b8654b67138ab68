"""Every form and rank that one layer can have, with what each costs and loses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from compressor.choices import FormRequest
from compressor.forms import DENSE, FORMS, Count, from_initial
from compressor.measure import Spectrum
from compressor.planning.allocation import Choices, undominated
from compressor.planning.latency import Seconds
from compressor.planning.measured import ROUNDING, MeasuredLayer, form_demands, form_for, forms_alike, most_bytes


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
        return self.at(np.flatnonzero(~self.started))

    def at(self, places: npt.NDArray[np.int64]) -> LayerChoices:
        """The choices at some places."""
        return LayerChoices(
            Choices(self.choices.cost[places], self.choices.loss[places]),
            [self.forms[place] for place in places],
            self.ranks[places],
            self.errors[places],
            self.seconds[:, places],
        )


def layer_choices(
    m: MeasuredLayer, request: FormRequest, unit: Literal["parameters", "bytes"], *, exponent: float = 1.0
) -> LayerChoices:
    """Every form and rank whose pair saves enough of the dense layer, in bytes and in time, and dense last.

    Where there are quantized forms, what is in nothing better than another choice is left out. Under a cap there is no
    dense choice, and no pair that stores more than the layer's own at the cap: these sizes rise with the rank, and the
    cap says nothing of the matrix of a spatial pair.
    """
    layer = m.layer

    def parameters(form: str, ranks: Count) -> Count:
        return m.numbers(form, ranks)

    def cost(form: str, ranks: Count) -> Count:
        if unit == "parameters":
            return parameters(form, ranks)
        return m.nbytes(form, ranks)

    largest, capped = layer.stored_parameters - 1, False
    if m.rank_cap is not None and m.stays_dense is None:
        cap = m.rounded(max(1, m.rank_cap))
        written = m.forms_apart(request) if m.only_written else []
        at_cap = written[0] if written else form_for(m, cap, request), cap
        in_bytes = m.nbytes(*at_cap)
        smaller = cap <= min(layer.block_shape) and parameters(*at_cap) <= largest and in_bytes <= most_bytes(m)
        capped = smaller and bool(m.saves_time(at_cap[0], np.array([cap])).all())
        largest = parameters(*at_cap) if capped else largest
    forms: list[str] = []
    places, ranks, costs, errors, seconds = [], [], [], [], []

    def add(form: str, own: npt.NDArray[np.int64]) -> None:
        places.append(np.full(len(own), len(forms)))
        forms.append(form)
        ranks.append(own)
        costs.append(np.broadcast_to(cost(form, own), own.shape))
        errors.append(np.zeros(len(own)) if form == DENSE else m.errors(form)[own])
        seconds.append(_seconds(m, form, own))

    for form, own in _ranks_of_forms(m, request):
        add(form, own[(parameters(form, own) <= largest) & (m.nbytes(form, own) <= most_bytes(m))])
    if not capped:
        add(DENSE, np.zeros(1, dtype=np.int64))
    place, error = np.concatenate(places), np.concatenate(errors)
    truncates = np.array([form != DENSE and FORMS[form].truncates for form in forms])[place]
    losses = _losses(m, error, exponent)
    if math.isfinite(m.truncation_penalty):
        losses = np.where(truncates, m.truncation_penalty, 1.0) * losses
        taken = np.arange(len(place))
    else:
        taken = np.flatnonzero(~truncates & (np.concatenate(ranks) == 0))
    all_costs, all_seconds = np.concatenate(costs), np.concatenate(seconds, axis=1)
    if m.quantized:
        # Of the ranks of a form that is alone few are worse than others; of many forms most are.
        kinds = np.array([2 * (form == DENSE) + from_initial(form) for form in forms])[place]
        rated = np.vstack([all_costs.astype(np.float64), all_seconds, losses])
        parts = [taken[kinds[taken] == kind] for kind in np.unique(kinds[taken])]
        taken = np.concatenate([part[undominated(rated[:, part])] for part in parts])
    return LayerChoices(
        Choices(all_costs[taken], losses[taken]),
        [forms[index] for index in place[taken]],
        np.concatenate(ranks)[taken],
        error[taken],
        all_seconds[:, taken],
    )


def smallest_size(measured: Sequence[MeasuredLayer], request: FormRequest, unit: Literal["parameters", "bytes"]) -> int:
    """What the layers would store at their smallest ranks, the smallest budget that can be met."""
    return sum(int(layer_choices(m, request, unit).choices.cost.min()) for m in measured)


def has_pairs(measured: Sequence[MeasuredLayer], request: FormRequest) -> bool:
    """Whether any layer can become a pair at any rank."""
    return any(form != DENSE for m in measured for form in layer_choices(m, request, "parameters").forms)


def least_seconds(measured: Sequence[MeasuredLayer], request: FormRequest) -> Seconds:
    """The fewest seconds that the layers could take together, in each workload by itself."""
    return np.asarray(sum(layer_choices(m, request, "parameters").seconds.min(axis=1) for m in measured))


def _seconds(m: MeasuredLayer, form: str, ranks: npt.NDArray[np.int64]) -> Seconds:
    """What a form takes in each workload; no row where speed is not asked for."""
    return np.zeros((0, len(ranks))) if m.latency is None else m.latency.seconds(m.layer, form, ranks)


def _ranks_of_forms(m: MeasuredLayer, request: FormRequest) -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
    """The ranks at which each form is a choice: of forms that lose the same the best, unless one is asked for."""
    if m.stays_dense is not None:
        return
    ranks = m.ranks(len(m.singular_values))
    if not m.only_written:
        alike = forms_alike(m.layer, request)
        demands = form_demands(m, alike, ranks)
        best = demands.argmin(axis=0)
        for place, form in enumerate(alike):
            yield form, ranks[(best == place) & np.isfinite(demands[place])]
    for form in m.forms_apart(request):
        own = m.ranks(len(m.own_values[form]), form)
        # A size that is asked for may be met without becoming faster: such a layer takes as long as the dense one.
        yield form, own if from_initial(form) else own[m.saves_time(form, own)]
    for form in m.quantized_forms(request):
        own = m.quantized_ranks(form)
        own = own[(own < m.settings.least_kernel_rank) | FORMS[form].suits_kernels(m.layer, own)]
        yield form, own if from_initial(form) else own[m.saves_time(form, own)]


def _losses(m: MeasuredLayer, errors: Spectrum, exponent: float) -> Spectrum:
    """What a layer loses by relative errors: see `plan_by_size`, and without calibration `comparable`."""
    squared = np.square(errors)
    if m.weighted_values is None:
        return np.asarray(-np.log1p(-np.minimum(squared, 1 - ROUNDING)))
    return np.asarray((m.total ** (1 - exponent) if m.total > 0 else 0.0) * squared)
