"""Matrices that a file holds in one tensor, such as those of all experts of a block, and each of them by itself."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from compressor.io.tensors import StoredTensor, TensorInMemory, TensorOnDisk


@dataclass(frozen=True)
class Stack:
    """How a tensor of the shape `(count, ...)` holds the weights, or the biases, of so many times some layers.

    The layers are called `STEM.0.MEMBER`, `STEM.1.MEMBER` and so on. A matrix is stored as `d_in x d_out` where the
    tensor is `transposed`. The outputs of several members stand one after the other, or are `interleaved`: the first of
    each member, then the second of each.

    Attributes:
        tensor: The name of the tensor.
        stem: What the names of the layers begin with.
        members: The last part of their names.
        count: How often there is each of them.
        of: Whether it holds weights or biases.
        transposed: Whether its matrices are.
        interleaved: Whether the outputs of its members are.
    """

    tensor: str
    stem: str
    members: tuple[str, ...]
    count: int
    of: Literal["weight", "bias"] = "weight"
    transposed: bool = False
    interleaved: bool = False

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape can be taken apart like that."""
        if len(shape) != (3 if self.of == "weight" else 2) or shape[0] != self.count or min(shape) < 1:
            return False
        return shape[self._outputs] % len(self.members) == 0

    @property
    def _outputs(self) -> int:
        """The dimension of the outputs."""
        return 2 if self.of == "weight" and self.transposed else 1

    def views(self, tensor: Tensor) -> dict[str, Tensor]:
        """The weights or biases in the tensor, by name: views of its memory."""
        by_output = tensor.movedim(self._outputs, 1)
        members = len(self.members)
        alternate = [by_output[:, place::members] for place in range(members)]
        parts = alternate if self.interleaved else by_output.chunk(members, dim=1)
        return {
            f"{self.stem}.{number}.{member}.{self.of}": own
            for number, each in enumerate(zip(*(part.unbind(0) for part in parts), strict=True))
            for member, own in zip(self.members, each, strict=True)
        }

    @property
    def first(self) -> str:
        """The name of the first weight or bias."""
        return f"{self.stem}.0.{self.members[0]}.{self.of}"

    def names(self) -> list[str]:
        """The names of the weights or biases."""
        numbers = range(self.count)
        return [f"{self.stem}.{number}.{member}.{self.of}" for number in numbers for member in self.members]

    def shape(self, parts: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
        """The shape of the tensor, by the shapes of its own weights or biases, and others; None if they do not fit."""
        if self.count * len(self.members) > len(parts):
            return None
        shapes = {parts.get(name) for name in self.names()}
        one = next(iter(shapes)) if len(shapes) == 1 else None
        if one is None or len(one) != (2 if self.of == "weight" else 1):
            return None
        whole = [self.count, one[0] * len(self.members), *one[1:]]
        return tuple([whole[0], *whole[:0:-1]] if self._outputs == 2 else whole)

    def parts(self, stored: StoredTensor) -> dict[str, StoredTensor]:
        """The weights or biases in a tensor that is stored, by name; reading one does not read the others.

        A part of a tensor whose values are computed is read with the whole.
        """
        if isinstance(stored, TensorInMemory):
            return {name: TensorInMemory(view) for name, view in self.views(stored.tensor).items()}
        if isinstance(stored, TensorOnDisk):
            outline = torch.empty_strided(stored.shape, stored.strides, dtype=stored.dtype, device="meta")
            return {
                name: TensorOnDisk(
                    stored.file,
                    stored.offset + int(view.storage_offset()) * stored.dtype.itemsize,
                    tuple(view.shape),
                    view.stride(),
                    stored.dtype,
                )
                for name, view in self.views(outline).items()
            }
        outline = torch.empty(stored.shape, dtype=stored.dtype, device="meta")
        each = len(self.members)
        return {
            name: _Part(stored, self, name, tuple(view.shape), view.dtype, place // each)
            for place, (name, view) in enumerate(self.views(outline).items())
        }

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads."""
        said = {"tensor": self.tensor, "stem": self.stem, "members": list(self.members), "count": self.count}
        return said | {"of": self.of, "transposed": self.transposed, "interleaved": self.interleaved}

    @classmethod
    def from_dict(cls, document: Any) -> Stack:
        """Read what `to_dict` returns; ValueError says what is wrong with the document."""
        said = document if isinstance(document, Mapping) else {}
        tensor, stem, members, count, of = (said.get(key) for key in ("tensor", "stem", "members", "count", "of"))
        flags = [said.get(key) for key in ("transposed", "interleaved")]
        named = isinstance(tensor, str) and isinstance(stem, str) and isinstance(members, list)
        if not named or not members or not all(isinstance(each, str) and each for each in members):
            raise ValueError("layers that are stored in one tensor have its name, and names of their own")
        if (
            type(count) is not int
            or count < 1
            or of not in ("weight", "bias")
            or not all(type(flag) is bool for flag in flags)
        ):
            raise ValueError(f"it does not say how {tensor} holds its layers")
        return cls(str(tensor), str(stem), tuple(members), count, of, bool(flags[0]), bool(flags[1]))


def nth(stored: StoredTensor, number: int) -> StoredTensor | None:
    """The tensor at a place of the first dimension, of one that can be read by such; else None."""
    if isinstance(stored, TensorOnDisk):
        offset = stored.offset + number * stored.strides[0] * stored.dtype.itemsize
        return TensorOnDisk(stored.file, offset, stored.shape[1:], stored.strides[1:], stored.dtype)
    if isinstance(stored, TensorInMemory):
        return TensorInMemory(stored.tensor[number])
    own: Callable[[int], StoredTensor | None] | None = getattr(stored, "nth", None)
    return None if own is None else own(number)


@dataclass(frozen=True)
class _Part:
    """A part of a tensor that is computed when it is read: of its `number`-th matrix, where that can be read alone."""

    whole: StoredTensor
    stack: Stack
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    number: int

    @property
    def region(self) -> Hashable:
        return (self.whole.region, self.name)

    def read(self) -> Tensor:
        own = nth(self.whole, self.number)
        if own is None:
            view = self.stack.views(self.whole.read())[self.name]
        else:
            alone = replace(self.stack, count=1)
            member = self.name.removeprefix(f"{self.stack.stem}.{self.number}.")
            view = alone.views(own.read()[None])[f"{self.stack.stem}.0.{member}"]
        return view.clone(memory_format=torch.contiguous_format)
