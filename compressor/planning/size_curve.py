"""What every size would cost: the allocation's loss over the parameters that are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from compressor.planning.allocation import Choices
from compressor.planning.plan import FormRequest, LayerPlan, MeasuredLayer, layer_choices

# So many prices per number are tried, and no more points are kept than a figure can show.
_PRICES, _POINTS = 400, 120


@dataclass(frozen=True)
class SizeCurve:
    """Loss over size, by the measured spectra alone: `losses[i]` at `parameters[i]` stored of the eligible layers.

    Sizes rise, and at the last nothing is lost. `unit` says what the losses are: `nats` per prediction to
    second order, with calibration; else `relative error`, the root mean square of the layers' relative errors.
    """

    parameters: tuple[int, ...]
    losses: tuple[float, ...]
    unit: Literal["nats", "relative error"]

    def to_dict(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def size_curve(measured: Sequence[MeasuredLayer], request: FormRequest, power: float = 1.0) -> SizeCurve:
    """The curve on which `plan_by_size` with the same `power` allocates, from its smallest size to one without loss.

    As the price of a stored number falls, each layer goes along the lower convex hull of its choices, from the smallest
    to the one without loss. So the steps of all layers, sorted by what they save for a number, are the whole curve.
    """
    weighted = any(m.weighted_values is not None for m in measured)
    size = 0
    slopes, extra, saved = [np.empty(0)], [np.empty(0, dtype=np.int64)], [np.empty(0)]
    for m in measured:
        table = layer_choices(m, request, "parameters", power)
        hull = lower_hull(table.choices)
        cost, loss = table.choices.cost[hull], table.choices.loss[hull]
        size += int(cost[0])
        extra.append(np.diff(cost))
        slopes.append(-np.diff(loss) / np.diff(cost))
        saved.append(-np.diff(np.square(table.errors[hull])) * (m.total if weighted else 1.0))
    order = np.argsort(-np.concatenate(slopes), kind="stable")
    savings = np.concatenate(slopes)[order]
    sizes = np.append(0, np.cumsum(np.concatenate(extra)[order])) + size
    # What is left to save: summed from the end without loss, so that nothing cancels.
    losses = np.append(np.cumsum(np.concatenate(saved)[order][::-1])[::-1], 0.0)
    if not weighted:
        losses = np.sqrt(losses / len(measured))
    prices = np.geomspace(savings[0] * 2, savings[-1] / 2, _PRICES) if savings.size else np.zeros(1)
    # At a price are taken all steps that save more.
    points = np.unique(np.searchsorted(-savings, -prices))
    shown = points[np.unique(np.linspace(0, len(points) - 1, min(len(points), _POINTS)).round().astype(int))]
    unit: Literal["nats", "relative error"] = "nats" if weighted else "relative error"
    return SizeCurve(tuple(sizes[shown].tolist()), tuple(losses[shown].tolist()), unit)


def lower_hull(choices: Choices) -> npt.NDArray[np.int64]:
    """Indices of the choices that are cheapest at some price, from the lowest cost to the lowest loss."""
    hull = np.lexsort((choices.loss, choices.cost))
    least = np.minimum.accumulate(choices.loss[hull])
    hull = hull[np.append(True, least[1:] < least[:-1])]
    while True:
        slopes = np.diff(choices.loss[hull]) / np.diff(choices.cost[hull])
        # A choice on or above the line between its neighbours is on no hull.
        below = np.append(np.append(True, slopes[:-1] < slopes[1:]), True) if len(hull) > 1 else np.ones(1, dtype=bool)
        if below.all():
            return hull
        hull = hull[below]


def spent(curve: SizeCurve, layers: Sequence[LayerPlan], predicted: float | None) -> float:
    """What a plan loses in the unit of the curve; `predicted` is that of a plan made with calibration."""
    if curve.unit == "nats" and predicted is not None:
        return predicted
    return float(np.sqrt(np.mean([layer.error**2 for layer in layers])))
