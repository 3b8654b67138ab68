"""Rounding to nearest finds scales of small error, and the exact matrix where it can be had."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compressor.quantize import Quantization, QuantizationSettings, quantize_to_nearest

BFLOAT16 = torch.bfloat16


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spanning_error(matrix: Tensor, bits: int) -> float:
    """The squared error of whole rows whose scale, in bfloat16, maps the largest weight to the largest integer."""
    largest = 2 ** (bits - 1) - 1
    scales = (matrix.abs().amax(1, keepdim=True) / largest).to(BFLOAT16).double()
    integers = (matrix / scales).round().clamp(-largest - 1, largest)
    return float((integers * scales - matrix).square().sum())


@pytest.mark.slow
@given(
    bits=st.integers(2, 8),
    d_out=st.integers(1, 6),
    d_in=st.integers(1, 40),
    zero_points=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_searched_scales_are_no_worse_than_spanning_ones(
    *, bits: int, d_out: int, d_in: int, zero_points: bool, seed: int
) -> None:
    matrix = random(d_out, d_in, seed=seed)
    found = quantize_to_nearest(matrix, Quantization(bits, None, zero_points), scale_dtype=BFLOAT16)
    error = float((found.product() - matrix).square().sum())
    if zero_points:
        low, high = matrix.amin(1).clamp_max(0), matrix.amax(1).clamp_min(0)
        # Half a step, and a whole one at the ends, where rounding the zero point moves the range.
        steps = (high - low) / (2**bits - 1)
        assert error <= float((steps.square() * d_in).sum()) * 1.1
    else:
        assert error <= spanning_error(matrix, bits) * (1 + 1e-5)


@pytest.mark.parametrize("scale", [0.03125, -0.03125])
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_matrix_of_levels_is_kept_exactly(bits: int, scale: float) -> None:
    half = 2 ** (bits - 1)
    levels = torch.arange(-half, half, dtype=torch.float64).repeat(2, 1) * scale
    assert torch.equal(quantize_to_nearest(levels, Quantization(bits), scale_dtype=BFLOAT16).product(), levels)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_range_that_lies_on_one_side_is_kept_exactly_with_zero_points(bits: int) -> None:
    levels = torch.arange(2**bits, dtype=torch.float64).repeat(3, 1) * torch.tensor([[0.5], [-0.25], [2.0]]).double()
    quantization = Quantization(bits, None, zero_points=True)
    assert torch.equal(quantize_to_nearest(levels, quantization, scale_dtype=BFLOAT16).product(), levels)


@pytest.mark.slow
@given(values=st.lists(st.integers(-64, 64), min_size=1, max_size=4), bits=st.integers(2, 3))
def test_no_scale_of_many_is_much_better(values: list[int], bits: int) -> None:
    matrix = torch.tensor([values], dtype=torch.float64)
    settings = QuantizationSettings(scale_step=0.01)
    found = quantize_to_nearest(matrix, Quantization(bits), scale_dtype=BFLOAT16, settings=settings)
    half = 2 ** (bits - 1)
    tried = torch.linspace(-64, 64, 4096, dtype=torch.float64)[:, None]
    integers = (matrix / tried).round().clamp(-half, half - 1)
    best = float((integers * tried - matrix).square().sum(1).min())
    # Scales in bfloat16 are off by one part in 512.
    assert float((found.product() - matrix).square().sum()) <= 1.1 * best + 2e-4 * float(matrix.square().sum())


def test_important_inputs_are_rounded_better() -> None:
    matrix = random(8, 32)
    importance = torch.where(torch.arange(32) < 4, 100.0, 1.0)
    errors = [
        (quantize_to_nearest(matrix, Quantization(3), scale_dtype=BFLOAT16, importance=each).product() - matrix)
        .square()
        .matmul(importance.double())
        .sum()
        for each in (importance, None)
    ]
    assert errors[0] < errors[1]


def test_rows_and_powers_of_two_do_not_matter() -> None:
    matrix, order = random(7, 24), torch.tensor([3, 1, 0, 6, 2, 5, 4])
    quantization = Quantization(4, 8)
    found = quantize_to_nearest(matrix, quantization, scale_dtype=BFLOAT16)
    permuted = quantize_to_nearest(matrix[order], quantization, scale_dtype=BFLOAT16)
    scaled = quantize_to_nearest(matrix * 2.0**-20, quantization, scale_dtype=BFLOAT16)
    turned = quantize_to_nearest(-matrix, quantization, scale_dtype=BFLOAT16)
    assert torch.equal(permuted.product(), found.product()[order])
    assert torch.equal(scaled.product(), found.product() * 2.0**-20)
    assert torch.equal(turned.product(), -found.product())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-38, -1e-12, 3e4, -1e30])
@pytest.mark.parametrize("zero_points", [False, True])
def test_extremes_stay_finite_and_of_their_sign(value: float, dtype: torch.dtype, zero_points: bool) -> None:
    matrix = torch.tensor([[value, 0.0, value]], dtype=torch.float64)
    found = quantize_to_nearest(matrix, Quantization(4, None, zero_points), scale_dtype=dtype)
    product = found.product()
    assert torch.isfinite(found.scales).all()
    assert (found.scales != 0).all()
    assert (product * matrix >= 0).all()
    assert product[0, 1] == 0
    assert (product - matrix).abs().max() <= abs(value)
    if value == 3e4:
        assert torch.allclose(product, matrix, rtol=2**-8)


def test_all_levels_are_reached() -> None:
    for bits, zero_points in itertools.product((2, 4, 8), (False, True)):
        found = quantize_to_nearest(random(4, 512), Quantization(bits, None, zero_points), scale_dtype=BFLOAT16)
        assert int(found.integers.min()) >= 0
        assert int(found.integers.max()) == 2**bits - 1 or int(found.integers.min()) == 0
        assert len(found.integers.unique()) > 2 ** (bits - 1)
