"""What every size would cost: the allocation's loss over the parameters that are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from compressor.planning.allocation import cheapest
from compressor.planning.plan import FormRequest, LayerPlan, LossUnit, MeasuredLayer, layer_choices

# So many prices per number are tried, and no more points are kept than a figure can show.
_PRICES, _POINTS = 400, 120


@dataclass(frozen=True)
class SizeCurve:
    """Loss over size, by the measured spectra alone: `losses[i]` at `parameters[i]` stored of the eligible layers.

    Sizes rise, and at the last nothing is lost. `unit` says what the losses are: with calibration that of the
    calibration, to second order; else `relative error`, the root mean square of the layers' relative errors.
    """

    parameters: tuple[int, ...]
    losses: tuple[float, ...]
    unit: LossUnit | Literal["relative error"]

    def to_dict(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def size_curve(
    measured: Sequence[MeasuredLayer],
    request: FormRequest,
    power: float = 1.0,
    unit: LossUnit = "nats per prediction",
) -> SizeCurve:
    """The curve on which `plan_by_size` with the same `power` allocates, from its smallest size to one without loss.

    `unit` is that of the calibration, where there was one.

    Every price of a stored number gives one point: each layer takes the choice that is cheapest at it.
    """
    weighted = any(m.weighted_values is not None for m in measured)
    tables = [layer_choices(m, request, "parameters", power)[0] for m in measured]
    # What a choice's loss is times, to be in the unit that is reported.
    scales = [m.total**power if weighted else 1.0 for m in measured]
    slopes = [_slopes(table.cost, table.loss) for table in tables]
    steps = np.concatenate([*slopes, np.empty(0)])
    points: dict[int, float] = {}
    prices = np.geomspace(steps.min() / 2, steps.max() * 2, _PRICES) if steps.size else np.zeros(1)
    for price in (0.0, *prices):
        chosen = [cheapest(table.loss + price * table.cost, table.cost) for table in tables]
        size = sum(int(table.cost[i]) for table, i in zip(tables, chosen, strict=True))
        squared = sum(s * float(t.loss[i]) for s, t, i in zip(scales, tables, chosen, strict=True))
        points[size] = squared if weighted else float(np.sqrt(squared / len(tables)))
    sizes = sorted(points)
    shown = np.unique(np.linspace(0, len(sizes) - 1, min(len(sizes), _POINTS)).round().astype(int))
    kept = tuple(sizes[i] for i in shown)
    return SizeCurve(kept, tuple(points[size] for size in kept), unit if weighted else "relative error")


def spent(curve: SizeCurve, layers: Sequence[LayerPlan], predicted: float | None) -> float:
    """What a plan loses in the unit of the curve; `predicted` is that of a plan made with calibration."""
    if curve.unit != "relative error" and predicted is not None:
        return predicted
    return float(np.sqrt(np.mean([layer.error**2 for layer in layers])))


def _slopes(cost: np.ndarray[Any, Any], loss: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What a stored number saves from each size to the next larger one, where it saves something."""
    order = np.lexsort((loss, cost))
    sizes, first = np.unique(cost[order], return_index=True)
    saved = -np.diff(loss[order][first]) / np.diff(sizes)
    return np.asarray(saved[saved > 0])
