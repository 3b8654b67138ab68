"""What is done with data before a model is made smaller: examples by what they serve, calibration, and plans."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from compressor.api.calibration_data import calibration_data, calibration_settings
from compressor.api.options import CompressOptions
from compressor.api.requests import data_to_measure_on
from compressor.calibration import Calibration, CalibrationData, calibrate
from compressor.calibration.drop import DropGate, plan_within_drop, within_drop
from compressor.calibration.search import PlannedModel, PlanRequest, plan_ranks
from compressor.data import EvaluationData
from compressor.engine import Run
from compressor.errors import BadInput, QualityGateNotMet
from compressor.evaluation import Evaluation
from compressor.model import Model, on_device
from compressor.planning import MeasuredLayer, within_limit

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenedData:
    """Examples by what they serve: to calibrate on, to choose a size by, and to report on."""

    calibration: CalibrationData | None
    search: EvaluationData | None
    report: EvaluationData | None


def open_data(asked: CompressOptions, subject: Model, run: Run) -> OpenedData:
    """The data that are asked for, which the model is known to take."""
    calibrates = asked.calibrates or asked.calibration_cache is not None
    if asked.data is not None or calibrates:
        subject.require_runnable()
    search, report = data_to_measure_on(asked, subject)
    # Of a difference ranks by weights alone are no danger: nothing is said of missing examples, and none are made.
    unasked = asked.base is not None and not calibrates
    return OpenedData(None if unasked else calibration_data(asked, subject, run), search, report)


def held_on_device(subject: Model, data: OpenedData, run: Run) -> AbstractContextManager[None]:
    """Hold the dense model on the device while it is planned for, if it runs there at all."""
    if data.calibration is None and data.search is None:
        return nullcontext()
    return on_device(run.device, subject.streamed)


def calibrated_on(
    asked: CompressOptions, subject: Model, measured: Sequence[MeasuredLayer], *, data: CalibrationData, run: Run
) -> Calibration | None:
    """The metric of the layers; None where the model cannot be calibrated on examples of its own, unasked."""
    dense, layers = subject.streamed, [each.layer for each in measured]
    try:
        settings = calibration_settings(asked, data)
        calibrated = calibrate(dense, layers, data, run=run, settings=settings, files=subject.files)
        return replace(calibrated, initial=subject.initial)
    except BadInput as error:
        if asked.calibrates or asked.calibration_cache is not None:
            raise
        logger.warning("not calibrated on examples of its own: %s", error)
        return None


def planned_on(
    subject: Model,
    measured: Sequence[MeasuredLayer],
    request: PlanRequest,
    *,
    calibration: Calibration | None,
    gate: DropGate | None,
    limit: float | None,
) -> PlannedModel:
    """The plan that a request asks for; where there is a `limit` on the drop, the smallest within it, or checked.

    Raises `QualityGateNotMet` where no plan is within it.
    """
    if gate is not None and request.budget is not None and request.budget.kind == "max-drop":
        return plan_within_drop(subject, measured, request, gate=gate, calibration=calibration)
    planned = plan_ranks(subject, measured, request, calibration=calibration)
    if gate is None or limit is None:
        return planned
    return within_drop(subject, planned, gate=gate, limit=limit)


def require_allowed_drop(evaluation: Evaluation, asked: CompressOptions, name: str) -> None:
    """Raise `QualityGateNotMet`, or only warn, when the data that did not decide show too large a drop."""
    limit = asked.max_drop
    if limit is None or evaluation.drop is None or within_limit(evaluation.drop, limit):
        return
    found = f"the drop on {evaluation.data} is {evaluation.drop:.4g}, more than `max_drop` {limit:g}"
    if not asked.allow_miss:
        raise QualityGateNotMet(
            f"{name}: {found}; ask for a smaller drop or give more data, or write the model nevertheless with"
            " `allow_miss=True`"
        )
    logger.warning(found)
