"""Layers that hold integers do what dense layers of the dequantized matrix do, whichever way they multiply."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor.factorize.settings import DEFAULTS
from compressor.forms import FORMS, QuantizedHead, StoredWeight
from compressor.network import Kind


def filled(dense: nn.Module, form: str, rank: int = 0, *, kind: Kind = "linear") -> Any:
    """The layer of a form that stands for a dense one, and holds its bias."""
    torch.manual_seed(0)
    weight = StoredWeight(kind, tuple(dense.weight.shape))
    matrix = dense.weight.detach().flatten(1).double()
    found = FORMS[form]
    pair = found.approximate(weight, matrix.T if kind == "embedding" else matrix, rank, metric=None, settings=DEFAULTS)
    layer = found.layer(dense, rank)
    bias = {} if getattr(dense, "bias", None) is None else {found.bias: dense.bias}
    layer.load_state_dict({**found.stored(weight, pair, dense.weight.dtype), **bias}, strict=False)
    return layer.eval()


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["dense@8", "dense@4g32", "dense@4g16", "dense@4g32z", "dense@3g32", "dense@8g32"])
@pytest.mark.parametrize("rows", [1, 20, 200])
def test_integers_are_multiplied_as_the_dequantized_matrix_is(form: str, dtype: torch.dtype, rows: int) -> None:
    layer = filled(nn.Linear(64, 80).to(dtype), form)
    stored, integers = copied(layer.state_dict()), layer.integers()
    x = torch.randn(2, rows, 64).to(dtype)
    expected = x.double() @ layer.dequantized().double().T + layer.bias.double()
    with torch.no_grad():
        found = layer(x)
    # In 16 bits the matrix is rounded by the one and not by the other, and so are the outputs.
    eps = torch.finfo(dtype).eps
    assert (found.double() - expected).norm() <= 2 * eps * expected.norm()
    assert found.dtype == dtype
    # Whatever order a kernel takes, what is saved is what was loaded, and loading and moving bring it back.
    again = copy.deepcopy(layer)
    assert_equal(again.state_dict(), stored)
    with torch.no_grad():
        assert torch.equal(again(x), found)
        again.load_state_dict(stored)
        assert torch.equal(again(x), found)
    assert torch.equal(again.integers(), integers)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    "form", ["dense@8", "dense@2g32", "dense@3g32", "dense@4g32", "dense@4", "dense@5g96", "dense@6"]
)
def test_a_kernel_holds_the_integers_once(form: str) -> None:
    layer = filled(nn.Linear(96, 80, dtype=torch.bfloat16), form)
    before, stored = layer.weight_packed.nbytes, layer.weight_packed.clone()
    x = torch.randn(1, 96).bfloat16()
    expected = nn.functional.linear(x.double(), layer.dequantized().double(), layer.bias.double())
    with torch.no_grad():
        found = layer(x)
    assert (found.double() - expected).norm() <= 2**-7 * expected.norm()
    assert layer.weight_packed.dtype != torch.int32
    assert sum(each.nbytes for each in layer.buffers() if not each.is_floating_point()) == before + 16
    saved = layer.state_dict()["weight_packed"]
    with torch.no_grad():
        layer(x)
    assert saved.dtype == torch.int32
    assert torch.equal(saved, stored)


@pytest.mark.parametrize("inputs", [1, 4, 24, 1000])
def test_of_odd_inputs_integers_of_8_bits_are_multiplied_by_no_kernel(inputs: int) -> None:
    layer, x = filled(nn.Linear(inputs, 8, dtype=torch.bfloat16), "dense@8"), torch.randn(2, inputs).bfloat16()
    stored = copied(layer.state_dict())
    expected = nn.functional.linear(x.double(), layer.dequantized().double(), layer.bias.double())
    with torch.no_grad():
        assert (layer(x).double() - expected).norm() <= 2**-6 * expected.norm()
    assert_equal(layer.state_dict(), stored)


@pytest.mark.parametrize("form", ["dense@8", "dense@4g32", "dense@6"])
def test_a_kernel_takes_inputs_wherever_they_lie(form: str) -> None:
    layer = filled(nn.Linear(64, 16, dtype=torch.bfloat16), form)
    x = torch.randn(2, 7, 72).bfloat16()
    turned = x[0, :, :64].T.contiguous().T
    for input in (x[:, -1:, :64], x[:, -1:, 8:], turned, x[:, 0, None, :64].expand(2, 3, 64)):
        expected = nn.functional.linear(input.double(), layer.dequantized().double(), layer.bias.double())
        with torch.no_grad():
            assert (layer(input).double() - expected).norm() <= 2**-7 * expected.norm()
    assert layer.weight_packed.dtype != torch.int32


@pytest.mark.parametrize("rank", [32, 48, 64])
def test_kernels_take_both_factors_at_the_ranks_that_suit_them(rank: int) -> None:
    layer, form = filled(nn.Linear(96, 80, dtype=torch.bfloat16), "plain@4g32", rank), FORMS["plain@4g32"]
    with torch.no_grad():
        layer(torch.randn(1, 96).bfloat16())
    held = {layer.down.weight_packed.dtype, layer.up.weight_packed.dtype}
    suits = form.suits_kernels(StoredWeight("linear", (80, 96)), np.arange(80))
    assert bool(suits[rank]) == (held == {torch.uint8})
    assert form.suits_kernels(StoredWeight("linear", (80, 96)), np.array([31, 33])).all()


def test_what_no_kernel_takes_is_dequantized() -> None:
    # Groups of 48 inputs; 72 outputs; scales that bfloat16 does not have.
    for d_in, d_out, form in ((96, 80, "dense@4g48"), (96, 72, "dense@4g32"), (96, 80, "dense@3g32")):
        layer = filled(nn.Linear(d_in, d_out, dtype=torch.bfloat16), form)
        layer.weight_scale = layer.weight_scale.half() * (1 + 2**-10)
        x = torch.randn(3, d_in).bfloat16()
        with torch.no_grad():
            assert torch.equal(layer(x), nn.functional.linear(x, layer.dequantized(), layer.bias))
        assert layer.weight_packed.dtype == torch.int32


def test_scales_keep_their_dtype_when_a_module_is_cast() -> None:
    layer = filled(nn.Linear(64, 16), "dense@8")
    scales = layer.weight_scale.clone()
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        layer = layer.to(dtype)
        assert layer(torch.randn(3, 64, dtype=dtype)).dtype == layer.weight.dtype == dtype
    assert torch.equal(layer.weight_scale, scales)
    assert layer.weight_scale.dtype == torch.float16


def test_gradients_reach_the_inputs_and_the_bias() -> None:
    layer = filled(nn.Linear(64, 16, dtype=torch.bfloat16), "dense@8")
    x = torch.randn(1, 64, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], layer.dequantized().sum(0), rtol=0.02, atol=0.02)
    assert torch.equal(layer.bias.grad, torch.ones(16, dtype=torch.bfloat16))


@pytest.mark.parametrize(("form", "rank"), [("dense@8", 0), ("dense@4g24", 3), ("plain@8", 20)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_head_multiplies_with_what_its_embedding_holds(form: str, rank: int, biased: bool) -> None:
    embedding = filled(nn.Embedding(30, 48), form, rank, kind="embedding")
    head = QuantizedHead(embedding, nn.Parameter(torch.randn(30)) if biased else None)
    table, x = embedding(torch.arange(30)), torch.randn(2, 48)
    expected = nn.functional.linear(x, table, head.bias)
    torch.testing.assert_close(head(x), expected, rtol=1e-4, atol=1e-4)
    both = nn.ModuleDict({"embedding": embedding, "head": head})
    assert {name for name in both.state_dict() if name.startswith("head")} == ({"head.bias"} if biased else set())
    twin = copy.deepcopy(both)
    twin["embedding"].load_state_dict({name: 0 * each for name, each in embedding.state_dict().items()}, strict=False)
    torch.testing.assert_close(both["head"](x), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(twin["head"](x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dense@8", "dense@3g32"])
def test_compiled_a_kernel_multiplies_too(form: str) -> None:
    layer, x = filled(nn.Linear(64, 48, dtype=torch.bfloat16), form), torch.randn(1, 64).bfloat16()
    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), expected)


@pytest.mark.slow
def test_compiled_and_exported_it_computes_the_same() -> None:
    layer, x = filled(nn.Linear(64, 48), "dense@8"), torch.randn(3, 64)
    with torch.no_grad():
        expected = layer(x)
        torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), expected, rtol=1e-4, atol=1e-5)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


def test_a_pivoted_pair_of_all_rows_has_a_factor_without_rows() -> None:
    dense = nn.Linear(48, 5)
    layer, x = filled(dense, "pivoted@8", 5), torch.randn(3, 48)
    torch.testing.assert_close(layer(x), dense(x), rtol=0.02, atol=0.02)
