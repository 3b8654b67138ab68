"""A tensor that other stored tensors stand for: integers or small floats with their scales."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from compressor.errors import BadInput
from compressor.formatting import format_shape
from compressor.io import StoredTensor, TensorInfo, nth


class Decoder(Protocol):
    """How the parts of a tensor are read."""

    @property
    def words(self) -> str:
        """How the tensor is stored, in words."""

    def decode(self, *parts: Tensor) -> Tensor:
        """The values in float32, from the values of the parts in their order."""


@dataclass(frozen=True)
class Part:
    """A stored tensor that is part of another, by its name in the file."""

    name: str
    stored: StoredTensor

    @property
    def info(self) -> TensorInfo:
        """Its name, shape and dtype."""
        return TensorInfo(self.name, self.stored.shape, self.stored.dtype)


@dataclass(frozen=True, eq=False)
class EncodedTensor:
    """A tensor that stored parts stand for, decoded whenever it is read.

    Args:
        name: What it is called once it is decoded.
        shape: Of its values.
        dtype: What its values are rounded to, once, when they are read.
        decoder: How its parts are read.
        parts: What is read, in the decoder's order.
        beside: What the file has for the same layer and its weights do not need, such as scales of its inputs.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    decoder: Decoder
    parts: tuple[Part, ...]
    beside: tuple[Part, ...] = ()

    @property
    def region(self) -> Hashable:
        return tuple(part.stored.region for part in self.parts)

    @property
    def stored(self) -> tuple[Part, ...]:
        """All that the file has for it."""
        return (*self.parts, *self.beside)

    @property
    def infos(self) -> list[TensorInfo]:
        """Names, shapes and dtypes of all that the file has for it."""
        return [part.info for part in self.stored]

    @property
    def nbytes(self) -> int:
        """Bytes of all that the file has for it."""
        return sum(info.nbytes for info in self.infos)

    def nth(self, number: int) -> EncodedTensor | None:
        """The tensor at a place of the first dimension; None where its parts have no such dimension."""
        if not getattr(self.decoder, "by_first_dimension", False):
            return None
        found = [nth(part.stored, number) for part in self.parts]
        parts = [Part(part.name, own) for part, own in zip(self.parts, found, strict=True) if own is not None]
        if len(parts) < len(found):
            return None
        return EncodedTensor(self.name, self.shape[1:], self.dtype, self.decoder, tuple(parts))

    def read(self) -> Tensor:
        """Its values, in memory of their own."""
        parts = [part.stored.read() for part in self.parts]
        try:
            return self.decoder.decode(*parts).to(self.dtype).contiguous()
        except BadInput as error:
            raise error.in_file(self.name) from None


@dataclass(frozen=True)
class StoredTensors:
    """The tensors of a file or folder as they are stored, and what its configuration says of them.

    Args:
        tensors: By name.
        said: The `quantization_config` of its `config.json`; {} without one.
        dtype: What the values of decoded tensors are rounded to.
        where: The file or folder, for messages.
    """

    tensors: Mapping[str, StoredTensor]
    said: Mapping[str, Any]
    dtype: torch.dtype
    where: Path | None = None

    @property
    def method(self) -> str:
        """Who quantized it, as its configuration says; empty where it says nothing."""
        method = self.said.get("quant_method")
        return method if isinstance(method, str) else ""

    @staticmethod
    def below(layer: str, name: str) -> str:
        """The name of a tensor of a layer, whose own name may be empty."""
        return f"{layer}.{name}" if layer else name

    def part(self, name: str) -> Part | None:
        """A tensor by its name; None where there is none."""
        return Part(name, self.tensors[name]) if name in self.tensors else None

    def parts(self, names: Sequence[str]) -> tuple[Part, ...]:
        """Those that there are of some tensors."""
        return tuple(Part(name, self.tensors[name]) for name in names if name in self.tensors)

    def misfit(self, name: str, *parts: Part) -> BadInput:
        """What refuses parts whose shapes or dtypes do not fit together."""
        sides = ", ".join(f"{part.name} {format_shape(part.stored.shape) or 'one number'}" for part in parts)
        what = f"the stored parts of {name[:200]} do not fit together ({sides[:300]})"
        return BadInput(what, where=self.where, remedy="download it again, or give the original")

    def missing(self, name: str, part: str) -> BadInput:
        """What refuses a tensor of which a part is not there."""
        what = f"{part[:200]}, without which {name[:200]} cannot be read, is missing"
        return BadInput(what, where=self.where, remedy="give the whole model, with its config.json, or the original")


def powers_of_two(exponents: Tensor) -> Tensor:
    """The scales that E8M0 stores as bytes, in float32; its byte 255 is NaN."""
    return exponents.view(torch.float8_e8m0fnu).to(torch.float32)
