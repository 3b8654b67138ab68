"""A model that is to be written: what stands in its files, known before any of it is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from torch import Tensor, nn

from compressor.io.checkpoint import Checkpoint
from compressor.io.companions import NotCopied, companions
from compressor.io.tensors import TensorInfo
from compressor.io.writer import Shard, plan_shards, safetensors_size


@dataclass(frozen=True)
class Provenance:
    """What was asked for: the options by name, in the types of JSON, and the command that they make."""

    command: str
    options: Mapping[str, Any]

    def document(self) -> str:
        """The options as a file that can be given instead of them."""
        options = yaml.safe_dump(dict(self.options), sort_keys=False, allow_unicode=True)
        return f"# {' '.join(self.command.split())}\n{options}"


Document = Mapping[str, Any] | str
"""The content of a file beside the weights: a JSON document, or text."""


@dataclass(frozen=True)
class Artifact:
    """The weights of a model, computed as they are written, and what stands beside them in a folder.

    Args:
        form: Whether it is a file, a folder, or a module in memory.
        infos: Name, shape and dtype of every tensor.
        tensors: Computes them, one at a time and in any order.
        metadata: Text for the header of each weight file.
        shard_size: Bytes of the largest weight file of a folder; None for one weight file.
        weight_file: What the one weight file of a folder is called.
        companions_of: The checkpoint whose tokenizer, card and so on go along, where it is a folder.
        left_out: Companions that are not true of these weights.
        documents: What else a folder holds, by file name; asked for once the tensors are written.
        write: Writes the file, where it is not a safetensors file of the tensors.
        module: Builds the module in memory.
    """

    form: Literal["file", "folder", "module"]
    infos: Sequence[TensorInfo]
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]
    metadata: Mapping[str, str]
    shard_size: int | None = None
    weight_file: str = "model.safetensors"
    companions_of: Checkpoint | None = None
    left_out: tuple[str, ...] = ()
    documents: Callable[[], Mapping[str, Document]] = dict
    write: Callable[[Path], None] | None = None
    module: Callable[[], nn.Module] | None = None

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return sum(info.elements for info in self.infos)

    @property
    def bytes(self) -> int:
        """Exact size of the safetensors files, headers included and the index not; of the tensors of other forms."""
        if self.form == "module" or self.write is not None:
            return sum(info.nbytes for info in self.infos)
        return sum(safetensors_size(shard.infos, self.metadata) for shard in self.shards)

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The weight files and what goes into each."""
        if self.shard_size is None:
            return (Shard(self.weight_file, tuple(self.infos)),)
        return plan_shards(self.infos, self.shard_size)

    @property
    def not_copied(self) -> tuple[NotCopied, ...]:
        """What of the source's folder does not go along, and why."""
        folder = None if self.companions_of is None else self.companions_of.folder
        return () if folder is None else companions(folder).not_copied
