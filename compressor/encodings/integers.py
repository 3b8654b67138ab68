"""Matrices of integers with scales, as GPTQ, AWQ and compressed-tensors store them.

Each gives `scale * (integer - zero point)`, with a scale and a zero point for each output and group of inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.encodings.encoded import EncodedTensor, Part, StoredTensors
from compressor.errors import BadInput
from compressor.quantize.packing import packed_width, unpack

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_INDICES = (torch.int32, torch.int64)
_GPTQ_BITS = (2, 3, 4, 8)
_AWQ_BITS = 4
# Where AWQ has the eight columns of a word, from the lowest bits on.
_AWQ_COLUMNS = (0, 4, 1, 5, 2, 6, 3, 7)
_CT_BITS = range(2, 9)
_CT_BESIDE = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")


def _by_position(inputs: int, group_size: int, device: torch.device) -> Tensor:
    return torch.arange(inputs, device=device) // group_size


def _product(numbers: Tensor, scales: Tensor, zeros: Tensor | None, *, group: Tensor) -> Tensor:
    """`scales * (numbers - zeros)`, where scales and zeros are `d_out x groups` and `group` is that of each input."""
    if bool((group < 0).any()) or int(group.max()) >= scales.shape[1]:
        raise BadInput("its inputs are in groups that have no scales", remedy="give the original")
    values = numbers.to(torch.float32)
    if zeros is not None:
        values -= zeros.to(torch.float32)[:, group]
    return values.mul_(scales.to(torch.float32)[:, group])


@dataclass(frozen=True)
class GptqIntegers:
    """`qweight` and `qzeros`, packed along the inputs and the outputs; the first version stores a zero point less 1."""

    bits: int
    inputs: int
    group_size: int
    less_one: bool
    ordered: bool

    @property
    def words(self) -> str:
        groups = "" if self.group_size >= self.inputs else f", groups of {self.group_size}"
        return f"GPTQ, {self.bits} bits{groups}"

    def decode(self, *parts: Tensor) -> Tensor:
        weight, zeros, scales = parts[:3]
        numbers = unpack(weight.T.contiguous(), self.bits, self.inputs)
        points = unpack(zeros, self.bits, scales.shape[1]).to(torch.int16).T
        if self.less_one:
            points = (points + 1) & (2**self.bits - 1)
        group = parts[3].to(torch.int64) if self.ordered else _by_position(self.inputs, self.group_size, weight.device)
        return _product(numbers, scales.T, points, group=group)


@dataclass(frozen=True)
class AwqIntegers:
    """`qweight` and `qzeros` of four bits, packed along the outputs, eight columns of a word in an order of AWQ."""

    group_size: int
    inputs: int

    @property
    def words(self) -> str:
        groups = "" if self.group_size >= self.inputs else f", groups of {self.group_size}"
        return f"AWQ, {_AWQ_BITS} bits{groups}"

    def decode(self, *parts: Tensor) -> Tensor:
        weight, zeros, scales = parts
        outputs = scales.shape[1]
        numbers, points = (
            unpack(each, _AWQ_BITS, outputs).view(len(each), -1, 8)[:, :, list(_AWQ_COLUMNS)].flatten(1).T
            for each in (weight, zeros)
        )
        return _product(numbers, scales.T, points, group=_by_position(self.inputs, self.group_size, weight.device))


@dataclass(frozen=True)
class PackedIntegers:
    """`weight_packed` of compressed-tensors: integers around 0 that are packed along the inputs."""

    bits: int
    shape: tuple[int, int]
    group_size: int
    zero_points: bool
    ordered: bool

    @property
    def words(self) -> str:
        groups = "" if self.group_size >= self.shape[1] else f", groups of {self.group_size}"
        return f"compressed-tensors, {self.bits} bits{groups}"

    def decode(self, *parts: Tensor) -> Tensor:
        rows, inputs = self.shape
        middle = 2 ** (self.bits - 1)
        numbers = unpack(parts[0], self.bits, inputs)
        scales = parts[1].reshape(-1, parts[1].shape[-1]).expand(rows, -1)
        zeros = torch.full((1, 1), middle, dtype=torch.int16, device=numbers.device).expand(scales.shape)
        if self.zero_points:
            zeros = unpack(parts[2].T.contiguous(), self.bits, rows).T
        group = _by_position(inputs, self.group_size, numbers.device)
        # Where no order was set all are -1, and inputs are in theirs.
        if self.ordered and not bool((parts[-1] < 0).all()):
            group = parts[-1].to(torch.int64)
        return _product(numbers, scales, zeros, group=group)


@dataclass(frozen=True)
class ByteIntegers:
    """An int8 `weight` of compressed-tensors."""

    shape: tuple[int, int]
    groups: int
    zero_points: bool

    @property
    def words(self) -> str:
        return "compressed-tensors, an int8 each"

    def decode(self, *parts: Tensor) -> Tensor:
        rows, inputs = self.shape
        scales, *zeros = (each.reshape(-1, self.groups).expand(rows, -1) for each in parts[1:])
        group = _by_position(inputs, inputs // self.groups, scales.device)
        return _product(parts[0], scales, zeros[0] if zeros else None, group=group)


@dataclass(frozen=True)
class PlainFloats:
    """A dense `weight` beside which there are scales that nothing was divided by yet."""

    @property
    def words(self) -> str:
        return "as it is"

    def decode(self, *parts: Tensor) -> Tensor:
        return parts[0]


def gptq_and_awq(file: StoredTensors) -> Iterator[EncodedTensor]:
    """The layers of GPTQ and AWQ: `qweight`, `qzeros` and `scales`.

    Raises:
        BadInput: they do not fit together, or the configuration does not say whose they are.
    """
    for name in file.tensors:
        layer, _, last = name.rpartition(".")
        if last != "qweight":
            continue
        weight = file.below(layer, "weight")
        packed, zeros, scales, order = (
            file.part(file.below(layer, each)) for each in ("qweight", "qzeros", "scales", "g_idx")
        )
        assert packed is not None
        for part, missing in ((zeros, "qzeros"), (scales, "scales")):
            if part is None:
                raise file.missing(weight, file.below(layer, missing))
        assert zeros is not None
        assert scales is not None
        _require_packed(file, weight, (packed, zeros, scales))
        if file.method == "gptq":
            yield _of_gptq(file, weight, (packed, zeros, scales), order=order)
        elif file.method == "awq":
            yield _of_awq(file, weight, (packed, zeros, scales))
        elif not file.method:
            raise file.missing(weight, "the `quantization_config` of config.json")


def _require_packed(file: StoredTensors, weight: str, parts: tuple[Part, Part, Part]) -> None:
    packed, zeros, scales = parts
    of_integers = packed.stored.dtype == zeros.stored.dtype == torch.int32
    sides = [len(each.stored.shape) == 2 and min(each.stored.shape) > 0 for each in (packed, zeros, scales)]
    if not of_integers or scales.stored.dtype not in _FLOATS or not all(sides):
        raise file.misfit(weight, packed, zeros, scales)
    if zeros.stored.shape[0] != scales.stored.shape[0]:
        raise file.misfit(weight, zeros, scales)


def _of_gptq(file: StoredTensors, name: str, parts: tuple[Part, Part, Part], *, order: Part | None) -> EncodedTensor:
    packed, zeros, scales = parts
    version = file.said.get("checkpoint_format", "gptq")
    if version not in ("gptq", "gptq_v2"):
        what = f"is stored in the format {str(version)[:40]!r} of GPTQ"
        raise BadInput(what, where=file.where, remedy="give it in the format 'gptq' or 'gptq_v2', or the original")
    groups, outputs = scales.stored.shape
    fitting = [each for each in _GPTQ_BITS if outputs * each == 32 * zeros.stored.shape[1]]
    bits = fitting[0] if fitting else 0
    inputs = packed.stored.shape[0] * 32 // bits if bits else 0
    size = _group_size(file, inputs, groups)
    ordered = order is not None and order.stored.dtype in _INDICES
    fits = packed.stored.shape[1] == outputs and inputs * bits == 32 * packed.stored.shape[0]
    if not fits or not bits or size is None or (order is not None and order.stored.shape != (inputs,)):
        raise file.misfit(name, *parts, *([] if order is None else [order]))
    decoder = GptqIntegers(bits, inputs, size, version == "gptq", ordered)
    stored = (*parts, order) if order is not None and ordered else parts
    return EncodedTensor(name, (outputs, inputs), file.dtype, decoder, stored, _rest(order, ordered=ordered))


def _rest(order: Part | None, *, ordered: bool) -> tuple[Part, ...]:
    return () if order is None or ordered else (order,)


def _of_awq(file: StoredTensors, name: str, parts: tuple[Part, Part, Part]) -> EncodedTensor:
    packed, zeros, scales = parts
    version = file.said.get("version", "gemm")
    if str(version).lower() != "gemm":
        what = f"is stored in the version {str(version)[:40]!r} of AWQ"
        raise BadInput(what, where=file.where, remedy="give it in the version 'gemm', or the original")
    inputs, (groups, outputs) = packed.stored.shape[0], scales.stored.shape
    size = _group_size(file, inputs, groups)
    words = packed.stored.shape[1]
    if words != zeros.stored.shape[1] or words * 8 != outputs or size is None or inputs % size:
        raise file.misfit(name, *parts)
    return EncodedTensor(name, (outputs, inputs), file.dtype, AwqIntegers(size, inputs), parts)


def _group_size(file: StoredTensors, inputs: int, groups: int) -> int | None:
    """How many inputs share a scale; None where there are not as many scales as such groups."""
    said = file.said.get("group_size")
    size = said if type(said) is int and said > 0 else inputs
    if inputs and -(-inputs // size) != groups:
        size = inputs // groups if inputs % groups == 0 else 0
    return size if size and -(-inputs // size) == groups else None


def compressed_tensors(file: StoredTensors) -> Iterator[EncodedTensor]:
    """The layers of integers that compressed-tensors stores: `weight_packed`, or an int8 `weight` beside its scales.

    Raises:
        BadInput: they do not fit together.
    """
    if file.method != "compressed-tensors":
        return
    for name, stored in file.tensors.items():
        if name.endswith("weight_packed"):
            yield _packed(file, Part(name, stored))
        elif (name == "weight" or name.endswith(".weight")) and len(stored.shape) == 2:
            scale = file.part(f"{name}_scale")
            if scale is not None and stored.dtype == torch.int8:
                yield _bytes(file, Part(name, stored), scale)
            elif scale is not None and stored.dtype in _FLOATS:
                beside = file.parts([*_beside(name), f"{name}_scale", f"{name}_zero_point", f"{name}_g_idx"])
                yield EncodedTensor(name, stored.shape, stored.dtype, PlainFloats(), (Part(name, stored),), beside)


def _beside(weight: str) -> list[str]:
    return [f"{weight.removesuffix('weight')}{each}" for each in _CT_BESIDE]


def _bytes(file: StoredTensors, weight: Part, scale: Part) -> EncodedTensor:
    rows, inputs = weight.stored.shape
    shape = scale.stored.shape
    of_rows = len(shape) == 2 and shape[0] == rows and shape[1] > 0 and inputs % shape[1] == 0
    zeros = file.part(f"{weight.name}_zero_point")
    fits = scale.stored.dtype.is_floating_point and (shape in ((), (1,), (1, 1), (rows,)) or of_rows)
    if not fits or (zeros is not None and zeros.stored.shape != shape):
        raise file.misfit(weight.name, weight, scale)
    decoder = ByteIntegers((rows, inputs), shape[1] if of_rows else 1, zeros is not None)
    parts = (weight, scale) if zeros is None else (weight, scale, zeros)
    beside = file.parts(_beside(weight.name))
    return EncodedTensor(weight.name, (rows, inputs), file.dtype, decoder, parts, beside)


def _packed(file: StoredTensors, packed: Part) -> EncodedTensor:
    name = packed.name.removesuffix("_packed")
    scale, shape, zeros, order = (file.part(f"{name}{end}") for end in ("_scale", "_shape", "_zero_point", "_g_idx"))
    for part, missing in ((scale, "_scale"), (shape, "_shape")):
        if part is None:
            raise file.missing(name, name + missing)
    assert scale is not None
    assert shape is not None
    sides = _sides(shape)
    there = [each for each in (packed, scale, zeros, order) if each is not None]
    if packed.stored.dtype != torch.int32 or scale.stored.dtype not in _FLOATS or sides is None:
        raise file.misfit(name, *there)
    rows, inputs = sides
    scales = scale.stored.shape
    if len(scales) == 1:
        scales = (scales[0], 1)
    groups = scales[1] if len(scales) == 2 and scales[0] in (1, rows) else 0
    size = _group_size_of(groups, inputs)
    bits = [
        each
        for each in _CT_BITS
        if packed.stored.shape == (rows, packed_width(inputs, each))
        and (zeros is None or zeros.stored.shape == (packed_width(rows, each), groups))
    ]
    said = _said_bits(file)
    bits = [each for each in bits if each in said] if len(bits) > 1 else bits
    ordered = order is not None and order.stored.shape == (inputs,) and order.stored.dtype in _INDICES
    packed_zeros = zeros is None or zeros.stored.dtype == torch.int32
    if len(bits) != 1 or size is None or not packed_zeros or (order is not None and not ordered):
        raise file.misfit(name, *there)
    decoder = PackedIntegers(bits[0], sides, size, zeros is not None, ordered)
    parts = tuple(each for each in (packed, scale, zeros, order) if each is not None)
    return EncodedTensor(name, sides, file.dtype, decoder, parts, (shape, *file.parts(_beside(name))))


def _sides(shape: Part) -> tuple[int, int] | None:
    """The sides of a packed matrix, which are themselves stored; None where they are none."""
    if shape.stored.shape != (2,) or shape.stored.dtype not in _INDICES:
        return None
    rows, inputs = (int(side) for side in shape.stored.read().tolist())
    return (rows, inputs) if 0 < rows < 2**31 and 0 < inputs < 2**31 else None


def _group_size_of(groups: int, inputs: int) -> int | None:
    return inputs // groups if groups > 0 and inputs % groups == 0 else None


def _said_bits(file: StoredTensors) -> set[int]:
    """The widths that the configuration names."""
    groups = file.said.get("config_groups")
    weights = [group.get("weights") for group in groups.values()] if isinstance(groups, dict) else []
    return {each["num_bits"] for each in weights if isinstance(each, dict) and type(each.get("num_bits")) is int}
