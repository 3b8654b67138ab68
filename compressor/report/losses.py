"""The losses of a compression, predicted and measured: the points beside the curve of loss over size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from compressor.report.plot import Shape

if TYPE_CHECKING:
    from compressor.evaluation import UniformQuantization
    from compressor.results import Compression


@dataclass(frozen=True)
class CurvePoint:
    """One loss at one size of the weight files, in the unit of the curve, and whether it was measured or predicted.

    `name` is what stands beside it in the plot, and `of` tells this model from other tools' quantizations of it.
    """

    label: str
    bytes: int
    loss: float
    measured: bool
    shape: Shape
    name: str = ""
    of: Literal["ours", "others"] = "ours"

    @property
    def words(self) -> str:
        """The loss in figures, and that a logarithmic axis has no place for one that is not above zero."""
        return f"{self.loss:.3g}" + ("" if self.loss > 0 else ", not above zero: at the lower edge")


def curve_points(compression: Compression) -> tuple[CurvePoint, ...]:
    """The predicted loss of the plan and the losses measured in the unit of the curve; its own first."""
    from compressor.planning import plan_loss

    plan, curve, evaluation = compression.plan, compression.curve, compression.evaluation
    if curve is None:
        return ()
    size, calibration = compression.bytes.after, plan.calibration
    if curve.unit == "relative error":
        points = [CurvePoint("this model", size, plan_loss(curve, plan.layers, None), True, "circle")]
        return (*points, *_uniform_points(compression, on="weights"))
    assert calibration is not None, "losses are in this unit by calibration alone"
    points = [
        CurvePoint("this model, predicted", size, calibration.predicted_loss, False, "circle"),
        CurvePoint(
            f"this model, measured on the {calibration.holdout} holdout examples",
            *(size, calibration.holdout_loss, True, "up"),
        ),
    ]
    change = compression.losses.on_data
    on_data = curve.unit == "nats per prediction" and change is not None and math.isfinite(change)
    if on_data and change is not None and evaluation is not None:
        points.append(CurvePoint(f"this model, measured on {evaluation.data}", size, change, True, "square"))
    return (*points, *_uniform_points(compression, on="data" if on_data else "holdout"))


def _uniform_points(compression: Compression, *, on: Literal["weights", "holdout", "data"]) -> Iterator[CurvePoint]:
    """What int8 and int4 of the same model lose: on the data those that were measured there, else on the holdout."""
    dense = compression.losses.dense_loss
    for each in compression.uniform:
        loss, where = (each.error, "") if on == "weights" else (each.holdout_loss, ", on the holdout")
        if on == "data" and each.loss is not None and dense is not None:
            loss, where = each.loss - dense, f", on {compression.losses.data}"
        if loss is not None and math.isfinite(loss):
            yield _uniform_point(each, loss, where)


def _uniform_point(each: UniformQuantization, loss: float, where: str) -> CurvePoint:
    shape: Shape = "diamond" if each.method == "GPTQ" else "down"
    label = f"{each.name} of all layers, {each.method}{where}"
    return CurvePoint(label, each.bytes, loss, True, shape, each.name, "others")
