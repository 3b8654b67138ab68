"""Examples: files, folders, objects, and built-in data as batches for a model."""

from __future__ import annotations

from compressor.data.batches import IGNORED_LABEL, Batch, placed
from compressor.data.data import (
    EvaluationData,
    Sample,
    Task,
    halves,
    has_splits,
    open_data,
    open_search_data,
    require_apart,
)
from compressor.data.metric import CustomMetric, MetricFunction
from compressor.data.preprocessing import Preprocessing, load_preprocessing, preprocessing_of

__all__ = [
    "IGNORED_LABEL",
    "Batch",
    "CustomMetric",
    "EvaluationData",
    "MetricFunction",
    "Preprocessing",
    "Sample",
    "Task",
    "halves",
    "has_splits",
    "load_preprocessing",
    "open_data",
    "open_search_data",
    "placed",
    "preprocessing_of",
    "require_apart",
]
