"""The layers inside a pair are not called one by one where nobody would notice, and are where somebody would."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from compressor.forms import LowRankConvolution, LowRankEmbedding, LowRankLinear, PivotedLinear, SpatialConvolution

D_IN, D_OUT, RANK = 12, 18, 5
CONVOLUTIONS = {"channel": LowRankConvolution, "spatial": SpatialConvolution, "grouped": LowRankConvolution}
FORMS = ["plain", "pivoted", "embedding", *CONVOLUTIONS]
PARTS = [(form, part) for form in FORMS for part in ("down", "up") if (form, part) != ("embedding", "down")]


def filled(form: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A layer with random values, and what it takes."""
    torch.manual_seed(0)
    like = torch.empty(0, dtype=dtype)
    layer: nn.Module
    if form == "embedding":
        layer = LowRankEmbedding(nn.Embedding(D_IN, D_OUT, dtype=dtype), RANK)
    elif form in CONVOLUTIONS:
        groups = 3 if form == "grouped" else 1
        dense = nn.Conv2d(D_IN, D_OUT, 3, stride=(2, 1), padding=1, groups=groups, dtype=dtype)
        layer = CONVOLUTIONS[form](dense, RANK)
    else:
        kind = {"plain": LowRankLinear, "pivoted": PivotedLinear}[form]
        layer = kind(D_IN, D_OUT, RANK, bias=True, like=like)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    if isinstance(layer, PivotedLinear):
        layer.order.copy_(torch.randperm(D_OUT))
    return layer.eval()


def inputs(form: str, dtype: torch.dtype = torch.float32, *, rows: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if form == "embedding":
        return torch.randint(D_IN, (2, rows), generator=generator)
    if form in CONVOLUTIONS:
        return torch.randn(2, D_IN, rows, 3, generator=generator).to(dtype)
    return torch.randn(2, rows, D_IN, generator=generator).to(dtype)


def by_modules(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's outputs by calls of its parts alone."""
    down, up = layer.get_submodule("down"), layer.get_submodule("up")
    rows: Tensor = down(x)
    y: Tensor = up(rows)
    if isinstance(layer, PivotedLinear):
        y = torch.cat([rows, y], dim=-1)[..., layer.order.long()]
        y = y if layer.bias is None else y + layer.bias
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_outputs_are_bit_for_bit_those_of_the_parts(form: str, dtype: torch.dtype) -> None:
    layer, x = filled(form, dtype), inputs(form, dtype)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert torch.equal(layer(x), by_modules(layer, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [500, 1500])
def test_many_rows_of_a_pivoted_pair_are_bit_for_bit_those_of_the_parts(rows: int, dtype: torch.dtype) -> None:
    layer, x = filled("pivoted", dtype), inputs("pivoted", dtype, rows=rows // 2)
    for taken in (x, x.transpose(0, 1), x[0], x[:, :0]):
        with torch.no_grad():
            y = layer(taken)
            assert torch.equal(y, by_modules(layer, taken))
        assert torch.equal(layer(taken), y)


class DoubledLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class DoubledConv2d(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def replaced_forward(part: nn.Module) -> None:
    forward = part.forward
    part.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]


def replaced_class(part: nn.Module) -> None:
    part.__class__ = DoubledLinear if isinstance(part, nn.Linear) else DoubledConv2d


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def compiled(part: nn.Module) -> None:
    part._compiled_call_impl = lambda x: 2 * part.forward(x)  # where `Module.compile` puts what it made


# What may be done to a layer from outside, each so that it gives something else.
OBSERVERS: dict[str, Callable[[nn.Module], Any]] = {
    "forward hook": lambda part: part.register_forward_hook(lambda _, __, y: 2 * y),
    "forward pre-hook": lambda part: part.register_forward_pre_hook(lambda _, x: (2 * x[0],)),
    "replaced forward": replaced_forward,
    "replaced class": replaced_class,
    "parametrization": lambda part: parametrize.register_parametrization(part, "weight", Twice()),
    "pruning": lambda part: prune.l1_unstructured(part, "weight", amount=0.5),  # type: ignore[no-untyped-call]
    "compilation": compiled,
}


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize(("form", "part"), PARTS)
def test_what_is_done_to_a_part_after_the_first_call_is_seen(form: str, part: str, observer: str) -> None:
    layer, x = filled(form), inputs(form, rows=700)
    with torch.no_grad():
        before = layer(x)
    OBSERVERS[observer](layer.get_submodule(part))
    with torch.no_grad():
        y = layer(x)
    assert not torch.allclose(y, before)
    torch.testing.assert_close(y, by_modules(layer, x))


@pytest.mark.parametrize("form", CONVOLUTIONS)
@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_convolutions_are_padded_as_they_say(form: str, mode: Any) -> None:
    groups = 3 if form == "grouped" else 1
    dense = nn.Conv2d(D_IN, D_OUT, 3, padding=(2, 1), padding_mode=mode, groups=groups)
    layer, x = CONVOLUTIONS[form](dense, RANK), torch.randn(2, D_IN, 6, 5)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    assert torch.equal(layer(x), by_modules(layer, x))


@pytest.mark.parametrize("form", FORMS)
def test_hooks_of_all_modules_see_the_parts(form: str) -> None:
    layer, x, seen = filled(form), inputs(form), list[nn.Module]()
    layer(x)
    handle = nn.modules.module.register_module_forward_hook(lambda module, _, __: seen.append(module))
    try:
        layer(x)
    finally:
        handle.remove()
    assert seen == [layer.get_submodule("down"), layer.get_submodule("up"), layer]


@pytest.mark.parametrize("form", FORMS)
def test_backward_hooks_see_the_parts(form: str) -> None:
    layer, x, seen = filled(form), inputs(form), list[nn.Module]()
    layer.get_submodule("up").register_full_backward_hook(lambda module, _, __: seen.append(module))
    layer(x).sum().backward()
    assert seen == [layer.get_submodule("up")]


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_parts(form: str) -> None:
    layer, x = filled(form), inputs(form)
    expected = torch.autograd.grad(by_modules(layer, x).square().sum(), list(layer.parameters()))
    found = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("rows", [7, 700])
@pytest.mark.parametrize("form", FORMS)
def test_autocast_casts_as_it_does_for_the_parts(form: str, rows: int) -> None:
    layer, x = filled(form), inputs(form, rows=rows)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = layer(x), by_modules(layer, x)
    assert (y.dtype, form == "pivoted") == (expected.dtype, y.dtype == torch.float32)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("form", FORMS)
def test_shapes_are_found_on_the_meta_device(form: str) -> None:
    layer, x = filled(form), inputs(form)
    with torch.no_grad():
        y = layer(x)
        there = layer.to("meta")(x.to("meta"))
    assert (there.shape, there.dtype, there.device.type) == (y.shape, y.dtype, "meta")


@pytest.mark.parametrize("form", FORMS)
def test_copies_compute_the_same(form: str) -> None:
    layer, x = filled(form), inputs(form)
    y = layer(x)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again(x), y)
        again.get_submodule("up").weight.data.zero_()
        assert not torch.equal(again(x), y)
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("rows", [7, 700])
@pytest.mark.parametrize("form", FORMS)
def test_other_parameters_in_a_functional_call_and_vmap(form: str, rows: int) -> None:
    layers, x = [filled(form, torch.float64), filled(form, torch.float64)], inputs(form, torch.float64, rows=rows)
    for parameter in layers[1].parameters():
        parameter.data.mul_(-2)
    stacked, buffers = torch.func.stack_module_state(layers)  # type: ignore[arg-type]

    def outputs(parameters: dict[str, Tensor], fixed: dict[str, Tensor]) -> Tensor:
        result: Tensor = torch.func.functional_call(layers[0], (parameters, fixed), (x,))
        return result

    with torch.no_grad():
        together = torch.vmap(outputs)(stacked, buffers)
        for layer, y in zip(layers, together, strict=True):
            torch.testing.assert_close(y, layer(x))


@pytest.mark.parametrize("rows", [7, 700])
@pytest.mark.parametrize("form", ["plain", "pivoted", *CONVOLUTIONS])
def test_derivatives_in_forward_mode(form: str, rows: int) -> None:
    layer, x = filled(form, torch.float64), inputs(form, torch.float64, rows=rows)
    without_bias = by_modules(layer, torch.zeros_like(x))
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        y, tangent = torch.autograd.forward_ad.unpack_dual(layer(torch.autograd.forward_ad.make_dual(x, x)))
        torch.testing.assert_close(y - tangent, without_bias)


@pytest.mark.parametrize("form", FORMS)
def test_a_trace_holds_the_parameters_and_one_of_modules_the_parts(form: str) -> None:
    layer, x = filled(form), inputs(form)
    y = layer(x)
    with torch.no_grad():
        traced = torch.jit.trace(layer, x)  # type: ignore[no-untyped-call]
    assert torch.equal(traced(x), y)
    layer.get_submodule("up").weight.data.zero_()  # shared with the trace, so it is no constant in it
    assert torch.equal(traced(x), layer(x))
    graph = torch.fx.symbolic_trace(layer).graph
    assert {node.target for node in graph.nodes if node.op == "call_module"} == {"down", "up"}


@pytest.mark.parametrize("form", FORMS)
def test_compiled_in_one_graph_and_exported_with_the_names_of_the_parts(form: str) -> None:
    layer, x = filled(form), inputs(form)
    y = layer(x)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), y)
    torch._dynamo.reset()
    exported = torch.export.export(layer, (x,))
    torch.testing.assert_close(exported.module()(x), y)
    stacks = [str(node.meta.get("nn_module_stack")) for node in exported.graph.nodes]
    assert all(any(f"'{part}'" in stack for stack in stacks) for part in ("down", "up"))
