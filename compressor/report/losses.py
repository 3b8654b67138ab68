"""The losses of a compression, predicted and measured: the points of the curve of loss over size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compressor.results import Compression


@dataclass(frozen=True)
class CurvePoint:
    """One loss at one size: how it was found, and how it is drawn.

    `parameters` are the stored numbers of the eligible layers, and `loss` is in the unit of the curve. `marker` is
    matplotlib's name of the shape, and `symbol` a character that looks like it.
    """

    label: str
    parameters: int
    loss: float
    marker: str
    symbol: str

    @property
    def words(self) -> str:
        """The loss in figures, and whether a logarithmic axis leaves it out."""
        return f"{self.loss:.3g}" + ("" if self.loss > 0 else ", not above zero, so not drawn")


def curve_points(compression: Compression) -> tuple[CurvePoint, ...]:
    """The predicted loss of the plan and its measured losses, if they are in the unit of the curve."""
    from compressor.planning import plan_loss

    plan, curve, evaluation = compression.plan, compression.curve, compression.evaluation
    if curve is None:
        return ()
    size, calibration = plan.eligible_after, plan.calibration
    predicted = None if calibration is None else calibration.predicted_loss
    said = "of the ranks chosen" if curve.unit == "relative error" else "predicted for the ranks chosen"
    points = [CurvePoint(said, size, plan_loss(curve, plan.layers, predicted), "o", "●")]
    if calibration is not None:
        label = f"measured on the {calibration.holdout} holdout examples"
        points.append(CurvePoint(label, size, calibration.holdout_loss, "^", "▲"))
    before = None if evaluation is None else evaluation.baseline_loss
    after = None if evaluation is None else evaluation.compressed_loss
    if curve.unit == "nats per prediction" and evaluation is not None and before is not None and after is not None:
        change = after - before
        if math.isfinite(change):
            points.append(CurvePoint(f"measured on {evaluation.data}", size, change, "s", "■"))
    return (*points, *_uniform_points(compression, in_errors=curve.unit == "relative error"))


def _uniform_points(compression: Compression, *, in_errors: bool) -> Iterator[CurvePoint]:
    """What int8 and int4 of the same model lose."""
    for each in compression.uniform:
        loss = each.error if in_errors else each.holdout_loss
        if loss is None or not math.isfinite(loss):
            continue
        marker, symbol = ("D", "◆") if each.method == "GPTQ" else ("v", "▼")
        label = f"{each.name} of all layers, {each.method}"
        yield CurvePoint(label, each.parameters, loss, marker, symbol)
