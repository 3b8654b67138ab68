"""Reading an archive: any of its checkpoints, whose tensors are put together when they are read."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compressor.archiving.change import Change
from compressor.archiving.index import ArchivedCheckpoint, ArchiveIndex, change_from_list
from compressor.archiving.write import CHANGES, COMPANIONS
from compressor.documents import parse_json, read_json
from compressor.errors import BadInput
from compressor.initial import InitialWeights
from compressor.io import PLAN_FILE, Checkpoint, StoredTensor, TensorInfo
from compressor.io.checkpoint import CHANGE_SUFFIX
from compressor.io.files import sha256_of_file
from compressor.io.safetensors_file import read_safetensors
from compressor.io.tensors import bytes_of
from compressor.lowrank import RecordedStarts

_REMEDY = "copy it again, or archive the checkpoints again"


def is_archive(folder: Path) -> bool:
    """Whether a folder is an archive of checkpoints."""
    return any(folder.glob(f"*{CHANGE_SUFFIX}"))


def read_index(folder: Path) -> ArchiveIndex:
    """What an archive says of itself; `BadInput` where it is none, or damaged."""
    document = read_json(folder / PLAN_FILE).get("archive")
    try:
        return ArchiveIndex.from_dict(document)
    except ValueError as error:
        raise BadInput(f"is no archive that can be read: {error}", where=folder, remedy=_REMEDY) from None


def archived_checkpoint(
    folder: Path, index: ArchiveIndex, wanted: ArchivedCheckpoint, *, initial: InitialWeights | None = None
) -> Checkpoint:
    """A checkpoint of an archive; its tensors are restored one at a time, when they are read.

    Args:
        folder: The archive.
        index: What it says of itself.
        wanted: One of its checkpoints.
        initial: The initial weights, where the archive names a checkpoint instead of having a record of the draws.

    Raises:
        BadInput: a file of it is missing or damaged, or the initial weights are others.
    """
    chains: dict[str, list[_Link]] = {name: [] for name in index.tensors}
    files, pending = [], set(index.tensors)
    for archived in reversed(index.checkpoints[: index.checkpoints.index(wanted) + 1]):
        file = folder / archived.file
        files.append(file)
        links = _links(file, archived.digest, sorted(pending))
        for tensor, link in links.items():
            chains[tensor].append(link)
        pending = {tensor for tensor, link in links.items() if link.source == "previous"}
        if not pending:
            break
    if pending:
        raise BadInput("its first checkpoint is a change from one before it", where=folder, remedy=_REMEDY)
    started = {name for name, chain in chains.items() if chain[-1].source == "initial"}
    if unknown := started - (set() if index.initial is None else index.initial.tensors.keys()):
        what = f"does not say what the initial weights of {min(unknown)} are"
        raise BadInput(what, where=folder, remedy=_REMEDY)
    starts = RecordedStarts(index.initial, initial, folder) if started and index.initial is not None else None
    stored = {name: ArchivedTensor(info, tuple(reversed(chains[name])), starts) for name, info in index.tensors.items()}
    companions = folder / COMPANIONS if index.form == "folder" else None
    described = companions is not None and (companions / "config.json").is_file()
    return Checkpoint(
        source=folder,
        form=index.form,
        files=tuple(files),
        folder=companions,
        tensors=index.tensors,
        aliases=index.aliases,
        metadata={"format": "pt"} | dict(index.aliases),
        config=read_json(companions / "config.json") if companions is not None and described else None,
        _stored=stored,
    )


@dataclass(frozen=True)
class _Link:
    """What one file of an archive says of a tensor, and where its numbers are."""

    file: Path
    said: Sequence[object]
    payload: StoredTensor | None

    @property
    def source(self) -> object:
        return self.said[0]

    def change(self) -> Change:
        payload = b"" if self.payload is None else bytes(bytes_of(self.payload.read()))
        return change_from_list(self.said, payload)


def _links(file: Path, digest: str, names: Sequence[str]) -> dict[str, _Link]:
    """What a file of changes says of some tensors; `BadInput` where it is damaged."""
    payloads, metadata = read_safetensors(file)
    if sha256_of_file(file) != digest:
        raise BadInput("was changed since it was archived", where=file, remedy=_REMEDY)
    said = parse_json(metadata.get(CHANGES, "{}"), where=file)
    if not isinstance(said, Mapping) or not all(isinstance(said.get(name), list) and said[name] for name in names):
        raise BadInput("does not say how its tensors are stored", where=file, remedy=_REMEDY)
    return {name: _Link(file, said[name], payloads.get(name)) for name in names}


@dataclass(frozen=True, eq=False)
class ArchivedTensor:
    """A tensor of a checkpoint in an archive: changes one after the other, from nothing or the initial weights on."""

    info: TensorInfo
    chain: Sequence[_Link]
    starts: RecordedStarts | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.info.dtype

    @property
    def region(self) -> Hashable:
        return id(self)

    def read(self) -> Tensor:
        """The tensor, in memory of its own; `BadInput` where the archive is damaged."""
        like = torch.empty(self.shape, dtype=self.dtype, device="meta")
        found: Tensor | None = None
        for link in self.chain:
            if link.source == "initial" and self.starts is not None:
                found = self.starts.tensor(self.info.name, self.shape)
            try:
                found = link.change().restored(like, found)
            except ValueError as error:
                what = f"tensor {self.info.name} is damaged: {error}"
                raise BadInput(what, where=link.file, remedy=_REMEDY) from None
        assert found is not None
        return found
