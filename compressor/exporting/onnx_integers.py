"""Quantized weights as integers in an ONNX graph, each followed by a `DequantizeLinear`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compressor.forms.quantized_layers import QuantizedWeight
from compressor.quantize import Quantization, QuantizedMatrix, unpack

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

OPSET = 21
"""The first with integers of 4 bits, and with scales of groups."""


@dataclass(frozen=True)
class _Stored:
    """A quantized matrix, and whether an initializer has it transposed."""

    matrix: QuantizedMatrix
    transposed: bool


class _Weight(nn.Module):
    """A dense weight in the place of integers, which the exporter sees as one tensor."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix, requires_grad=False)

    def forward(self) -> Tensor:
        return self.matrix


def quantized_matrices(model: nn.Module) -> dict[str, QuantizedMatrix]:
    """The quantized weights of a model, by the names of their layers."""
    return {name: _matrix(each) for name, each in model.named_modules() if isinstance(each, QuantizedWeight)}


def _matrix(layer: QuantizedWeight) -> QuantizedMatrix:
    zeros = layer.weight_zero_point
    return QuantizedMatrix(
        Quantization(layer.bits, layer.group_size, zeros is not None),
        layer.integers(),
        layer.weight_scale,
        None if zeros is None else unpack(zeros.T, layer.bits, layer.rows).T,
    )


@contextmanager
def dense_weights(model: nn.Module, matrices: Mapping[str, QuantizedMatrix]) -> Iterator[None]:
    """Layers multiply with dense weights in float32 inside, in the place of the integers."""
    layers = [(model.get_submodule(name), matrix) for name, matrix in matrices.items()]
    try:
        for layer, matrix in layers:
            assert isinstance(layer, QuantizedWeight)
            layer.fitted = _Weight(matrix.product(torch.float32))
        yield
    finally:
        for layer, _ in layers:
            assert isinstance(layer, QuantizedWeight)
            layer.fitted = None


def with_integers(model: ModelProto, matrices: Iterable[QuantizedMatrix]) -> ModelProto:
    """The model with integers in the place of the initializers that are equal to a quantized matrix.

    These are found by their values, since the exporter names, turns, and shares them as it likes. 8 bits are stored as
    int8 and 4 as int4, with zero points as uint8 and uint4; 5, 6, and 7 bits as 8, and 2 and 3 as 4, which are the next
    that ONNX has. What a node computes is the same product of integer and scale in float32, and onnxruntime multiplies
    with it as with a dense weight.
    """
    known = _by_values(matrices)
    graph = model.graph
    kept, nodes = [], []
    for initializer in graph.initializer:
        found = known.get(_digest(_values(initializer))) if len(initializer.dims) >= 2 else None
        if found is None:
            kept.append(initializer)
            continue
        added, computed = _dequantized(initializer.name, tuple(initializer.dims), found)
        kept += added
        nodes += computed
    nodes += graph.node
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(nodes)
    return model


def _by_values(matrices: Iterable[QuantizedMatrix]) -> Mapping[str, _Stored]:
    """The matrices by a digest of what they stand for, the same way around and transposed."""
    known: dict[str, _Stored] = {}
    for matrix in matrices:
        product = matrix.product(torch.float32).cpu()
        known[_digest(product.T.contiguous().numpy())] = _Stored(matrix, transposed=True)
        known[_digest(product.numpy())] = _Stored(matrix, transposed=False)
    return known


def _values(initializer: TensorProto) -> NDArray[Any]:
    """The values as the rows of a matrix."""
    from onnx.numpy_helper import to_array

    values: NDArray[Any] = to_array(initializer)
    return values.reshape(len(values), -1)


def _digest(matrix: NDArray[Any]) -> str:
    digest = hashlib.sha256(f"{matrix.shape} {matrix.dtype}".encode())
    digest.update(np.ascontiguousarray(matrix).data)
    return digest.hexdigest()


def _dequantized(name: str, shape: tuple[int, ...], stored: _Stored) -> tuple[list[TensorProto], list[NodeProto]]:
    """The initializers and nodes that compute a weight, under its own name."""
    from onnx import TensorProto
    from onnx.helper import make_node, make_tensor

    matrix = stored.matrix
    wide = matrix.quantization.bits > 4
    middle = 2 ** (matrix.quantization.bits - 1)
    signed = matrix.zero_points is None
    kind = {
        (True, True): TensorProto.INT8,
        (True, False): TensorProto.UINT8,
        (False, True): TensorProto.INT4,
        (False, False): TensorProto.UINT4,
    }[wide, signed]

    def integers(suffix: str, values: Tensor) -> TensorProto:
        numbers = values.to(torch.int16) - (middle if signed else 0)
        data = numbers.to(torch.int8 if signed else torch.uint8).numpy().tobytes()
        return make_tensor(f"{name}_{suffix}", kind, list(values.shape), data if wide else _nibbles(data), raw=True)

    scales, scale_nodes, scale_name = _scales(name, matrix.scales)
    initializers = [integers("integers", matrix.integers.cpu()), *scales]
    inputs = [f"{name}_integers", scale_name]
    if matrix.zero_points is not None:
        initializers.append(integers("zero_points", matrix.zero_points.cpu()))
        inputs.append(f"{name}_zero_points")
    flat = len(shape) > 2
    output = f"{name}_matrix" if flat or stored.transposed else name
    # Whole rows are groups too: of them onnxruntime makes no product that rounds its inputs to 8 bits, unasked.
    size = matrix.shape[1] // matrix.scales.shape[1]
    nodes = [*scale_nodes, make_node("DequantizeLinear", inputs, [output], axis=1, block_size=size)]
    if stored.transposed:
        nodes.append(make_node("Transpose", [output], [name], perm=[1, 0]))
    elif flat:
        initializers.append(make_tensor(f"{name}_shape", TensorProto.INT64, [len(shape)], shape))
        nodes.append(make_node("Reshape", [output, f"{name}_shape"], [name]))
    return initializers, nodes


def _scales(name: str, scales: Tensor) -> tuple[list[TensorProto], list[NodeProto], str]:
    """The scales in float32, which are stored in float16 where that holds them."""
    from onnx import TensorProto
    from onnx.helper import make_node
    from onnx.numpy_helper import from_array

    exact, half = scales.cpu().float(), scales.cpu().to(torch.float16)
    stored = f"{name}_scales"
    if not torch.equal(half.float(), exact):
        return [from_array(exact.numpy(), stored)], [], stored
    cast = make_node("Cast", [stored], [f"{stored}_float"], to=TensorProto.FLOAT)
    return [from_array(half.numpy(), stored)], [cast], f"{stored}_float"


def _nibbles(data: bytes) -> bytes:
    """Integers of 4 bits, two a byte, the first in the low half."""
    numbers = np.frombuffer(data, np.uint8) & 0x0F
    numbers = np.append(numbers, np.zeros(len(numbers) % 2, np.uint8))
    return (numbers[::2] | numbers[1::2] << 4).astype(np.uint8).tobytes()
