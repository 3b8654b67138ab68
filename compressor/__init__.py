"""Make trained neural networks smaller before deployment, knowing from how they were trained where it may cut.

`import compressor` is light, and enough for transformers to load compressed folders: torch and the stages are imported
when one of the names below is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from compressor.errors import BadInput, CompressorError, QualityGateNotMet
from compressor.registration import register

if TYPE_CHECKING:
    from compressor.api.compress import compress, plan
    from compressor.api.diagnose import diagnose
    from compressor.api.evaluate import evaluate
    from compressor.api.explore import explore
    from compressor.api.export import export
    from compressor.api.inspect import inspect
    from compressor.api.merge import merge
    from compressor.api.restore import restore
    from compressor.calibration import CalibrationSettings
    from compressor.evaluation import Evaluation, TimingSettings
    from compressor.io import Checkpoint, open_checkpoint
    from compressor.measure import MemoryWindow, memory_window
    from compressor.planning import Plan, PlanningSettings
    from compressor.recipe import TrainingRecipe
    from compressor.results import Compression, Diagnosis, Export, Inspection, Merging, Restoration

_HOME = {
    "CalibrationSettings": "calibration",
    "Checkpoint": "io",
    "Compression": "results",
    "Diagnosis": "results",
    "Evaluation": "evaluation",
    "Export": "results",
    "Inspection": "results",
    "Merging": "results",
    "MemoryWindow": "measure",
    "Plan": "planning",
    "PlanningSettings": "planning",
    "Restoration": "results",
    "TimingSettings": "evaluation",
    "TrainingRecipe": "recipe",
    "compress": "api.compress",
    "diagnose": "api.diagnose",
    "evaluate": "api.evaluate",
    "explore": "api.explore",
    "export": "api.export",
    "inspect": "api.inspect",
    "merge": "api.merge",
    "memory_window": "measure",
    "open_checkpoint": "io",
    "plan": "api.compress",
    "restore": "api.restore",
}

__all__ = [
    "BadInput",
    "CalibrationSettings",
    "Checkpoint",
    "Compression",
    "CompressorError",
    "Diagnosis",
    "Evaluation",
    "Export",
    "Inspection",
    "MemoryWindow",
    "Merging",
    "Plan",
    "PlanningSettings",
    "QualityGateNotMet",
    "Restoration",
    "TimingSettings",
    "TrainingRecipe",
    "compress",
    "diagnose",
    "evaluate",
    "explore",
    "export",
    "inspect",
    "memory_window",
    "merge",
    "open_checkpoint",
    "plan",
    "restore",
]

register()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'compressor' has no attribute {name!r}")
    return getattr(importlib.import_module(f"compressor.{_HOME[name]}"), name)
