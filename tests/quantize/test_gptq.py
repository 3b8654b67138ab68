"""Integers and scales in the metric cost less than those nearest."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compressor.factorize import Metric
from compressor.quantize import Quantization, QuantizationSettings, gptq, quantize_to_nearest

BFLOAT16 = torch.bfloat16


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(side: int, seed: int, rank: int | None = None) -> Tensor:
    half = random(side, side if rank is None else rank, seed=seed)
    return half @ half.T


def loss(metric: Metric, matrix: Tensor, product: Tensor) -> float:
    return metric.squared_size(matrix - product)


@pytest.mark.slow
@pytest.mark.parametrize("diagonal", ["neither", "gradients", "inputs"])
@given(
    bits=st.integers(2, 5),
    groups=st.integers(1, 3),
    size=st.integers(1, 12),
    d_out=st.integers(1, 12),
    seed=st.integers(0, 2**31),
)
def test_it_is_never_worse_than_rounding_to_nearest(
    *, diagonal: str, bits: int, groups: int, size: int, d_out: int, seed: int
) -> None:
    d_in, rank = groups * size, seed % 5
    inputs, gradients = moment(d_in, seed, rank), moment(d_out, seed + 1, rank)
    if diagonal == "inputs":
        inputs = inputs.diagonal().clone()
    if diagonal == "gradients":
        gradients = gradients.diagonal().clone()
    metric = Metric(inputs, gradients)
    matrix, quantization = random(d_out, d_in, seed=seed + 2), Quantization(bits, size)
    importance = inputs if inputs.dim() == 1 else inputs.diagonal()

    found = gptq(matrix, quantization, metric, scale_dtype=BFLOAT16, settings=QuantizationSettings(block=5, rounds=1))

    rounded = quantize_to_nearest(matrix, quantization, scale_dtype=BFLOAT16, importance=importance)
    assert loss(metric, matrix, found.product()) <= loss(metric, matrix, rounded.product())
    assert int(found.integers.max()) < 2**bits


def test_correlated_inputs_and_gradients_both_lower_the_loss() -> None:
    matrix, quantization = random(40, 64), Quantization(3, 32)
    metric = Metric(moment(64, 1, 32) + torch.eye(64), moment(40, 2, 20) + torch.eye(40))
    settings = QuantizationSettings(rounds=0, gradient_damping=0.01)

    rounded = quantize_to_nearest(matrix, quantization, scale_dtype=BFLOAT16)
    one_sided = gptq(
        matrix,
        quantization,
        Metric(metric.inputs, metric.gradients.diagonal()),
        scale_dtype=BFLOAT16,
        settings=settings,
    )
    two_sided = gptq(matrix, quantization, metric, scale_dtype=BFLOAT16, settings=settings)
    more = gptq(
        matrix, quantization, metric, scale_dtype=BFLOAT16, settings=QuantizationSettings(gradient_damping=0.01)
    )

    losses = [loss(metric, matrix, each.product()) for each in (more, two_sided, one_sided, rounded)]
    assert losses[0] < losses[1] < 0.5 * losses[2] < 0.25 * losses[3]


@pytest.mark.slow
@given(values=st.lists(st.floats(-3, 3), min_size=2, max_size=4), seed=st.integers(0, 2**31))
def test_it_comes_close_to_the_best_integers_of_tiny_rows(values: list[float], seed: int) -> None:
    matrix = torch.tensor([values], dtype=torch.float64)
    metric = Metric(moment(len(values), seed) + 0.1 * torch.eye(len(values)), torch.ones(1, 1).double())
    found = gptq(matrix, Quantization(2), metric, scale_dtype=BFLOAT16)
    scale = float(found.scales)
    best = min(
        loss(metric, matrix, scale * torch.tensor([each], dtype=torch.float64))
        for each in itertools.product(range(-2, 2), repeat=len(values))
    )
    assert loss(metric, matrix, found.product()) <= 2 * best + 0.1 * metric.squared_size(matrix)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_matrix_of_levels_is_kept_exactly(bits: int) -> None:
    half = 2 ** (bits - 1)
    levels = torch.arange(-half, half, dtype=torch.float64).repeat(3, 1) * torch.tensor([[0.5], [2.0], [-1.0]])
    metric = Metric(moment(2 * half, 1), moment(3, 2))
    assert torch.equal(gptq(levels, Quantization(bits), metric, scale_dtype=BFLOAT16).product(), levels)


def test_rows_and_powers_of_two_do_not_matter() -> None:
    matrix, order = random(7, 24), torch.tensor([3, 1, 0, 6, 2, 5, 4])
    inputs, gradients = moment(24, 1), moment(7, 2)
    quantization = Quantization(3, 8)
    found = gptq(matrix, quantization, Metric(inputs, gradients), scale_dtype=BFLOAT16)
    permuted = gptq(matrix[order], quantization, Metric(inputs, gradients[order][:, order]), scale_dtype=BFLOAT16)
    scaled = gptq(matrix * 2.0**20, quantization, Metric(inputs * 2.0**-30, gradients * 2.0**8), scale_dtype=BFLOAT16)
    assert torch.equal(permuted.product(), found.product()[order])
    assert torch.equal(scaled.product(), found.product() * 2.0**20)


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (6, 1), (3, 4)])
def test_moments_of_zero_and_matrices_of_zero(shape: tuple[int, int]) -> None:
    nothing = Metric(moment(shape[1], 1, 0), moment(shape[0], 2, 0))
    matrix = random(*shape)
    assert torch.isfinite(gptq(matrix, Quantization(4), nothing, scale_dtype=BFLOAT16).product()).all()
    zero = torch.zeros(shape)
    metric = Metric(moment(shape[1], 1), moment(shape[0], 2))
    assert not gptq(zero, Quantization(2), metric, scale_dtype=BFLOAT16).product().any()


def test_an_input_that_never_occurs_takes_no_error() -> None:
    inputs = moment(12, 1)
    inputs[3], inputs[:, 3] = 0, 0
    found = gptq(random(5, 12), Quantization(3), Metric(inputs, moment(5, 2)), scale_dtype=BFLOAT16)
    assert torch.isfinite(found.product()).all()
