"""The common factor that is divided out before numbers are squared."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressor.measure.scale import power_of_two, power_of_two_on_device


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=4))
def test_it_is_the_largest_power_of_two_below_the_largest_number(numbers):
    values = torch.tensor(numbers, dtype=torch.float64)
    scale = power_of_two(values)
    largest = max(map(abs, numbers), default=0.0)
    assert scale == 1 if largest == 0 else scale <= largest < 2 * scale
    assert math.frexp(scale)[0] == 0.5
    assert float(power_of_two_on_device(values)) == scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [3.0, -0.7, 1e-7, 60000.0, math.inf, math.nan])
def test_numbers_of_every_dtype(number, dtype):
    values = torch.tensor([[0.0, number]], dtype=dtype)
    assert float(power_of_two_on_device(values)) == power_of_two(values)
