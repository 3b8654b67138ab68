"""Writing an archive: tensor by tensor over all checkpoints, with one tensor of two checkpoints in memory."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.archiving.index import ArchivedCheckpoint, ArchiveIndex, change_to_list
from compressor.archiving.references import Stored, references_of, smallest_change
from compressor.archiving.run import TrainingRun
from compressor.initial import initial_name
from compressor.io import (
    PLAN_FILE,
    Checkpoint,
    SafetensorsWriter,
    TensorInfo,
    copy_companions,
    portable_config,
    write_json,
)
from compressor.io.checkpoint import CHANGE_SUFFIX
from compressor.io.files import sha256_of_file
from compressor.lowrank import InitialRecord
from compressor.lowrank.spec import InitialTensor
from compressor.progress import Progress
from compressor.version import VERSION

CHANGES = "changes"
"""The entry in the metadata of a file of changes that says how its tensors are stored."""

COMPANIONS = "companions"
"""The folder for what stands beside the weights in the folders of the checkpoints."""


def write_archive(
    folder: Path, run: TrainingRun, tolerance: float, *, progress: Progress | None = None
) -> ArchiveIndex:
    """Write the checkpoints of a run into an empty folder.

    A change is taken from the checkpoint before as it is restored, so errors do not add up: the error of a checkpoint
    is that of its own change, which is measured on what is restored.

    Raises:
        BadInput: the checkpoints do not belong together, or cannot be read.
    """
    run.require_alike()
    first = run.checkpoints[0]
    gathered = [_GatheredChanges(folder / f".{number}.part") for number in range(len(run.checkpoints))]
    from_initial: list[str] = []
    for done, name in enumerate(first.tensors):
        stored: Stored | None = None
        # Every bit is kept without them alone: other processors draw other last bits.
        initial = run.initial_of(name) if tolerance else None
        for place, checkpoint in enumerate(run.checkpoints):
            tensor = checkpoint.read(name)
            previous = None if stored is None else stored.restored
            references = references_of(run, name, place, tensor=tensor, previous=previous, initial=initial)
            stored = smallest_change(tensor, references, tolerance)
            gathered[place].add(name, tensor, stored)
            if stored.change.source == "initial" and name not in from_initial:
                from_initial.append(name)
            if progress:
                progress("archive", done * len(gathered) + place + 1, len(gathered) * len(first.tensors))
    archived = tuple(
        each.finished(checkpoint, number)
        for each, checkpoint, number in zip(gathered, run.checkpoints, run.numbers, strict=True)
    )
    _write_companions(run.checkpoints[-1], folder / COMPANIONS)
    index = ArchiveIndex(
        "file" if first.folder is None else "folder",
        tolerance,
        run.unit,
        dict(first.tensors),
        dict(first.aliases),
        archived,
        _record(run, from_initial),
    )
    document: dict[str, Any] = {"archive": index.to_dict(), "recipe": run.recipe.to_dict(), "version": VERSION}
    write_json(folder / PLAN_FILE, document)
    return index


@dataclass
class _GatheredChanges:
    """The changes of one checkpoint: their numbers on disk, one after the other, until all are known."""

    path: Path
    changes: dict[str, list[Any]] = field(default_factory=dict)
    infos: list[TensorInfo] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    ranks: list[int] = field(default_factory=list)
    bounds: list[int] = field(default_factory=list)
    error: float = 0.0

    def add(self, name: str, tensor: Tensor, stored: Stored) -> None:
        """Keep the change of a tensor."""
        change = stored.change
        self.changes[name] = change_to_list(change)
        self.counts.update([change.source, *(["exact"] if change.exact else [] if change.payload else ["unchanged"])])
        self.error = max(self.error, 0.0 if change.exact else stored.relative_error(tensor))
        if change.rank:
            self.ranks.append(change.rank)
        if stored.reference.rank_bound is not None:
            self.bounds.append(stored.reference.rank_bound)
        if change.payload:
            self.infos.append(TensorInfo(name, (len(change.payload),), torch.uint8))
            with self.path.open("ab") as file:
                file.write(change.payload)

    def finished(self, checkpoint: Checkpoint, number: int) -> ArchivedCheckpoint:
        """Write the changes to their safetensors file, and remove the temporary one."""
        file = self.path.with_name(checkpoint.name.rpartition("/")[2] + CHANGE_SUFFIX)
        metadata = {CHANGES: json.dumps(self.changes, separators=(",", ":"))}
        with SafetensorsWriter(file, self.infos, metadata) as writer:
            for name, payload in self._payloads():
                writer.write(name, payload)
        self.path.unlink(missing_ok=True)
        return ArchivedCheckpoint(
            name=file.name.removesuffix(CHANGE_SUFFIX),
            number=number,
            bytes=checkpoint.weight_bytes,
            stored_bytes=file.stat().st_size,
            digest=sha256_of_file(file),
            error=self.error,
            from_initial=self.counts["initial"],
            from_previous=self.counts["previous"],
            in_full=self.counts["nothing"],
            unchanged=self.counts["unchanged"],
            exact=self.counts["exact"],
            rank=statistics.median(self.ranks) if self.ranks else None,
            largest_rank=max(self.ranks, default=0),
            rank_bound=min(self.bounds, default=None),
            bounded=len(self.bounds),
        )

    def _payloads(self) -> Iterator[tuple[str, Tensor]]:
        if not self.infos:
            return
        with self.path.open("rb") as file:
            for info in self.infos:
                yield info.name, torch.frombuffer(bytearray(file.read(info.nbytes)), dtype=torch.uint8)


def _write_companions(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy what stands beside the weights in the folder of a checkpoint, if it is one."""
    if checkpoint.folder is None:
        return
    folder.mkdir()
    copy_companions(checkpoint.folder, folder)
    if checkpoint.config is not None:
        write_json(folder / "config.json", portable_config(checkpoint.config))


def _record(run: TrainingRun, names: Sequence[str]) -> InitialRecord | None:
    """Where the initial weights of some tensors come from; None where there are none."""
    if not names or run.initial is None:
        return None
    tensors = {}
    for name in names:
        for known in (initial_name(run.layers[name]), name):
            if name not in tensors and (found := run.initial.fingerprint(known)) is not None:
                tensors[name] = InitialTensor(known, found)
    if run.initial.draws is not None:
        return InitialRecord(tensors, run.initial.draws.only({each.name for each in tensors.values()}))
    return InitialRecord(tensors, None, run.initial.checkpoint_name or run.initial.source, run.initial.digest)
