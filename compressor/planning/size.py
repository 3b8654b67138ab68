"""Ranks of all layers together: the least loss within a size, and within a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from compressor.choices import FormRequest
from compressor.forms import DENSE
from compressor.measure import Spectrum
from compressor.planning.allocation import Choices, LimitedChoices, allocate, allocate_within, even_shares
from compressor.planning.latency import Seconds
from compressor.planning.layer_choices import LayerChoices, layer_choices
from compressor.planning.measured import ROUNDING, MeasuredLayer, layer_plan
from compressor.planning.plan import LayerPlan, dense_plan
from compressor.planning.together import apart, joined


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
        numbers = sum(m.nbytes(layer.form, layer.rank or 0) for m, layer in zip(measured, layers, strict=True))
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
    kept = "its rank" if m.layer.is_pair else "it dense" if m.layer.stored is None else "it as it is"
    return f"keeping {kept} is worth its size"


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
    optional = any(each.started.any() for each in choices) and not any(m.only_written for m in measured)
    if optional and not _in_loss(measured):
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
    chosen = None
    if budget is not None:
        losses = _losses_of(measured, choices, [each.choices for each in choices], budget=budget)
        together = joined(measured, choices, losses)
        chosen = allocate([each.choices for each in together], budget)
        chosen = None if chosen is None else apart(together, chosen)
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
    if any(of_start.any() for of_start in started) and not any(m.only_written for m in measured):
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
