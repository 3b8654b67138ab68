"""Whole numbers and bit patterns survive being packed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from compressor.archiving.codes import (
    bit_patterns,
    deflated,
    from_bit_patterns,
    from_planes,
    inflated,
    planes,
    width_of,
    wrapped,
)

DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn),
    *(torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64),
)


@given(arrays(np.int64, st.integers(0, 20), elements=st.integers(-(2**62), 2**62)))
def test_whole_numbers_come_back(codes: np.ndarray) -> None:
    width = width_of(codes)
    assert (from_planes(planes(codes, width), width) == codes).all()


@pytest.mark.parametrize(
    ("number", "width"), [(127, 1), (-128, 1), (128, 2), (-129, 2), (2**15 - 1, 2), (2**15, 4), (2**31, 8)]
)
def test_numbers_take_as_many_bytes_as_they_need(number: int, width: int) -> None:
    codes = np.array([0, number], dtype=np.int64)
    assert width_of(codes) == width
    assert (from_planes(planes(codes, width), width) == codes).all()


@given(st.binary(max_size=200))
def test_bytes_are_inflated_to_as_many_as_were_deflated_and_to_no_others(data: bytes) -> None:
    packed = deflated(data)
    assert inflated(packed, len(data)) == data
    for wrong in (packed + b"x", packed[:-1]):
        with pytest.raises(ValueError, match=r"."):
            inflated(wrong, len(data))
    with pytest.raises(ValueError, match="another number of bytes"):
        inflated(packed, len(data) + 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_pattern_of_a_tensor_comes_back(dtype: torch.dtype) -> None:
    raw = torch.randint(0, 256, (3, 4 * dtype.itemsize), dtype=torch.uint8, generator=torch.manual_seed(0))
    tensor = (raw % 2).view(torch.bool) if dtype == torch.bool else raw.view(dtype)
    again = from_bit_patterns(bit_patterns(tensor), tuple(tensor.shape), dtype)
    assert again.dtype == dtype
    assert torch.equal(again.view(torch.uint8), tensor.view(torch.uint8))


def test_patterns_of_numbers_are_in_their_order() -> None:
    numbers = torch.tensor([-3e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 3e38])
    patterns = bit_patterns(numbers)
    assert (np.diff(patterns) > 0).all()


@pytest.mark.parametrize("width", [1, 2, 4])
def test_differences_are_the_shortest_ones_modulo_the_width(width: int) -> None:
    half = 2 ** (8 * width - 1)
    found = wrapped(np.array([half, -half - 1, half - 1, 2 * half], dtype=np.int64), width)
    assert found.tolist() == [-half, half - 1, half - 1, 0]
