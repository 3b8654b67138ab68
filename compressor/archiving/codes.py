"""Whole numbers as few bytes: the low bytes of all of them, then the next ones, deflated."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Codes = NDArray[np.int64]

# In order of size.
WIDTHS = (1, 2, 4, 8)
_WHOLE = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


def width_of(codes: Codes) -> int:
    """The bytes that each of some whole numbers takes before it is deflated."""
    largest = int(max(codes.max(initial=0), ~codes.min(initial=0)))
    return next(width for width in WIDTHS if largest < 1 << (8 * width - 1))


def planes(codes: Codes, width: int) -> bytes:
    """Whole numbers by their first bytes, second bytes, and so on; small ones of either sign have small bytes."""
    folded = ((codes << 1) ^ (codes >> 63)).astype("<u8", copy=False)
    return folded.view(np.uint8).reshape(-1, 8)[:, :width].T.tobytes()


def from_planes(data: bytes | memoryview, width: int) -> Codes:
    """What `planes` was made of."""
    by_byte = np.frombuffer(data, dtype=np.uint8).reshape(width, -1)
    folded = np.zeros((by_byte.shape[1], 8), dtype=np.uint8)
    folded[:, :width] = by_byte.T
    values = folded.reshape(-1).view("<u8").astype(np.uint64, copy=False)
    return ((values >> np.uint64(1)) ^ (~(values & np.uint64(1)) + np.uint64(1))).view(np.int64)


def deflated(data: bytes) -> bytes:
    """Bytes with fewer of them where some values are more frequent than others."""
    packer = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_FILTERED)
    return packer.compress(data) + packer.flush()


def inflated(data: bytes | memoryview, size: int) -> bytes:
    """The `size` bytes that were deflated; ValueError where it is not as many."""
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        found = unpacker.decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if len(found) != size or not unpacker.eof or unpacker.unused_data:
        raise ValueError("it holds another number of bytes than it says")
    return found


def bit_patterns(tensor: Tensor) -> Codes:
    """The bits of a tensor's numbers as whole numbers, which are near each other where the numbers are."""
    flat = tensor.detach().contiguous().reshape(-1)
    width = min(8, tensor.dtype.itemsize)
    found = flat.view(torch.uint8).numpy().view(_WHOLE[width]).astype(np.int64)
    if not tensor.is_floating_point():
        return found
    # Sign and magnitude: a negative number's pattern grows with its magnitude.
    least = np.int64(-1) << np.int64(8 * width - 1)
    return np.where(found < 0, least - found - 1, found)


def from_bit_patterns(patterns: Codes, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor whose bits `bit_patterns` gave."""
    if not patterns.size:
        return torch.empty(shape, dtype=dtype)
    width = min(8, dtype.itemsize)
    found = patterns
    if dtype.is_floating_point:
        least = np.int64(-1) << np.int64(8 * width - 1)
        found = np.where(patterns < 0, least - patterns - 1, patterns)
    raw = np.ascontiguousarray(found.astype(_WHOLE[width])).view(np.uint8)
    return torch.from_numpy(raw.copy()).view(dtype).reshape(shape)


def wrapped(codes: Codes, width: int) -> Codes:
    """Whole numbers modulo 2^(8 width), as signed ones."""
    shift = np.int64(64 - 8 * width)
    return (codes << shift) >> shift
