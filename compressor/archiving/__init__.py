"""Archives of small runs: the checkpoints of a training as changes from where it started and from one another."""

from __future__ import annotations

from compressor.archiving.index import ArchivedCheckpoint, ArchiveIndex
from compressor.archiving.read import archived_checkpoint, is_archive, read_index
from compressor.archiving.run import TrainingRun
from compressor.archiving.write import write_archive

__all__ = [
    "ArchiveIndex",
    "ArchivedCheckpoint",
    "TrainingRun",
    "archived_checkpoint",
    "is_archive",
    "read_index",
    "write_archive",
]
