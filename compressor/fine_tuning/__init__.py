"""Fine-tunes: what they add to the model that they started from, compressed instead of their weights."""

from __future__ import annotations

from compressor.fine_tuning.apply import (
    adapter_of_file,
    applied_artifact,
    is_difference,
    materialize_fine_tune,
    opened_fine_tune,
    require_no_more_tokens,
)

__all__ = [
    "adapter_of_file",
    "applied_artifact",
    "is_difference",
    "materialize_fine_tune",
    "opened_fine_tune",
    "require_no_more_tokens",
]
