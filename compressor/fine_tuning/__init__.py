"""Fine-tunes: what they add to the model that they started from, compressed instead of their weights."""

from __future__ import annotations

from compressor.fine_tuning.apply import adapter_of_file, applied, is_difference
from compressor.fine_tuning.compress import compress_fine_tune, write_adapter

__all__ = ["adapter_of_file", "applied", "compress_fine_tune", "is_difference", "write_adapter"]
