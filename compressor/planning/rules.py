"""Ranks that each layer gets by itself: by a tolerance, and by the window rule."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from compressor.choices import FormRequest
from compressor.forms import DENSE, from_initial, pair_name, quantization_of
from compressor.measure import EPSILON, frobenius_rank
from compressor.planning.measured import MeasuredLayer, form_for, layer_plan
from compressor.planning.plan import LayerPlan, dense_plan


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
    best = min([plan, *apart], key=lambda each: float(m.demand(each.form, np.array([each.rank or 0]))[0]))
    quantized = [
        layer_plan(m, rank, form, reason=reason)
        for form in m.quantized_forms(request)
        if (m.latency is None or not from_initial(form)) and (rank := _smallest(m, form, tolerance)) is not None
    ]
    # Numbers do not tell which is smaller where some have more than 16 bits.
    return min([best, *quantized], key=lambda each: _bytes(m, each.form, np.array([each.rank or 0]))[0])


def _smallest(m: MeasuredLayer, form: str, tolerance: float) -> int | None:
    """The rank at which a quantized form takes the fewest bytes with an error of at most a tolerance; None without."""
    ranks = m.quantized_ranks(form)
    close = ranks[m.own_errors[form][ranks] <= tolerance]
    return int(close[_bytes(m, form, close).argmin()]) if len(close) else None


def _bytes(m: MeasuredLayer, form: str, ranks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """What the layer takes in a form, in bytes."""
    return np.broadcast_to(m.nbytes(form, ranks), ranks.shape)


def plan_by_bits(measured: Sequence[MeasuredLayer], bits: int) -> tuple[LayerPlan, ...]:
    """Every layer in so many bits, without a pair; a layer that has no such form stays dense.

    Of several groups of inputs that share a scale those that take the fewest bytes are taken.
    """
    plans = []
    for m in measured:
        forms = [each for each in m.quantized if pair_name(each) == DENSE and each in m.own_errors]
        of_width = [each for each in forms if _width(each) == bits]
        if of_width and m.stays_dense is None:
            smallest = min(of_width, key=lambda form: _bytes(m, form, np.zeros(1, dtype=np.int64))[0])
            plans.append(layer_plan(m, 0, smallest, reason=f"{bits} bits for every layer"))
        else:
            d_in, kind = m.layer.shape[1], m.layer.kind
            unstored = (
                f"{'an embedding' if kind == 'embedding' else f'a layer of {d_in} inputs'} has no form in {bits} bits"
            )
            plans.append(dense_plan(m.layer, m.stays_dense or unstored))
    return tuple(plans)


def _width(form: str) -> int | None:
    quantization = quantization_of(form)
    return None if quantization is None else quantization.bits


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
