"""Adding networks, or putting them side by side; and how much they are in each other's way."""

from compressor.merging.merge import MergeRefused, Merging, TaskQuality, merge
from compressor.merging.overlap import InputOverlap, LayerOverlap, principal_cosines, row_space
from compressor.merging.weights import joined

__all__ = [
    "InputOverlap",
    "LayerOverlap",
    "MergeRefused",
    "Merging",
    "TaskQuality",
    "joined",
    "merge",
    "principal_cosines",
    "row_space",
]
