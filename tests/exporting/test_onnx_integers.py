"""Integers in ONNX: onnxruntime computes what torch does with the dense weights, of a smaller file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compressor.exporting.onnx import largest_difference, onnx_artifact
from compressor.exporting.onnx_integers import OPSET, with_integers
from compressor.forms import FORMS
from compressor.forms.quantized_layers import QuantizedWeight
from compressor.quantize import Quantization, QuantizedMatrix, quantize_to_nearest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def quantized(weight: torch.Tensor, name: str, dtype: torch.dtype = torch.float16) -> QuantizedMatrix:
    return quantize_to_nearest(weight.flatten(1), Quantization.of(name), scale_dtype=dtype)


def graph_of(kind: str, weight: torch.Tensor) -> Any:
    """A graph of one node that multiplies with a weight, as it is or as the exporter turns it."""
    from onnx import TensorProto, helper, numpy_helper

    stored = weight.T.contiguous() if kind == "MatMul" else weight
    names = ["weight", "input"] if kind == "Gather" else ["input", "weight"]
    attributes = {"Gemm": {"transB": 1}, "Conv": {"pads": [1, 1, 1, 1]}}.get(kind, {})
    node = helper.make_node(kind, names, ["output"], **attributes)
    ranks = {"Gemm": (2, 2), "MatMul": (3, 3), "Gather": (2, 3), "Conv": (4, 4)}[kind]
    kinds = (TensorProto.INT64 if kind == "Gather" else TensorProto.FLOAT, TensorProto.FLOAT)
    given, output = (
        helper.make_tensor_value_info(name, of, [f"{name}{side}" for side in range(rank)])
        for name, of, rank in zip(("input", "output"), kinds, ranks, strict=True)
    )
    graph = helper.make_graph([node], "graph", [given], [output], [numpy_helper.from_array(stored.numpy(), "weight")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = 10
    return model


def computed(model: Any, given: torch.Tensor) -> torch.Tensor:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    [found] = session.run(None, {"input": given.numpy()})
    return torch.from_numpy(found)


INPUTS = {
    "Gemm": lambda: torch.rand(5, 96),
    "MatMul": lambda: torch.rand(2, 5, 96),
    "Gather": lambda: torch.tensor([[3, 0, 6], [6, 5, 1]]),
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("name", ["8", "8z", "6", "5g32", "4g32", "4g32z", "4", "4z", "3g48", "3g48z", "2g32"])
def test_onnxruntime_computes_the_same(kind: str, name: str) -> None:
    matrix = quantized(torch.randn(7, 96, generator=torch.Generator().manual_seed(0)), name)
    dense = graph_of(kind, matrix.product(torch.float32))
    given = INPUTS[kind]()
    expected = computed(dense, given)
    before = dense.ByteSize()
    small = with_integers(dense, [matrix])
    assert any(node.op_type == "DequantizeLinear" for node in small.graph.node)
    assert (computed(small, given) - expected).abs().max() <= 2e-6 * expected.abs().max()
    stored = {each.name: each for each in small.graph.initializer}["weight_integers"]
    bits = 8 if matrix.quantization.bits > 4 else 4
    assert len(stored.raw_data) == 7 * 96 * bits // 8
    assert small.ByteSize() < before * bits / 32 + 600


@pytest.mark.parametrize("name", ["8", "4g36"])
def test_a_convolution(name: str) -> None:
    convolution = nn.Conv2d(8, 6, 3, padding=1, bias=False)
    matrix = quantized(convolution.weight.detach(), name)
    weight = matrix.product(torch.float32).reshape(6, 8, 3, 3)
    images = torch.rand(2, 8, 5, 5)
    found = computed(with_integers(graph_of("Conv", weight), [matrix]), images)
    expected = nn.functional.conv2d(images, weight, padding=1)
    assert (found - expected).abs().max() <= 1e-5


def test_scales_that_float16_does_not_hold_are_in_float32() -> None:
    matrix = quantized(1e-6 * torch.randn(4, 32), "8", torch.bfloat16)
    given = torch.rand(3, 32)
    small = with_integers(graph_of("Gemm", matrix.product(torch.float32)), [matrix])
    assert not any(node.op_type == "Cast" for node in small.graph.node)
    assert torch.allclose(computed(small, given), given @ matrix.product(torch.float32).T, rtol=1e-5, atol=0)


def test_what_is_not_quantized_stays(tmp_path: Path) -> None:
    weight = torch.randn(4, 32)
    other = quantized(torch.randn(4, 32), "8")
    model = graph_of("Gemm", weight)
    before = model.SerializeToString()
    assert with_integers(model, [other]).SerializeToString() == before


def filled(layer: nn.Module, dense: nn.Module, name: str) -> nn.Module:
    """An unfilled quantized layer with the weights of a dense one."""
    matrix = quantized(dense.weight.detach(), name)  # type: ignore[operator]
    own = matrix.tensors() | {"weight_shape": torch.tensor(dense.weight.shape)}
    bias = getattr(dense, "bias", None)
    missing = layer.load_state_dict(own | ({} if bias is None else {"bias": bias.detach()}), strict=False).missing_keys
    assert missing in ([], ["weight"])  # the zero-size marker of what is no linear layer
    return layer


@pytest.mark.slow
def test_a_module_of_quantized_layers(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.hidden, self.pair = nn.Embedding(60, 64), nn.Linear(64, 96), nn.Linear(96, 64)
            self.head = nn.Linear(64, 60, bias=False)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            hidden = nn.functional.relu(self.hidden(self.tokens(input)))
            return self.head(hidden[..., :64] + self.pair(hidden))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    net = Net().eval()
    for name, form in (("tokens", "dense@8"), ("hidden", "dense@4g32"), ("head", "dense@6")):
        dense = net.get_submodule(name)
        layer = FORMS[form].layer(dense, 0)
        setattr(net, name, filled(layer, dense, form.removeprefix("dense@")))
    pair = FORMS["plain@4g32"].layer(net.pair, 32)
    down, up = nn.Linear(96, 32, bias=False), nn.Linear(32, 64)
    filled(pair.down, down, "4g32")
    filled(pair.up, up, "4")
    net.pair = pair
    inputs = {"input": torch.randint(0, 60, (2, 7))}
    artifact = onnx_artifact(net, inputs)
    assert artifact.write is not None
    path = tmp_path / "net.onnx"
    artifact.write(path)
    assert largest_difference(net, inputs, path) <= 1e-5
    stored = onnx.load(path).graph.initializer
    kinds = {each.name: each.data_type for each in stored if "integers" in each.name}
    assert sorted(kinds.values()) == sorted([onnx.TensorProto.INT8] * 2 + [onnx.TensorProto.INT4] * 3)
    # 8 bits for 60 x 64 and 64 x 60, and 4 for 64 x 96, 96 x 32, and 32 x 64, with scales beside them.
    assert sum(each.ByteSize() for each in stored) < 2 * 60 * 64 + (64 * 96 + 96 * 32 + 32 * 64) // 2 + 5000
    assert all(each.fitted is None for each in net.modules() if isinstance(each, QuantizedWeight))
