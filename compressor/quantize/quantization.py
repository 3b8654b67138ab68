"""How a matrix is quantized, what that takes in bytes, and the quantized matrix itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from compressor.io import TensorInfo
from compressor.quantize.groups import fitted_group
from compressor.quantize.packing import pack, packed_width, unpack
from compressor.quantize.settings import DEFAULTS, QuantizationSettings

Side = TypeVar("Side", int, npt.NDArray[np.int64])

_NAME = re.compile(r"([2-8])(?:g([1-9][0-9]{0,8}))?(z?)", re.ASCII)


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the scales of a weight: its own if it has 16 bits, else float16."""
    return dtype if dtype in (torch.bfloat16, torch.float16) else torch.float16


@dataclass(frozen=True)
class Quantization:
    """How a `d_out x d_in` matrix is quantized: `W = (integers - zero_points) * scales`.

    Its name has the bits, the group size, and a z for zero points: `4g128`, `3g64z`, `8`.
    """

    bits: int
    """Bits of an integer, 2 to 8."""

    group_size: int | None = None
    """How many inputs share a scale, a divisor of `d_in`; None for whole rows."""

    zero_points: bool = False
    """Whether each group has a zero point of its own; else it is the middle, `2**(bits - 1)`."""

    def __post_init__(self) -> None:
        if not (2 <= self.bits <= 8 and (self.group_size is None or self.group_size >= 1)):
            raise ValueError(f"no quantization has {self.bits} bits and groups of {self.group_size} inputs")

    @property
    def name(self) -> str:
        """Such as `4g128`, `3g64z`, `8`."""
        group = "" if self.group_size is None else f"g{self.group_size}"
        return f"{self.bits}{group}{'z' if self.zero_points else ''}"

    @classmethod
    def of(cls, name: str) -> Quantization:
        """The quantization of a name.

        Raises:
            ValueError: it is the name of none.
        """
        found = _NAME.fullmatch(name)
        if found is None:
            raise ValueError(f"{name!r} is no quantization: bits, then g and the group size, then z for zero points")
        bits, group, zero_points = found.groups()
        return cls(int(bits), int(group) if group else None, bool(zero_points))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        return {"bits": self.bits, "group_size": self.group_size, "zero_points": self.zero_points}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Quantization:
        """The quantization of these fields.

        Raises:
            ValueError: they are not those of one.
        """
        bits, group, zero_points = fields.get("bits"), fields.get("group_size"), fields.get("zero_points", False)
        if type(bits) is not int or not (group is None or type(group) is int) or type(zero_points) is not bool:
            raise ValueError(f"no quantization has {bits!r} bits, groups of {group!r}, and zero points {zero_points!r}")
        return cls(bits, group, zero_points)

    def fitted(self, d_in: int, *, settings: QuantizationSettings = DEFAULTS) -> Quantization:
        """The same for a matrix of so many inputs: of the nearest group size that divides them, else of whole rows."""
        size = fitted_group(self.group_size, d_in, smallest=settings.smallest_group, largest=settings.largest_group)
        return self if size == self.group_size else replace(self, group_size=size)

    def groups(self, d_in: Side) -> Side:
        """How many scales a row of so many inputs has; ValueError where the group size does not divide them."""
        if self.group_size is None:
            return d_in // d_in
        if np.any(d_in % self.group_size):
            raise ValueError(f"groups of {self.group_size} do not divide {d_in} inputs")
        return d_in // self.group_size

    def infos(self, shape: tuple[int, int], dtype: torch.dtype) -> list[TensorInfo]:
        """Names, shapes, and dtypes of the tensors of a quantized matrix of this shape, whose weight had this dtype."""
        d_out, d_in = shape
        groups = self.groups(d_in)
        infos = [
            TensorInfo("weight_packed", (d_out, packed_width(d_in, self.bits)), torch.int32),
            TensorInfo("weight_scale", (d_out, groups), scale_dtype(dtype)),
        ]
        if self.zero_points:
            infos.append(TensorInfo("weight_zero_point", (packed_width(d_out, self.bits), groups), torch.int32))
        return [*infos, TensorInfo("weight_shape", (2,), torch.int64)]

    def nbytes(self, shape: tuple[Side, Side]) -> Side:
        """Bytes of these tensors, for one shape or for many."""
        d_out, d_in = shape
        groups = self.groups(d_in)
        size = 4 * d_out * -(-d_in * self.bits // 32) + 2 * d_out * groups + 16
        return size + 4 * -(-d_out * self.bits // 32) * groups if self.zero_points else size


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """A `d_out x d_in` matrix as integers, scales, and zero points."""

    quantization: Quantization
    integers: Tensor
    """`d_out x d_in` in uint8, each below `2**bits`."""

    scales: Tensor
    """`d_out x groups` in a dtype of 16 bits; negative ones turn the range around."""

    zero_points: Tensor | None = None
    """`d_out x groups` in uint8; None for the middle, `2**(bits - 1)`."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.integers.shape[0], self.integers.shape[1]

    def product(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The `d_out x d_in` matrix that it stands for: exact in float32 and float64, rounded once in 16 bits."""
        exact = dtype if dtype.itemsize >= 4 else torch.float32
        grouped = self.integers.to(exact).reshape(*self.scales.shape, self.shape[1] // self.scales.shape[1])
        if self.zero_points is None:
            grouped -= 2 ** (self.quantization.bits - 1)
        else:
            grouped -= self.zero_points.to(exact).unsqueeze(2)
        grouped *= self.scales.to(exact).unsqueeze(2)
        product: Tensor = grouped.flatten(1).to(dtype)
        return product

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, in the layout `pack-quantized` of compressed-tensors."""
        bits = self.quantization.bits
        found = {"weight_packed": pack(self.integers, bits), "weight_scale": self.scales.contiguous()}
        if self.zero_points is not None:
            found["weight_zero_point"] = pack(self.zero_points.T, bits).T.contiguous()
        return {**found, "weight_shape": torch.tensor(self.shape, dtype=torch.int64)}

    @classmethod
    def of_tensors(cls, quantization: Quantization, tensors: Mapping[str, Tensor]) -> QuantizedMatrix:
        """The matrix that `tensors` stored.

        Raises:
            ValueError: the tensors are not those of a matrix that is quantized so.
        """
        shape = tuple(tensors["weight_shape"].tolist())
        scales = tensors["weight_scale"]
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"weight_shape is {shape}, not two sides")
        for info in quantization.infos((shape[0], shape[1]), scales.dtype):
            found = tensors.get(info.name)
            # Scales may have been widened.
            dtype = scales.dtype if info.name == "weight_scale" and scales.is_floating_point() else info.dtype
            if found is None or tuple(found.shape) != info.shape or found.dtype != dtype:
                what = "missing" if found is None else f"{found.dtype} of {tuple(found.shape)}"
                raise ValueError(f"{info.name} is {what}, not {dtype} of {info.shape}")
        zero_points = None
        if quantization.zero_points:
            zero_points = unpack(tensors["weight_zero_point"].T, quantization.bits, shape[0]).T.contiguous()
        integers = unpack(tensors["weight_packed"], quantization.bits, shape[1])
        return cls(quantization, integers, scales, zero_points)


def quantizations(
    shape: tuple[int, int], bits: int, *, settings: QuantizationSettings = DEFAULTS
) -> list[Quantization]:
    """What is tried at a width for a `d_out x d_in` matrix, the fewest bytes first.

    The fewer the bits, the more the scales matter beside them, so groups are smaller. Zero points lower the error less
    than as many bytes in smaller groups do: scales have signs.
    """
    names = {
        2: ("2g64", "2g32"),
        3: ("3g128", "3g64", "3g32"),
        4: ("4g128", "4g32"),
        5: ("5g128",),
        6: ("6g128",),
        7: ("7",),
        8: ("8",),
    }[bits]
    fitted = {Quantization.of(name).fitted(shape[1], settings=settings) for name in names}
    return sorted(fitted, key=lambda each: (each.nbytes(shape), each.name))
