"""Examples: files, folders and built-in data as batches that a model reads."""

from __future__ import annotations

from compressor.data.data import Batch, EvaluationData, halves, has_splits, open_data, require_apart
from compressor.data.preprocessing import Preprocessing, load_preprocessing, open_data_for, open_search_data

__all__ = [
    "Batch",
    "EvaluationData",
    "Preprocessing",
    "halves",
    "has_splits",
    "load_preprocessing",
    "open_data",
    "open_data_for",
    "open_search_data",
    "require_apart",
]
