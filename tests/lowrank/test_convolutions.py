"""Channel pairs of full rank are the convolution, whatever its geometry; and the moments know the transposed ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compressor import compress
from compressor.forms import LowRankConvolution, LowRankTransposedConvolution
from compressor.measure.moments import _output_vectors, input_vectors
from compressor.planning import Budget, LayerPlan, Plan

CONVOLUTIONS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED: tuple[Any, ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def channel_plan(rank: int) -> Plan:
    return Plan("", None, Budget("plan"), (LayerPlan("", (0, 0), "", rank, "channel", 0, 0.0, ""),))


def numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@st.composite
def convolutions(draw: st.DrawFn) -> nn.Module:
    sides = draw(st.integers(1, 3))
    small = st.tuples(*[st.integers(1, 3)] * sides)
    padding: Any = draw(st.sampled_from(["same", "valid", "number", "numbers"]))
    stride = (1,) * sides if padding == "same" else draw(small)
    if padding == "number":
        padding = draw(st.integers(0, 3))
    elif padding == "numbers":
        padding = draw(st.tuples(*[st.integers(0, 3)] * sides))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    return CONVOLUTIONS[sides - 1](
        draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(small), stride=stride, padding=padding,
        dilation=draw(st.tuples(*[st.integers(1, 2)] * sides)), padding_mode=mode, bias=draw(st.booleans()),
        dtype=torch.float64,
    )  # fmt: skip


@st.composite
def transposed_convolutions(draw: st.DrawFn) -> nn.Module:
    sides = draw(st.integers(1, 3))
    small = st.tuples(*[st.integers(1, 3)] * sides)
    kernel, stride, dilation = draw(small), draw(small), draw(st.tuples(*[st.integers(1, 2)] * sides))
    padding, more = draw(st.tuples(*[st.integers(0, 2)] * sides)), draw(st.tuples(*[st.integers(0, 2)] * sides))
    output_padding = tuple(min(a, max(b, c) - 1) for a, b, c in zip(more, stride, dilation, strict=True))
    return TRANSPOSED[sides - 1](
        draw(st.integers(1, 4)), draw(st.integers(1, 4)), kernel, stride=stride, padding=padding,
        output_padding=output_padding, dilation=dilation, bias=draw(st.booleans()), dtype=torch.float64,
    )  # fmt: skip


def inputs_of(layer: Any, *, batched: bool, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    sides = (6, 7, 8)[: len(layer.kernel_size)]
    return torch.randn(*([2] if batched else []), layer.in_channels, *sides, dtype=torch.float64)


@settings(max_examples=40)
@given(convolutions(), st.booleans(), st.integers(0, 2**31))
def test_a_channel_pair_of_full_rank_is_the_convolution(dense: Any, batched: bool, seed: int) -> None:
    x = inputs_of(dense, batched=batched, seed=seed)
    columns = dense.weight[0].numel()
    rank = min(dense.out_channels, columns)
    small = compress(dense, plan=channel_plan(rank)).model
    assert isinstance(small, LowRankConvolution)
    biases = 0 if dense.bias is None else dense.out_channels
    assert numbers(small) == rank * (dense.out_channels + columns) + biases
    torch.testing.assert_close(small(x), dense(x), rtol=1e-10, atol=1e-10)


@settings(max_examples=40)
@given(transposed_convolutions(), st.booleans(), st.integers(0, 2**31))
def test_a_channel_pair_of_full_rank_is_the_transposed_convolution(dense: Any, batched: bool, seed: int) -> None:
    x = inputs_of(dense, batched=batched, seed=seed)
    columns = dense.weight[0].numel()
    rank = min(dense.in_channels, columns)
    report = compress(dense, plan=channel_plan(rank))
    small = report.model
    assert isinstance(small, LowRankTransposedConvolution)
    biases = 0 if dense.bias is None else dense.out_channels
    assert numbers(small) == rank * (dense.in_channels + columns) + biases == report.parameters.after
    torch.testing.assert_close(small(x), dense(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_truncated_transposed_convolution_has_the_nearest_kernel(rank: int) -> None:
    torch.manual_seed(0)
    dense = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, dtype=torch.float64)
    small = compress(dense, plan=channel_plan(rank)).model
    assert small is not None
    left, values, right = torch.linalg.svd(dense.weight.detach().flatten(1), full_matrices=False)
    expected = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, dtype=torch.float64)
    kernel = ((left[:, :rank] * values[:rank]) @ right[:rank]).reshape(dense.weight.shape)
    expected.load_state_dict({"weight": kernel, "bias": dense.bias})
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(small(x), expected(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(small(x, [9, 10]), expected(x, [9, 10]), rtol=1e-9, atol=1e-9)


@settings(max_examples=40)
@given(transposed_convolutions(), st.integers(0, 2**31))
def test_the_moments_vectors_of_a_transposed_convolution_make_up_its_gradient(layer: Any, seed: int) -> None:
    # The gradient of the weight is the sum over positions of x g^T: all that autograd knows of both.
    x = inputs_of(layer, batched=True, seed=seed)
    y = layer(x)
    cotangent = torch.randn_like(y)
    [expected] = torch.autograd.grad(y, layer.weight, cotangent)
    product = input_vectors(layer, x).T @ _output_vectors(layer, cotangent)
    torch.testing.assert_close(product, expected.flatten(1), rtol=1e-9, atol=1e-9)


def test_memory_formats_stay_as_they_were() -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 8, 3), nn.Conv3d(8, 16, 2))
    model[0].to(memory_format=torch.channels_last)
    model[3].to(memory_format=torch.channels_last_3d)
    small = compress(model, tolerance=0.9, prefer="size").model
    assert small is not None
    down = small[0].down.weight  # type: ignore[index, union-attr]
    assert down.is_contiguous(memory_format=torch.channels_last)
    assert not down.is_contiguous()
    assert small[2].up.weight.is_contiguous()  # type: ignore[index, union-attr]
    assert small[3].down.weight.is_contiguous(memory_format=torch.channels_last_3d)  # type: ignore[index, union-attr]
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
