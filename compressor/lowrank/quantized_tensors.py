"""Quantized tensors in a checkpoint: which matrix `NAME_packed`, `NAME_scale` and `NAME_shape` stand for, and how.

A file says nothing but its tensors. Their shapes give the group size and, where a row has 32 numbers or more, the bits.
They are checked against each other before anything is unpacked, so that no file asks for more memory than it has bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from compressor.errors import BadInput
from compressor.io import Checkpoint, TensorInfo
from compressor.quantize import Quantization
from compressor.quantize.packing import packed_width

BITS = range(2, 9)
PARTS = ("_packed", "_scale", "_zero_point", "_shape")
_MOST_DIMENSIONS = 5
_SCALES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor that is stored quantized: its dense shape, and the ways to quantize it that its tensors allow."""

    shape: tuple[int, ...]
    quantizations: tuple[Quantization, ...]

    def bits(self, known: int | None) -> Quantization | None:
        """The one of so many bits, or the only one; None where there is none, or where it cannot be told."""
        fitting = [each for each in self.quantizations if known is None or each.bits == known]
        return fitting[0] if len(fitting) == 1 else None


def is_packed(checkpoint: Checkpoint, name: str) -> bool:
    """Whether the tensor `name` of a checkpoint, such as `fc.weight`, is stored quantized."""
    return _info(checkpoint, f"{name}_packed") is not None


def quantized_tensor(checkpoint: Checkpoint, name: str) -> QuantizedTensor:
    """What the quantized tensor `name` of a checkpoint stands for, such as `fc.weight`; it is not unpacked.

    Raises `BadInput` where its tensors do not fit together.
    """
    packed, scale, zero_points, shape = (_info(checkpoint, f"{name}{part}") for part in PARTS)
    if scale is None or shape is None or packed is None:
        lacking = "_scale" if scale is None else "_shape"
        raise _damaged(checkpoint, f"{name}{lacking} is missing")
    if _info(checkpoint, f"{name}_g_idx") is not None:
        raise BadInput(
            f"the groups of {name} are of inputs in another order, which is not supported",
            where=checkpoint.source,
            remedy="give the original",
        )
    if packed.dtype != torch.int32 or len(packed.shape) != 2 or scale.dtype not in _SCALES:
        raise _damaged(checkpoint, f"{name}_packed are no packed integers with scales")
    if shape.dtype not in (torch.int64, torch.int32) or len(shape.shape) != 1 or shape.shape[0] > _MOST_DIMENSIONS:
        raise _damaged(checkpoint, f"{name}_shape is no shape")
    dense = tuple(int(side) for side in checkpoint.read(shape.name).tolist())
    if len(dense) < 2 or min(dense) < 1:
        raise _damaged(checkpoint, f"{name}_shape is no shape")
    rows, inputs = dense[0], math.prod(dense[1:])
    groups = scale.shape[1] if len(scale.shape) == 2 else 0
    fits = rows == packed.shape[0] == scale.shape[0] and groups > 0 and inputs % groups == 0
    group_size = inputs // groups if fits and groups > 1 else None
    bits = [each for each in BITS if fits and packed_width(inputs, each) == packed.shape[1]]
    if zero_points is not None:
        of_zero_points = (zero_points.dtype, zero_points.shape)
        bits = [each for each in bits if of_zero_points == (torch.int32, (packed_width(rows, each), groups))]
    if not bits:
        raise _damaged(checkpoint, f"the tensors of {name} do not fit together")
    return QuantizedTensor(dense, tuple(Quantization(each, group_size, zero_points is not None) for each in bits))


def _info(checkpoint: Checkpoint, name: str) -> TensorInfo | None:
    return checkpoint.tensors.get(checkpoint.aliases.get(name, name))


def _damaged(checkpoint: Checkpoint, what: str) -> BadInput:
    return BadInput(what, where=checkpoint.source, remedy="compress the original checkpoint again")
