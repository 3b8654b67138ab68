"""Calibration: a metric of the loss for every layer, and the plan and factors with the least holdout loss."""

from __future__ import annotations

from compressor.calibration.calibrate import calibrate, recalibrate
from compressor.calibration.calibration import Calibration
from compressor.calibration.compensation import compensate
from compressor.calibration.end_to_end import refine_end_to_end
from compressor.calibration.examples import CalibrationData, split_examples
from compressor.calibration.holdout import holdout_loss
from compressor.calibration.refinement import refine
from compressor.calibration.replacements import Compensated
from compressor.calibration.settings import CalibrationSettings, RefinementSettings
from compressor.calibration.truncation import uncompensated

__all__ = [
    "Calibration",
    "CalibrationData",
    "CalibrationSettings",
    "Compensated",
    "RefinementSettings",
    "calibrate",
    "compensate",
    "holdout_loss",
    "recalibrate",
    "refine",
    "refine_end_to_end",
    "split_examples",
    "uncompensated",
]
