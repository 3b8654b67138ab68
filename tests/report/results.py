"""Results that no model was compressed for: a plan, and sizes halved."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compressor.planning import Budget, Plan
from compressor.recipe import TrainingRecipe
from compressor.results import BeforeAfter, Compression


def compression_of(plan: Plan, **changes: Any) -> Compression:
    """What `compress` would return of a plan, with some of its fields."""
    result = Compression(
        source="model",
        output=None,
        recipe=TrainingRecipe(),
        plan=plan,
        parameters=BeforeAfter(100, 50),
        bytes=BeforeAfter(400, 200),
        evaluation=None,
        seconds=1.5,
        peak_memory_bytes=10**8,
        skipped=(),
        spectra={},
    )
    return replace(result, **changes)


def plan_of(*layers: Any, **known: Any) -> Plan:
    """A plan for a share of the size."""
    return Plan("model", None, Budget("keep", 0.25), layers, **known)
