"""The loss of the allocation as a function of size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from compressor.choices import FormRequest
from compressor.planning.allocation import lower_hull
from compressor.planning.layer_choices import LayerChoices, layer_choices
from compressor.planning.measured import MeasuredLayer
from compressor.planning.plan import LayerPlan, LossUnit
from compressor.planning.size import chosen_within

# So many prices per number are tried with calibration, and no more points are kept than a figure can show.
_PRICES, _POINTS = 400, 120
# So many sizes are allocated without it.
_SIZES = 30


@dataclass(frozen=True)
class StoredForm:
    """The form and rank in which a layer would be stored; the rank of a dense one is 0."""

    form: str
    rank: int


@dataclass(frozen=True)
class SizeCurve:
    """Loss over size, by the measured spectra alone: `losses[i]` at `parameters[i]` stored of the eligible layers.

    Sizes rise, and at the last nothing is lost. `unit` says what the losses are: with calibration that of the
    calibration, to second order; else `relative error`, the root mean square of the layers' relative errors. In
    `layers[i]` is what each layer would be at that size, in the order in which they were measured.
    """

    parameters: tuple[int, ...]
    losses: tuple[float, ...]
    unit: LossUnit | Literal["relative error"]
    layers: tuple[tuple[StoredForm, ...], ...] = field(default=(), repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        return {"parameters": list(self.parameters), "losses": list(self.losses), "unit": self.unit}


def size_curve(
    measured: Sequence[MeasuredLayer],
    request: FormRequest,
    *,
    exponent: float = 1.0,
    unit: LossUnit = "nats per prediction",
) -> SizeCurve:
    """The curve on which `plan_by_size` with the same `exponent` allocates, from its smallest size to one without loss.

    `unit` is that of the calibration, where there was one.
    """
    tables = [layer_choices(m, request, "parameters", exponent=exponent) for m in measured]
    if any(m.weighted_values is not None for m in measured):
        return _calibrated_curve(measured, tables, unit)
    least, most = (sum(int(bound(each.choices.cost)) for each in tables) for bound in (np.min, np.max))
    sizes = np.unique(np.linspace(least, most, _SIZES).round().astype(int)).tolist()
    losses, found = [], []
    for size in sizes:
        chosen = chosen_within(measured, tables, size)
        assert chosen is not None, "the smallest size can be met"
        errors = [each.errors[index] for each, index in zip(tables, chosen, strict=True)]
        losses.append(float(np.sqrt(np.mean(np.square(errors)))))
        found.append(chosen)
    return SizeCurve(tuple(sizes), tuple(losses), "relative error", _stored(tables, list(zip(*found, strict=True))))


def _stored(tables: Sequence[LayerChoices], chosen: Sequence[Sequence[int]]) -> tuple[tuple[StoredForm, ...], ...]:
    """At every size what the layers are, by the indices of each layer's choices.

    A layer is mostly the same at the next size, and is then the same object: mixtures have many thousand layers.
    """
    layers = []
    for each, indices in zip(tables, chosen, strict=True):
        known = {index: StoredForm(each.forms[index], int(each.ranks[index])) for index in set(indices)}
        layers.append([known[index] for index in indices])
    return tuple(zip(*layers, strict=True))


def _calibrated_curve(measured: Sequence[MeasuredLayer], tables: Sequence[LayerChoices], unit: LossUnit) -> SizeCurve:
    """As the price of a stored number falls, each layer goes along the lower convex hull of its choices.

    So the steps of all layers, sorted by what they save for a number, are the whole curve.
    """
    hulls = [lower_hull(each.choices) for each in tables]
    costs = [each.choices.cost[hull] for each, hull in zip(tables, hulls, strict=True)]
    losses = [each.choices.loss[hull] for each, hull in zip(tables, hulls, strict=True)]
    nats = [m.total * np.square(each.errors[hull]) for m, each, hull in zip(measured, tables, hulls, strict=True)]
    savings = np.concatenate([-np.diff(loss) / np.diff(cost) for loss, cost in zip(losses, costs, strict=True)])
    order = np.argsort(-savings, kind="stable")
    savings = savings[order]
    smallest = sum(int(cost[0]) for cost in costs)
    sizes = smallest + np.append(0, np.cumsum(np.concatenate([np.diff(cost) for cost in costs])[order]))
    saved = np.concatenate([-np.diff(each) for each in nats])[order]
    # What is left to save: summed from the end without loss, so that nothing cancels.
    lost = np.append(np.cumsum(saved[::-1])[::-1], 0.0)
    prices = np.geomspace(savings[0] * 2, savings[-1] / 2, _PRICES) if savings.size else np.zeros(1)
    # At a price are taken all steps that save more.
    points = np.unique(np.append(np.searchsorted(-savings, -prices), len(savings)))
    shown = points[np.unique(np.linspace(0, len(points) - 1, min(len(points), _POINTS)).round().astype(int))]
    layers = _stored(tables, _taken(hulls, order, shown))
    return SizeCurve(tuple(sizes[shown].tolist()), tuple(lost[shown].tolist()), unit, layers)


def _taken(
    hulls: Sequence[npt.NDArray[np.int64]],
    order: npt.NDArray[np.int64],
    points: npt.NDArray[np.int64],
) -> list[list[int]]:
    """For each layer its choice where so many of all layers' steps along their hulls, sorted by `order`, are taken."""
    places = np.empty(len(order), dtype=np.int64)
    places[order] = np.arange(len(order))
    # A layer's own steps are in the order of its hull, since each saves less than the one before.
    own = np.split(places, np.cumsum([len(hull) - 1 for hull in hulls])[:-1])
    return [hull[np.searchsorted(steps, points)].tolist() for hull, steps in zip(hulls, own, strict=True)]


def plan_loss(curve: SizeCurve, layers: Sequence[LayerPlan], predicted: float | None) -> float:
    """The loss of a plan in the unit of the curve; `predicted` is the loss predicted by calibration."""
    if curve.unit != "relative error" and predicted is not None:
        return predicted
    return float(np.sqrt(np.mean([layer.error**2 for layer in layers])))
