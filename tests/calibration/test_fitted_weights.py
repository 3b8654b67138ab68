"""Quantized weights that gradient descent fits: what they compute is what is stored of them, before and after."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.calibration.fitted_weights import FittedWeight
from compressor.quantize import Quantization, QuantizedMatrix, quantize_to_nearest

QUANTIZATIONS = [Quantization(8), Quantization(4, 32), Quantization(3, 16, zero_points=True)]


def stored(quantization: Quantization) -> QuantizedMatrix:
    matrix = torch.randn(6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return quantize_to_nearest(matrix, quantization, scale_dtype=torch.bfloat16)


def same(one: QuantizedMatrix, other: QuantizedMatrix) -> bool:
    alike = zip(one.tensors().values(), other.tensors().values(), strict=True)
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in alike)


def fitted(matrix: QuantizedMatrix, *, rounding: bool = True) -> FittedWeight:
    return FittedWeight(matrix, rounding=rounding, dtype=torch.float32)


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=lambda each: each.name)
@pytest.mark.parametrize("rounding", [False, True])
def test_it_begins_as_what_is_stored(quantization: Quantization, rounding: bool) -> None:
    matrix = stored(quantization)
    found = fitted(matrix, rounding=rounding)
    assert torch.equal(found(), matrix.product(torch.float32))
    assert same(found.quantized(), matrix)


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=lambda each: each.name)
def test_what_is_stored_of_it_is_what_it_computes_wherever_it_was_moved(quantization: Quantization) -> None:
    found = fitted(stored(quantization))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for each in found.parameters():
            each.add_(torch.randn(each.shape, generator=generator) * each.abs().mean().clamp_min(0.4))
    assert not same(found.quantized(), stored(quantization))
    assert torch.equal(found(), found.quantized().product(torch.float32))


@pytest.mark.parametrize("quantization", QUANTIZATIONS, ids=lambda each: each.name)
def test_gradients_reach_all_of_it_as_if_nothing_were_rounded(quantization: Quantization) -> None:
    found = fitted(stored(quantization))
    wanted = torch.randn(6, 32, generator=torch.Generator().manual_seed(2))
    (found() * wanted).sum().backward()
    numbers = found.integers.float().unflatten(1, (found.scales.shape[1], -1))
    zeros = torch.full_like(found.scales, 2.0 ** (quantization.bits - 1))
    zeros = zeros if found.zero_points is None else found.zero_points.detach()
    by_group = wanted.unflatten(1, (found.scales.shape[1], -1))

    def close(parameter: Tensor | None, gradient: Tensor) -> None:
        assert parameter is not None
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient)

    close(found.scales, ((numbers - zeros.unsqueeze(2)) * by_group).sum(2))
    close(found.offsets, (found.scales.detach().unsqueeze(2) * by_group).flatten(1))
    if found.zero_points is not None:
        close(found.zero_points, -(found.scales.detach().unsqueeze(2) * by_group).sum(2))


def test_an_offset_across_the_half_is_the_next_integer_and_none_is_further() -> None:
    matrix = stored(Quantization(4, 32))
    found = fitted(matrix)
    assert found.offsets is not None
    for offset, change in ((0.4, 0), (0.6, 1), (5.0, 1), (-0.6, -1), (-5.0, -1)):
        with torch.no_grad():
            found.offsets.fill_(offset)
        moved = (matrix.integers.int() + change).clamp(0, 15)
        assert torch.equal(found.quantized().integers.int(), moved)
