"""A reader of compressed files by docs/file-format.md alone: numpy, and safetensors for the container.

It imports nothing of the package, so what it computes says whether the page is enough.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import deserialize, safe_open

Array = npt.NDArray[Any]
VERSION = 4
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}


@dataclass(frozen=True)
class Compressed:
    """The tensors of a file, and what its metadata says."""

    tensors: Mapping[str, Array]
    said: Mapping[str, Any]

    @classmethod
    def of(cls, path: Path) -> Compressed:
        with safe_open(path, "np") as file:
            metadata = file.metadata()
        said = json.loads(metadata.get("compressor", '{"format_version": 1, "layers": {}}'))
        if said["format_version"] > VERSION:
            raise ValueError(f"format {said['format_version']} is not known")
        return cls({name: array(each) for name, each in deserialize(path.read_bytes())}, said)

    def changes(self) -> dict[str, Array]:
        """What the tensors of each layer stand for, in float64, by the name of its weight."""
        return {self.weight_name(name): self.change(name) for name in self.said["layers"]}

    def weight_name(self, layer: str) -> str:
        return layer if self.said["layers"][layer]["kind"] == "parameter" else f"{layer}.weight"

    def change(self, layer: str) -> Array:
        said = self.said["layers"][layer]
        kind, rank, form = said["kind"], said["rank"], said["form"].removeprefix("initial+")
        if rank == 0 and form != said["form"] and "bits" not in said:  # training wrote nothing
            return np.zeros(())
        if form != "dense":
            return self.pair(layer, form, kind=kind, bits=said.get("bits"))
        weight = self.floats(f"{layer}.weight", said["bits"])
        if rank > 0:
            of = {"convolution": "channel", "transposed convolution": "channel", "grouped convolution": "grouped"}
            own = self.pair(layer, of.get(kind, "plain"), kind=kind, bits=8)
            weight = weight + (own.T if kind == "transposed linear" else own)
        return weight.T if kind == "transposed linear" else weight

    def pair(self, layer: str, form: str, *, kind: str, bits: int | None) -> Array:
        down, up = (self.floats(f"{layer}.{factor}.weight", bits) for factor in ("down", "up"))
        if form == "pivoted":
            rows = np.concatenate([down, up @ down])[self.tensors[f"{layer}.order"]]
            return rows.T if kind == "transposed linear" else rows
        if form == "spatial":
            return np.einsum("orj,rci->ocij", up[:, :, 0], down[:, :, :, 0])
        if form == "grouped":
            groups = len(down) // up.shape[1]
            parts = zip(np.split(up, groups), np.split(down, groups), strict=True)
            return np.concatenate([np.einsum("or,rcij->ocij", u[:, :, 0, 0], d) for u, d in parts])
        if form == "channel" and kind == "transposed convolution":
            return np.einsum("cr,roij->coij", down[:, :, 0, 0], up)
        if form == "channel":
            return np.einsum("or,rcij->ocij", up[:, :, 0, 0], down)
        if form != "plain":
            raise ValueError(f"form {form} is not known")
        if kind == "embedding":
            return down @ up.T
        return (up @ down).T if kind == "transposed linear" else up @ down

    def floats(self, name: str, bits: int | None = None) -> Array:
        """A tensor in float64, from integers and scales where it is quantized."""
        if f"{name}_packed" not in self.tensors:
            return self.tensors[name].astype(np.float64)
        assert bits is not None
        shape = self.tensors[f"{name}_shape"]
        rows, columns = int(shape[0]), math.prod(shape[1:].tolist())
        integers = unpacked(self.tensors[f"{name}_packed"], bits, columns)
        scales = self.tensors[f"{name}_scale"].astype(np.float64)
        zeros = np.full(scales.shape, 2 ** (bits - 1))
        if f"{name}_zero_point" in self.tensors:
            zeros = unpacked(np.ascontiguousarray(self.tensors[f"{name}_zero_point"].T), bits, rows).T
        each = columns // scales.shape[1]
        numbers = (integers - np.repeat(zeros, each, axis=1)) * np.repeat(scales, each, axis=1)
        return numbers.reshape(shape)

    @cached_property
    def initial(self) -> dict[str, Array]:
        """The initial weights of layers, drawn again and compared with their fingerprints."""
        said = self.said["initial"]
        drawn = replayed(said["draws"])
        found = {}
        for layer, of in said["tensors"].items():
            found[layer] = drawn[of.get("name", f"{layer}.weight")].astype(np.float64)
            norm, *values = of["fingerprint"]
            flat = found[layer].ravel()
            places = [flat.size * each // len(values) for each in range(len(values))]
            size = norm / math.sqrt(flat.size)
            assert math.isclose(np.linalg.norm(flat), norm, rel_tol=1e-5)
            for place, value in zip(places, values, strict=True):
                assert abs(flat[place] - value) <= 1e-5 * max(size, abs(value))
        return found

    def from_initial(self) -> dict[str, Array]:
        """The weights of layers in forms of what training wrote."""
        layers = {name: each for name, each in self.said["layers"].items() if each["form"].startswith("initial+")}
        return {
            self.weight_name(name): each["share"] * self.initial[name] + self.change(name)
            for name, each in layers.items()
        }


def array(said: Mapping[str, Any]) -> Array:
    """A tensor as safetensors gives it: bytes, a dtype, and a shape."""
    found = np.frombuffer(said["data"], DTYPES[said["dtype"]]).reshape(said["shape"])
    return (found.astype("<u4") << 16).view("<f4") if said["dtype"] == "BF16" else found


def unpacked(packed: Array, bits: int, numbers: int) -> Array:
    """The integers of each row: number i is the bits from `i * bits` on, the lowest first."""
    octets = np.ascontiguousarray(packed).astype("<i4").view(np.uint8).reshape(len(packed), -1)
    each_bit = np.unpackbits(octets, axis=1, bitorder="little")[:, : numbers * bits]
    values: Array = each_bit.reshape(len(packed), numbers, bits).astype(np.int64) @ (1 << np.arange(bits))
    return values


def replayed(draws: Mapping[str, Any]) -> dict[str, Array]:
    """The initial tensors of a record of draws, in float32."""
    assert draws["format"] == 1
    sizes = [size for size, dtype in repeated(draws["registers"], "registers") if dtype == "float32"]
    memory = [np.zeros(size, np.float32) for size in sizes]
    outputs = np.random.RandomState(draws["seed"] % 2**32)

    def drawn(count: int) -> Array:
        return (outputs.randint(0, 2**32, count, np.uint32) % 2**24).astype(np.float64) / 2**24

    for operation, target, *rest in repeated(draws["steps"], "steps"):
        own = region([target, [len(memory[target])]] if isinstance(target, int) else target, memory)
        if operation == "copy_":
            own[...] = region(rest[0], memory)
        elif operation == "uniform_":
            low, high = (*rest, 0, 1)[:2] if rest else (0, 1)
            own[...] = (drawn(own.size) * (high - low) + low).reshape(own.shape)
        elif operation == "normal_":
            mean, deviation = rest or (0, 1)
            own[...] = normal(own.size, drawn).reshape(own.shape) * deviation + mean
        else:
            OTHERS[operation](own, *rest)
    return {name: region(each, memory) for name, each in draws["tensors"].items()}


def normal(size: int, drawn: Callable[[int], Array]) -> Array:
    assert size >= 16
    uniform = drawn(size)
    whole = size - size % 16
    found = np.concatenate([sixteen(uniform[at : at + 16]) for at in range(0, whole, 16)] + [np.zeros(size % 16)])
    if size % 16:
        found[-16:] = sixteen(drawn(16))
    return found


def sixteen(uniform: Array) -> Array:
    radius, angle = np.sqrt(-2 * np.log(1 - uniform[:8])), 2 * np.pi * uniform[8:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])


def region(said: list[Any], memory: list[Array]) -> Array:
    """A view of a register's numbers."""
    register, shape, *rest = said
    strides, offset = rest or ([math.prod(shape[place + 1 :]) for place in range(len(shape))], 0)
    own = memory[register][offset:]
    return np.lib.stride_tricks.as_strided(own, shape, [4 * each for each in strides])


def repeated(document: list[Any], key: str) -> list[Any]:
    """A list with what repeats written out."""
    found = []
    for each in document:
        if not isinstance(each, dict):
            found.append(each)
            continue
        for time in range(each["times"]):
            strides = each.get("strides", [[]] * len(each[key]))
            found += [moved(own, [time * by for by in stride]) for own, stride in zip(each[key], strides, strict=True)]
    return found


def moved(step: list[Any], by: list[int]) -> list[Any]:
    """A step on registers whose numbers are larger."""
    if not by:
        return step
    operation, target, *rest = step
    target = target + by[0] if isinstance(target, int) else [target[0] + by[0], *target[1:]]
    if len(by) > 1:
        rest = [[rest[0][0] + by[1], *rest[0][1:]]]
    return [operation, target, *rest]


OTHERS: dict[str, Callable[..., Any]] = {
    "fill_": lambda own, value: own.fill(value),
    "zero_": lambda own: own.fill(0),
    "mul_": lambda own, by: np.multiply(own, np.float32(by), out=own),
    "add_": lambda own, by: np.add(own, np.float32(by), out=own),
}
