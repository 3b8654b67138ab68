"""Stage 7: what compression cost, two models side by side on the same data."""

from __future__ import annotations

from compressor.evaluation.cost import (
    Cost,
    Latency,
    count_bytes,
    count_macs,
    count_parameters,
    measure_cost,
    measure_latency,
    measure_peak_memory,
)
from compressor.evaluation.data import Batch, EvaluationData, halves, has_splits, open_data, require_apart
from compressor.evaluation.evaluate import Evaluation, compare
from compressor.evaluation.inference import logits_of, prepared, resolve_device
from compressor.evaluation.load import build_model, load_model, require_architecture
from compressor.evaluation.metrics import Quality, drop_error, measure_quality, quality_drop, require_accepted
from compressor.evaluation.models import (
    Preprocessing,
    load_factory,
    load_preprocessing,
    load_state,
    load_transformers,
)

__all__ = [
    "Batch",
    "Cost",
    "Evaluation",
    "EvaluationData",
    "Latency",
    "Preprocessing",
    "Quality",
    "build_model",
    "compare",
    "count_bytes",
    "count_macs",
    "count_parameters",
    "drop_error",
    "halves",
    "has_splits",
    "load_factory",
    "load_model",
    "load_preprocessing",
    "load_state",
    "load_transformers",
    "logits_of",
    "measure_cost",
    "measure_latency",
    "measure_peak_memory",
    "measure_quality",
    "open_data",
    "prepared",
    "quality_drop",
    "require_accepted",
    "require_apart",
    "require_architecture",
    "resolve_device",
]
