"""Integers of 1 to 8 bits packed into int32, as `compressed-tensors` does it.

The numbers of a row follow each other without a gap, the lowest bit first: number i takes the bits from `i * bits` on,
and 32 of them exactly `bits` words.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_width(numbers: int, bits: int) -> int:
    """How many int32 a row of so many numbers takes."""
    return -(-numbers * bits // 32)


def pack(integers: Tensor, bits: int) -> Tensor:
    """The `rows x n` integers below `2**bits`, in uint8, as int32 of `rows x packed_width(n, bits)`."""
    rows, numbers = integers.shape
    padded = -(-numbers // 32) * 32
    blocks = torch.nn.functional.pad(integers, (0, padded - numbers)).reshape(rows, padded // 32, 32)
    # In int64 nothing runs over the edge of a word but what belongs to the next one.
    words = torch.zeros(rows, padded // 32, bits + 1, dtype=torch.int64, device=integers.device)
    for place in range(32):
        word, offset = divmod(place * bits, 32)
        shifted = blocks[:, :, place].to(torch.int64) << offset
        words[:, :, word] |= shifted & 0xFFFFFFFF
        words[:, :, word + 1] |= shifted >> 32
    packed = words[:, :, :bits].reshape(rows, padded // 32 * bits)[:, : packed_width(numbers, bits)]
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32).contiguous()


def unpack(packed: Tensor, bits: int, numbers: int) -> Tensor:
    """The first `numbers` integers of each row of what `pack` made, in uint8."""
    (rows, words_each), octets = packed.shape, -(-numbers // 8)
    # Flattened, for a column of one word may be contiguous in strides of which it has no bytes.
    octet = packed.contiguous().flatten().view(torch.uint8).view(rows, 4 * words_each)
    octet = torch.nn.functional.pad(octet, (0, 4 * bits))[:, : octets * bits]
    # Eight numbers take `bits` bytes, and here eight: halves of them are moved apart, then halves of these, twice.
    spread = torch.zeros(rows, octets, 8, dtype=torch.uint8, device=packed.device)
    spread[:, :, :bits] = octet.view(rows, octets, bits)
    words = spread.view(torch.int64).squeeze(2)
    for lane in (32, 16, 8) if bits < 8 else ():
        size = lane * bits // 8
        low = sum(((1 << size) - 1) << place for place in range(0, 64, 2 * lane))
        words = (words & low) | ((words & (low << size)) << (lane - size))
    return words.view(torch.uint8)[:, :numbers].contiguous()
