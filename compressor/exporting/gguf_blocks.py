"""Integers and scales in the blocks of ggml: 32 inputs of a row that share a scale in float16."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK = 32


@dataclass(frozen=True)
class BlockType:
    """A type of ggml whose blocks hold a scale in float16 and signed integers of some bits."""

    name: str
    bits: int

    def packed(self, integers: NDArray[np.int16], scales: NDArray[np.float16]) -> NDArray[np.uint8]:
        """The bytes of rows of integers (`d_out x d_in`), whose scales are those of their blocks.

        The layout is that of `block_q4_0`, `block_q5_0`, and `block_q8_0` in ggml's `ggml-common.h`.
        """
        rows, columns = integers.shape
        scale = np.ascontiguousarray(scales).view(np.uint8).reshape(rows, columns // BLOCK, 2)
        blocks = integers.reshape(rows, columns // BLOCK, BLOCK)
        if self.bits == 8:
            parts = [scale, blocks.astype(np.int8).view(np.uint8)]
        else:
            shifted = (blocks + 2 ** (self.bits - 1)).astype(np.uint8)
            low, half = shifted & 0x0F, BLOCK // 2
            nibbles = low[..., :half] | low[..., half:] << 4
            fifth = [np.packbits(shifted >> 4, axis=-1, bitorder="little")] if self.bits == 5 else []
            parts = [scale, *fifth, nibbles]
        return np.concatenate(parts, axis=-1).reshape(rows, -1)


BLOCK_TYPES = (BlockType("Q4_0", 4), BlockType("Q5_0", 5), BlockType("Q8_0", 8))


def block_type_of(smallest: int, largest: int) -> BlockType | None:
    """The smallest type that holds integers in a range; None where none does."""
    for each in BLOCK_TYPES:
        if -(2 ** (each.bits - 1)) <= smallest and largest < 2 ** (each.bits - 1):
            return each
    return None
