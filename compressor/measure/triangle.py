"""The lower triangle of a symmetric matrix, in half of its memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def packed_triangle(symmetric: Tensor, dtype: torch.dtype) -> Tensor:
    """The `n (n + 1) / 2` numbers of the lower triangle of a symmetric `n x n` matrix; of several a row each.

    Rectangular full packed format (Gustavson et al., "Rectangular full packed format for Cholesky's algorithm", ACM
    TOMS 2010): two triangles of half the size side by side, then the square that is left, all by slices.
    """
    if symmetric.dim() == 3:
        return torch.stack([packed_triangle(each, dtype) for each in symmetric])
    half = len(symmetric) // 2
    rest = len(symmetric) - half
    narrow = symmetric.to(dtype)
    triangles = narrow.new_zeros(half + 1, rest)
    triangles[:rest] += narrow[half:, half:].triu()
    triangles[1:, :half] += narrow[:half, :half].tril()
    return torch.cat([triangles.flatten(), narrow[half:, :half].flatten()])


def unpacked_triangle(packed: Tensor) -> Tensor:
    """The symmetric matrix of `packed_triangle`, or several."""
    if packed.dim() == 2:
        return torch.stack([unpacked_triangle(each) for each in packed])
    size = (math.isqrt(8 * len(packed) + 1) - 1) // 2
    half = size // 2
    rest = size - half
    triangles = packed[: (half + 1) * rest].view(half + 1, rest)
    below = packed[(half + 1) * rest :].view(rest, half)
    lower, upper = triangles[1:, :half].tril(), triangles[:rest].triu()
    matrix = packed.new_empty(size, size)
    matrix[:half, :half] = lower + lower.tril(-1).T
    matrix[half:, half:] = upper + upper.triu(1).T
    matrix[half:, :half], matrix[:half, half:] = below, below.T
    return matrix
