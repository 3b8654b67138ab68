"""Writes tensors into weight files, one at a time. For files that are complete or absent, write to a staged path."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch

from compressor.errors import CompressorError
from compressor.io.safetensors_file import layout
from compressor.io.tensors import TensorInfo, bytes_of


class SafetensorsWriter:
    """Writes a new safetensors file whose tensors are known in advance and come in any order.

    A context manager. Only the tensor at hand is in memory. The same tensors give the same bytes, those that the
    official library would write.

    Args:
        path: The file to write; none may be there.
        infos: Every tensor that will be written.
        metadata: Text for the header; `{"format": "pt"}` is what transformers expects.

    Raises:
        CompressorError: a tensor was not announced, differs from what was announced, comes twice, or never.
        OSError: the file exists, or cannot be written.
    """

    def __init__(self, path: Path, infos: Sequence[TensorInfo], metadata: Mapping[str, str]) -> None:
        self._path = path
        self._header, self._offsets, self._size = layout(infos, metadata)
        self._missing = {info.name: info for info in infos}
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        self._file = self._path.open("xb")
        try:
            self._write_at(memoryview(self._header), 0)
        except BaseException:
            self._file.close()
            raise
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, on any device and with any strides, to its place in the file."""
        info = self._missing.get(name)
        if info is None:
            raise CompressorError(f"{self._path}: tensor {name!r} was not announced or was already written")
        if tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
            written = f"{tuple(tensor.shape)} {tensor.dtype}"
            announced = f"{info.shape} {info.dtype}"
            raise CompressorError(f"{self._path}: tensor {name!r} is {written}, announced was {announced}")
        values = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
        self._write_at(bytes_of(values), self._offsets[name])
        del self._missing[name]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._file is not None
        self._file.close()
        if error is None and self._missing:
            names = ", ".join(list(self._missing)[:4])
            raise CompressorError(f"{self._path}: {len(self._missing)} tensors were never written ({names})")

    def _write_at(self, block: memoryview, offset: int) -> None:
        assert self._file is not None
        while block:
            count = os.pwrite(self._file.fileno(), block, offset)
            block, offset = block[count:], offset + count


@dataclass(frozen=True)
class Shard:
    """One weight file of a model folder and the tensors that go into it."""

    file_name: str
    infos: tuple[TensorInfo, ...]


def plan_shards(infos: Sequence[TensorInfo], max_shard_size: int) -> tuple[Shard, ...]:
    """Distribute tensors, in the given order, over files of at most `max_shard_size` bytes of values.

    One `model.safetensors` when everything fits; else `model-00001-of-0000N.safetensors` and so on, filled in
    order. A tensor larger than the limit gets a file of its own.
    """
    groups: list[list[TensorInfo]] = [[]]
    size = 0
    for info in infos:
        if groups[-1] and size + info.nbytes > max_shard_size:
            groups.append([])
            size = 0
        groups[-1].append(info)
        size += info.nbytes
    if len(groups) == 1:
        return (Shard("model.safetensors", tuple(groups[0])),)
    return tuple(
        Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    )


def shard_index(shards: Sequence[Shard]) -> dict[str, Any]:
    """The content of `model.safetensors.index.json`: total size in bytes and the file of each tensor."""
    weight_map = {info.name: shard.file_name for shard in shards for info in shard.infos}
    total_size = sum(info.nbytes for shard in shards for info in shard.infos)
    return {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}


def safetensors_size(infos: Sequence[TensorInfo], metadata: Mapping[str, str]) -> int:
    """Exact size in bytes of the safetensors file that holds these tensors and this metadata."""
    return layout(infos, metadata)[2]


class ShardedWriter:
    """Writes the weight files of a model folder, and their index where there are several.

    Used like `SafetensorsWriter`, which describes its errors; tensors may come in any order.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], metadata: Mapping[str, str]) -> None:
        self._folder = folder
        self._shards = shards
        self._stack = ExitStack()
        self._writer_of: dict[str, SafetensorsWriter] = {}
        self._writers = [SafetensorsWriter(folder / shard.file_name, shard.infos, metadata) for shard in shards]
        for shard, writer in zip(shards, self._writers, strict=True):
            self._writer_of |= dict.fromkeys((info.name for info in shard.infos), writer)

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            for writer in self._writers:
                opened.enter_context(writer)
            self._stack = opened.pop_all()
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor to its place in its file."""
        if name not in self._writer_of:
            raise CompressorError(f"{self._folder}: tensor {name!r} was not announced")
        self._writer_of[name].write(name, tensor)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, traceback)
        if error is None and len(self._shards) > 1:
            write_json(self._folder / "model.safetensors.index.json", shard_index(self._shards))


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON document as transformers does (two spaces, a final newline)."""
    # A name may hold half a surrogate pair, which UTF-8 has no bytes for and JSON an escape.
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    path.write_bytes(text.encode("utf-8", "backslashreplace"))


def write_state_dict_file(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a state dict with `torch.save`.

    The whole mapping is in memory, as torch.save needs it. Tensors that are one object stay tied; a view of
    a larger storage is written without the rest of it.
    """
    compact: dict[int, torch.Tensor] = {}
    for tensor in tensors.values():
        values = tensor.detach().to("cpu").contiguous()
        # torch.save writes the whole storage of a view.
        compact[id(tensor)] = values if values.untyped_storage().nbytes() == values.nbytes else values.clone()
    with path.open("xb") as file:
        try:
            torch.save({name: compact[id(tensor)] for name, tensor in tensors.items()}, file)
        except RuntimeError as error:
            # torch answers a failed write with an error of its own about a wrong position.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
