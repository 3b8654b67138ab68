"""What comes after compression: the model in the form of the place where it is run."""

from __future__ import annotations

from compressor.exporting.export import Export, Target, export

__all__ = ["Export", "Target", "export"]
