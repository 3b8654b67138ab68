"""From a budget to ranks: which rule applies, and what to say when it cannot be met."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from compressor.choices import FormRequest
from compressor.errors import BadInput
from compressor.planning.budget import Budget
from compressor.planning.latency import TimeLimit
from compressor.planning.layer_choices import least_seconds, smallest_size
from compressor.planning.measured import MeasuredLayer, dense_seconds
from compressor.planning.plan import LayerPlan
from compressor.planning.rules import plan_by_bits, plan_by_tolerance, plan_by_window_rule
from compressor.planning.settings import PLANNING, PlanningSettings
from compressor.planning.size import plan_by_file_size, plan_by_size
from compressor.planning.together import with_common_ranks

OptimizerFamily = Literal["sgd", "adaptive"] | None


def default_budget(
    measured: Sequence[MeasuredLayer], family: OptimizerFamily, settings: PlanningSettings = PLANNING
) -> Budget:
    """The default: the window rule where it has been validated, else a safe tolerance.

    The window rule needs a recipe of the SGD family that says how much of the initialization survives.
    """
    if family == "sgd" and any(m.window_rule_applies for m in measured):
        return Budget("window-rule")
    return Budget("tolerance", settings.safe_tolerance)


def rank_caps(measured: Sequence[MeasuredLayer], family: OptimizerFamily) -> dict[str, int]:
    """The largest rank that the window rule allows each layer that it applies to, by name.

    The number of singular values above the edge of the surviving initialization, or the memory window's bound where it
    is not vacuous and smaller. Empty unless the optimizer is of the SGD family.
    """
    if family != "sgd":
        return {}
    return {
        m.layer.name: m.above_edge if m.rank_bound is None else min(m.above_edge, m.rank_bound)
        for m in measured
        if m.window_rule_applies and m.above_edge is not None
    }


def choose_ranks(
    measured: Sequence[MeasuredLayer],
    budget: Budget,
    form: FormRequest,
    *,
    file_bytes: Callable[[tuple[LayerPlan, ...]], int],
    exponent: float = 1.0,
    limit: TimeLimit | None = None,
) -> tuple[LayerPlan, ...]:
    """Choose a rank and a form for every layer within the budget; BadInput names the smallest one that can be met.

    `file_bytes` is the size of the weight files for some ranks, and `exponent` that of `plan_by_size`. `limit` says
    what a budget that limits the latency comes to; others ignore it.
    """
    if budget.kind == "window-rule":
        return with_common_ranks(measured, plan_by_window_rule(measured, form))
    assert budget.value is not None, f"{budget.kind} has a value"
    if budget.kind == "tolerance":
        return with_common_ranks(measured, plan_by_tolerance(measured, budget.value, form))
    if budget.kind == "bits":
        return plan_by_bits(measured, int(budget.value))
    limit = None if budget.latency_limit is None else limit
    seconds = None if limit is None else limit.allowed(dense_seconds(measured))
    if budget.kind == "max-size":
        layers = plan_by_file_size(
            measured, int(budget.value), form, file_bytes=file_bytes, exponent=exponent, seconds=seconds
        )
    else:
        eligible = sum(m.layer.stored_parameters for m in measured)
        size = int(budget.value * eligible) if budget.kind == "keep" else None
        layers = plan_by_size(measured, size, form, unit="parameters", exponent=exponent, seconds=seconds)
    if layers is None:
        raise _not_reached(measured, budget, form, file_bytes=file_bytes, limit=limit)
    return layers


def _not_reached(
    measured: Sequence[MeasuredLayer],
    budget: Budget,
    form: FormRequest,
    *,
    file_bytes: Callable[[tuple[LayerPlan, ...]], int],
    limit: TimeLimit | None,
) -> BadInput:
    """Which limit of a budget cannot be met, and the least that can; where they cannot together, that."""
    if limit is not None:
        least = limit.least_ratio(dense_seconds(measured), least_seconds(measured, form))
        if least > limit.ratio or budget.kind == "max-latency":
            reached = f"allow at least {math.ceil(least * 1000) / 1000:.3f}x"
            device = next(m.latency.profile.name for m in measured if m.latency is not None)
            nothing = f"1: {_by_what(measured, 'make', 'makes')} no layer faster on {device}"
            return BadInput(
                f"`max_latency` {limit.ratio:g} is below the smallest that {_by_what(measured)} here",
                option="max_latency",
                remedy=reached if least < 1 else f"allow at least {nothing}",
            )
        alone = replace(budget, max_latency=None)
        try:
            choose_ranks(measured, alone, form, file_bytes=file_bytes)
        except BadInput as error:
            return error
        return BadInput(
            f"`{budget.option}` {budget.value:g} and `max_latency` {limit.ratio:g} cannot be met together",
            option=budget.option,
            remedy="allow more of one of them",
        )
    return BadInput(
        f"`{budget.option}` {budget.value:g} is below the smallest that {_by_what(measured)} here",
        option=budget.option,
        remedy=f"allow at least {_smallest(measured, budget, form, file_bytes=file_bytes)}{_by_size(measured)}",
    )


def _by_what(measured: Sequence[MeasuredLayer], several: str = "reach", one: str = "reaches") -> str:
    """What makes layers smaller, with its verb."""
    return f"low rank and quantization {several}" if any(m.quantized for m in measured) else f"low rank {one}"


def _smallest(
    measured: Sequence[MeasuredLayer],
    budget: Budget,
    form: FormRequest,
    *,
    file_bytes: Callable[[tuple[LayerPlan, ...]], int],
) -> str:
    """The smallest budget of this kind that can be met, in words."""
    if budget.kind == "keep":
        least = smallest_size(measured, form, "parameters") / sum(m.layer.stored_parameters for m in measured)
        if least < 1:
            return f"{least + 5e-5:.4f}"
        device = next((m.latency.profile.name for m in measured if m.latency is not None), None)
        return f"1: low rank cannot make these layers smaller{'' if device is None else f' and faster on {device}'}"
    rank_one = plan_by_size(measured, smallest_size(measured, form, "bytes"), form, unit="bytes")
    # The size asked for is noted in the file, so asking for another one moves it by a few bytes.
    return "" if rank_one is None else f"{file_bytes(rank_one) + 16} bytes"


def _by_size(measured: Sequence[MeasuredLayer]) -> str:
    """What allows more, where layers become pairs only if these are faster."""
    return ", or ask for its size alone with `prefer='size'`" if any(m.latency for m in measured) else ""


def worthwhile_size(
    measured: Sequence[MeasuredLayer],
    form: FormRequest,
    *,
    file_bytes: Callable[[tuple[LayerPlan, ...]], int],
    dense_bytes: int,
    settings: PlanningSettings = PLANNING,
) -> Budget | None:
    """A size to suggest where nothing was asked and little was saved: the largest of a few whose files are worthwhile.

    None where low rank makes the weight files, of `dense_bytes`, next to no smaller at any of them.
    """
    for keep in (0.8, 0.6, 0.4, 0.2, 0.1):
        budget = Budget("keep", keep)
        try:
            layers = choose_ranks(measured, budget, form, file_bytes=file_bytes)
        except BadInput:  # below the smallest size
            return None
        if is_worthwhile(file_bytes(layers), dense_bytes, settings):
            return budget
    return None


def is_worthwhile(after: int, before: int, settings: PlanningSettings = PLANNING) -> bool:
    """Whether the weight files save enough bytes when no budget was given."""
    return after <= (1 - settings.least_file_saving) * before


def window_rule_advice(measured: Sequence[MeasuredLayer], family: OptimizerFamily, form: FormRequest) -> str | None:
    """What the window rule says where it does not decide by itself; None where it does."""
    if family is None:
        return "the optimizer is unknown: a training recipe (`recipe`) may guide the ranks"
    if not any(m.window_rule_applies for m in measured):
        return "the window rule does not apply: " + (
            measured[0].window_rule_obstacle if measured else "no layer is eligible"
        )
    if family == "sgd":
        return None
    layers = plan_by_window_rule(measured, form)
    kept = sum(layer.parameters for layer in layers) / sum(layer.parameters_before for layer in layers)
    return (
        f"the window rule would keep {kept:.0%} of the eligible parameters; it is validated for the SGD family only,"
        f" so measure what `keep={kept:.2f}` costs before you rely on it"
    )
