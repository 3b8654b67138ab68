"""Metadata of a tensor, known before its values are read, and the two places where values are stored."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from compressor.errors import BadInput
from compressor.io.files import AnyFile, read_at

LONGEST_NAME = 4096


def require_short_names(names: Iterable[str], path: AnyFile) -> None:
    """Refuse a file with a tensor name too long for screens, tables and patterns."""
    for name in names:
        if len(name) > LONGEST_NAME:
            what = f"has a tensor with a name of {len(name):,} characters ({name[:40]!r}...)"
            raise BadInput(what, where=str(path), remedy=f"rename it, to {LONGEST_NAME:,} at most")


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, as bytes: writing there changes the tensor."""
    # NumPy has no bfloat16 and no eight-bit floats, but it has bytes.
    return tensor.reshape(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True)
class TensorInfo:
    """Name, shape and dtype of one tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return self.elements * self.dtype.itemsize


class StoredTensor(Protocol):
    """A tensor whose values are stored somewhere: `read` copies them into new CPU memory."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def region(self) -> Hashable:
        """Equal for two tensors if and only if they are the same stored values."""

    def read(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class TensorOnDisk:
    """A strided tensor in a file: element (i, j, ...) is at `offset + itemsize * (i*strides[0] + ...)`.

    `offset` counts bytes from the start of the file, `strides` counts elements.
    """

    file: AnyFile
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def span(self) -> int:
        """Elements from the first to the last one, gaps included."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

    @property
    def region(self) -> Hashable:
        # Tensors without elements share nothing, wherever they are.
        return self if self.span else object()

    def read(self) -> torch.Tensor:
        """The values as a contiguous CPU tensor with memory of its own.

        Raises:
            BadInput: the file is gone or has become shorter.
        """
        values = torch.empty(self.span, dtype=self.dtype)
        read_at(self.file, self.offset, bytes_of(values))
        return values.as_strided(self.shape, self.strides).contiguous()


@dataclass(frozen=True, eq=False)
class TensorInMemory:
    """A tensor that is already loaded, on any device."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def __reduce__(self) -> tuple[object, ...]:
        # Another process gets these values, not all the memory that they are a part of.
        return TensorInMemory, (self.read(),)

    @property
    def region(self) -> Hashable:
        if self.tensor.is_meta or not self.tensor.numel():
            return id(self.tensor)
        return (self.tensor.device, self.tensor.data_ptr(), self.shape, self.tensor.stride(), self.dtype)

    def read(self) -> torch.Tensor:
        """A contiguous CPU copy of the values; `BadInput` for a tensor on the meta device."""
        if self.tensor.is_meta:
            remedy = "load the module's weights before compressing it"
            raise BadInput("a tensor on the meta device has no values", remedy=remedy)
        copy = self.tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return copy.resolve_conj().resolve_neg()
