"""Eight-bit floats with scales: of the whole tensor, of a row, or of a block.

The names are those of DeepSeek (`weight_scale_inv`, which is multiplied with like the others, in blocks of 128 x 128)
and of compressed-tensors, fbgemm and ModelOpt (`weight_scale`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.encodings.encoded import EncodedTensor, Part, StoredTensors, powers_of_two

FLOATS = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
_SCALES = ("_scale_inv", "_scale")
# Scales of a layer's inputs and outputs; its weights mean the same without them.
_BESIDE = ("input_scale", "activation_scale", "output_scale")
_BLOCK = (128, 128)


@dataclass(frozen=True)
class ScaledFloats:
    """Eight-bit floats of which each block of rows and columns has a scale; their product is formed in float32."""

    kind: str
    block: tuple[int, int]
    shape: tuple[int, ...]

    @property
    def words(self) -> str:
        rows, columns = self.shape[-2:]
        if self.block[0] >= rows and self.block[1] >= columns:
            return f"{self.kind}, a scale each"
        if self.block in ((1, columns), (rows, 1)):
            return f"{self.kind}, a scale a {'row' if self.block[0] == 1 else 'column'}"
        return f"{self.kind}, a scale for {self.block[0]} x {self.block[1]} numbers"

    def decode(self, *parts: Tensor) -> Tensor:
        values, scales = parts[0].to(torch.float32), parts[1].to(torch.float32)
        rows, columns = self.shape[-2:]
        grid = (-(-rows // self.block[0]), -(-columns // self.block[1]))
        scales = powers_of_two(parts[1]) if parts[1].dtype == torch.uint8 else scales
        scales = scales.reshape(-1, *grid)
        blocks = values.view(-1, rows, columns)
        by_row = scales.repeat_interleave(self.block[0], 1)[:, :rows] if self.block[0] > 1 else scales
        for column in range(grid[1]):
            blocks[:, :, column * self.block[1] : (column + 1) * self.block[1]] *= by_row[:, :, column : column + 1]
        return values


def scaled_floats(file: StoredTensors) -> Iterator[EncodedTensor]:
    """The tensors of eight-bit floats that have scales.

    Raises:
        BadInput: scales do not fit.
    """
    floats = {getattr(torch, name) for name in FLOATS}
    for name, stored in file.tensors.items():
        if stored.dtype not in floats or len(stored.shape) < 2:
            continue
        weight = Part(name, stored)
        scale = next((found for end in _SCALES if (found := file.part(name + end)) is not None), None)
        if scale is None:
            continue
        block = _block(stored.shape, scale.stored.shape, _said_block(file))
        if (
            block is None
            or min(stored.shape) == 0
            or not (scale.stored.dtype.is_floating_point or scale.stored.dtype == torch.uint8)
        ):
            raise file.misfit(name, weight, scale)
        kind = "FP8 " + str(stored.dtype).removeprefix("torch.float8_").upper().removesuffix("FN")
        layer = name.rpartition(".")[0]
        beside = file.parts([file.below(layer, each) for each in _BESIDE])
        decoder = ScaledFloats(kind, block, stored.shape)
        yield EncodedTensor(name, stored.shape, file.dtype, decoder, (weight, scale), beside)


def _said_block(file: StoredTensors) -> tuple[int, int]:
    """The sides of a block, as the configuration says; those of DeepSeek where it does not."""
    said = [file.said.get("weight_block_size")]
    groups = file.said.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        said.append(weights.get("block_structure") if isinstance(weights, Mapping) else None)
    for block in said:
        if isinstance(block, list) and len(block) == 2 and all(type(side) is int and side > 0 for side in block):
            return block[0], block[1]
    return _BLOCK


def _block(shape: tuple[int, ...], scales: tuple[int, ...], said: tuple[int, int]) -> tuple[int, int] | None:
    """The sides of the blocks that share a scale; None where there are not as many scales as such blocks."""
    rows, columns = shape[-2:]
    matrices = shape[:-2]
    if scales in ((), (1,), (1, 1)) and not matrices:
        return rows, columns
    if scales == (rows,) and not matrices:
        return 1, columns
    if matrices and scales in (matrices, (*matrices, 1)):
        return rows, columns
    if len(scales) != len(shape) or scales[:-2] != matrices:
        return None
    sides = [_side(*each) for each in zip((rows, columns), scales[-2:], said, strict=True)]
    return None if sides[0] is None or sides[1] is None else (sides[0], sides[1])


def _side(size: int, scales: int, said: int) -> int | None:
    if size > 0 and scales == -(-size // said):
        return said
    return size if scales == 1 else 1 if scales == size else None
