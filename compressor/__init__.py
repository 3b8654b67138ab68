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
    from compressor.checkpoint import Checkpoint, open_checkpoint
    from compressor.diagnosis import Diagnosis, diagnose
    from compressor.evaluation import Evaluation
    from compressor.exploration import explore
    from compressor.exporting import Export, export
    from compressor.measure import MemoryWindow, memory_window
    from compressor.merging import Merging, merge
    from compressor.pipeline import compress, evaluate, inspect, plan
    from compressor.planning import Plan
    from compressor.recipe import TrainingRecipe
    from compressor.restoration import restore
    from compressor.results import Compression, Inspection, Restoration

_HOME = {
    "Checkpoint": "checkpoint",
    "Compression": "results",
    "Diagnosis": "diagnosis",
    "Evaluation": "evaluation",
    "Export": "exporting",
    "Inspection": "results",
    "Merging": "merging",
    "MemoryWindow": "measure",
    "Plan": "planning",
    "Restoration": "results",
    "TrainingRecipe": "recipe",
    "compress": "pipeline",
    "diagnose": "diagnosis",
    "evaluate": "pipeline",
    "explore": "exploration",
    "export": "exporting",
    "inspect": "pipeline",
    "merge": "merging",
    "memory_window": "measure",
    "open_checkpoint": "checkpoint",
    "plan": "pipeline",
    "restore": "restoration",
}

__all__ = [
    "BadInput",
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
    "QualityGateNotMet",
    "Restoration",
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
