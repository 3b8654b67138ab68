"""Adding networks, or putting them side by side; and how much they are in each other's way."""

from __future__ import annotations

from compressor.merging.overlap import InputOverlap, LayerOverlap, principal_cosines, row_space
from compressor.merging.quality import TaskQuality
from compressor.merging.weights import joined

__all__ = [
    "InputOverlap",
    "LayerOverlap",
    "TaskQuality",
    "joined",
    "principal_cosines",
    "row_space",
]
