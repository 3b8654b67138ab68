"""Symmetric matrices in half of their memory."""

from __future__ import annotations

import pytest
import torch

from compressor.measure.triangle import packed_triangle, unpacked_triangle


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 3, 8, 9])
def test_a_triangle_holds_half_the_numbers_of_a_symmetric_matrix(size: int, dtype: torch.dtype) -> None:
    half = torch.randn(size, size, dtype=dtype)
    symmetric = half + half.T
    packed = packed_triangle(symmetric, dtype)
    assert len(packed) == size * (size + 1) // 2
    assert torch.equal(unpacked_triangle(packed), symmetric)


def test_several_matrices_are_rows() -> None:
    half = torch.randn(3, 5, 5, dtype=torch.float64)
    packed = packed_triangle(half + half.mT, torch.float64)
    assert packed.shape == (3, 15)
    assert torch.equal(unpacked_triangle(packed), half + half.mT)


def test_of_a_matrix_that_is_not_quite_symmetric_one_number_of_each_pair_counts() -> None:
    matrix = torch.randn(7, 7, dtype=torch.float64)
    found = unpacked_triangle(packed_triangle(matrix, torch.float64))
    assert torch.equal(found, found.T)
    assert torch.all((found == matrix) | (found == matrix.T))
