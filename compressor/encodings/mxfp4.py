"""MXFP4, as gpt-oss stores its experts: numbers of four bits, and an exponent for 32 of them along the inputs.

`NAME_blocks` has two numbers a byte, the lower half first, in `... x outputs x groups x 16`, and `NAME_scales` a byte
for each group. They stand for the transpose, `... x inputs x outputs`. The format is that of the Open Compute Project
(OCP Microscaling Formats Specification 1.0, section 5.3).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compressor.encodings.encoded import EncodedTensor, Part, StoredTensors, powers_of_two

_GROUP = 32
# E2M1: a sign, two bits of exponent, and one of mantissa.
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Mxfp4:
    """Blocks of four-bit floats with their exponents; each matrix of several can be decoded by itself."""

    by_first_dimension: ClassVar[bool] = True

    @property
    def words(self) -> str:
        return f"MXFP4, an exponent for {_GROUP} numbers"

    def decode(self, *parts: Tensor) -> Tensor:
        blocks, exponents = parts
        values = torch.tensor((*_VALUES, *(-each for each in _VALUES)), dtype=torch.float32, device=blocks.device)
        scales = powers_of_two(exponents)
        *matrices, outputs, groups, _ = blocks.shape
        found = torch.empty(*matrices, groups * _GROUP, outputs, device=blocks.device)
        # A matrix at a time, for an index of its own takes eight bytes a number.
        flat = found.view(-1, groups * _GROUP, outputs)
        every = zip(flat, blocks.reshape(-1, outputs, groups, 16), scales.reshape(-1, outputs, groups), strict=True)
        for matrix, own, scale in every:
            numbers = torch.stack([values[(own & 15).int()], values[(own >> 4).int()]], dim=-1).flatten(-2)
            matrix.copy_((numbers * scale.unsqueeze(-1)).flatten(1).T)
        return found


def mxfp4(file: StoredTensors) -> Iterator[EncodedTensor]:
    """The tensors of MXFP4.

    Raises:
        BadInput: blocks and exponents do not fit together.
    """
    for name, stored in file.tensors.items():
        if not name.endswith("_blocks") or stored.dtype != torch.uint8:
            continue
        own, blocks = name.removesuffix("_blocks"), Part(name, stored)
        scales = file.part(f"{own}_scales")
        if scales is None:
            if file.method != "mxfp4":  # another tensor of that name
                continue
            raise file.missing(own, f"{own}_scales")
        shape = stored.shape
        fits = len(shape) >= 3 and shape[-1] == _GROUP // 2 and scales.stored.shape == shape[:-1] and min(shape) > 0
        if not fits or scales.stored.dtype != torch.uint8:
            raise file.misfit(own, blocks, scales)
        sides = (*shape[:-3], shape[-2] * _GROUP, shape[-3])
        yield EncodedTensor(own, sides, file.dtype, Mxfp4(), (blocks, scales))
