"""The kernels that a layer launches in one call: dense, and as a pair of its matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from compressor.forms.weights import TRANSPOSED, DenseWeight
from compressor.latency import Convolution, IntegerProduct, Kernel, LayerUse, MatrixProduct, ModuleCall, Movement, Size
from compressor.quantize import Quantization
from compressor.quantize.products import INPUTS_OF_8_BITS, kernel_group


def dense_kernels(weight: DenseWeight, use: LayerUse, *, itemsize: int) -> list[Kernel]:
    """The kernels of one call of a dense layer.

    Args:
        weight: Its weight.
        use: How a workload uses the layer.
        itemsize: Bytes of a number.
    """
    d_out, d_in = weight.shape
    call: Kernel = ModuleCall(itemsize=itemsize)
    if weight.kind == "embedding":
        lookup = Movement(how="lookup", rows=use.rows, columns=d_out, itemsize=itemsize)
        head = products(use.head_rows, (d_out, d_in), itemsize=itemsize)
        return [call, lookup, *([call, *head] if use.head_rows else [])]
    if "convolution" in weight.kind:
        first, second, *kernel = weight.tensor_shape
        turned = weight.kind in TRANSPOSED
        channels = (first, second) if turned else (weight.groups * second, first)
        sizes = (use.in_size, use.out_size)
        dense = convolution(use, tuple(kernel), channels, sizes=sizes, itemsize=itemsize, transposed=turned)
        return [call, replace(dense, groups=weight.groups)]
    matrix = products(use.rows, (d_in, d_out), itemsize=itemsize)
    return matrix if weight.kind == "parameter" else [call, *matrix]


def pair_kernels(weight: DenseWeight, rank: Size, use: LayerUse, *, itemsize: int) -> list[Kernel]:
    """Those of a pair of the layer's own matrix, as `dense_kernels` has it; of a convolution a channel pair."""
    d_out, d_in = weight.shape
    call = ModuleCall(itemsize=itemsize)
    if weight.kind == "parameter":
        # The module multiplies with the product of the factors, in code of its own.
        return [*products(d_out, (rank, d_in), itemsize=itemsize), *dense_kernels(weight, use, itemsize=itemsize)]
    if weight.kind == "embedding":
        lookup = Movement(how="lookup", rows=use.rows, columns=rank, itemsize=itemsize)
        head = products(use.head_rows, (d_out, rank, d_in), itemsize=itemsize)
        ups = products(use.rows, (rank, d_out), itemsize=itemsize)
        # The pair, and the embedding in it: other layers in a pair are not called where nothing is attached to them.
        return [call, call, lookup, *ups, *([call, *head] if use.head_rows else [])]
    if "convolution" in weight.kind:
        first, second, *sides = weight.tensor_shape
        kernel, point = tuple(sides), tuple(1 for _ in sides)
        size_in, size_out = use.in_size, use.out_size
        if weight.kind in TRANSPOSED:
            down = convolution(use, point, (first, rank), sizes=(size_in, size_in), itemsize=itemsize)
            sizes = (size_in, size_out)
            last = convolution(use, kernel, (rank, second), sizes=sizes, itemsize=itemsize, transposed=True)
            return [call, call, call, down, last]  # the pair, and the two layers in it
        down = convolution(use, kernel, (second, rank), sizes=(size_in, size_out), itemsize=itemsize)
        return [call, down, convolution(use, point, (rank, first), sizes=(size_out, size_out), itemsize=itemsize)]
    return [call, *products(use.rows, (d_in, rank, d_out), itemsize=itemsize)]


def products(rows: Size, widths: Sequence[Size], *, itemsize: int) -> list[Kernel]:
    """`rows` inputs of the first width times one weight after the other, to each of the next widths."""
    return [
        MatrixProduct(rows=rows, inner=inner, columns=columns, itemsize=itemsize) for inner, columns in pairwise(widths)
    ]


def quantized_kernels(kernels: Sequence[Kernel], weight: DenseWeight, quantization: Quantization) -> list[Kernel]:
    """The kernels of a layer whose products and convolutions are with quantized weights.

    A module multiplies with a dequantized parameter in code of its own.
    """
    found: list[Kernel] = []
    for kernel in kernels:
        if isinstance(kernel, MatrixProduct) and weight.kind != "parameter":
            taken = kernels_take(quantization, kernel.columns, kernel.inner)
            found.append(IntegerProduct(**vars(kernel), bits=quantization.bits, taken=taken))
            continue
        if isinstance(kernel, Convolution):
            inner = kernel.in_channels // kernel.groups * math.prod(kernel.kernel)
            found.append(dequantization(kernel.out_channels, inner, itemsize=kernel.itemsize))
        found.append(kernel)
    return found


def kernels_take(quantization: Quantization, outputs: Size, inputs: Size) -> npt.NDArray[np.bool_]:
    """Whether kernels for integers take weights of such sizes that are quantized so."""
    sides = np.broadcast_arrays(np.asarray(outputs, dtype=np.int64), np.asarray(inputs, dtype=np.int64))
    taken = [_takes(quantization, *each) for each in zip(*(side.ravel().tolist() for side in sides), strict=True)]
    return np.array(taken, dtype=np.bool_).reshape(sides[0].shape)


@lru_cache(maxsize=2**16)
def _takes(quantization: Quantization, outputs: int, inputs: int) -> bool:
    if quantization.zero_points or inputs < 1:
        return False
    group = quantization.fitted(inputs).group_size
    if quantization.bits == 8:
        return group is None and inputs % INPUTS_OF_8_BITS == 0
    return kernel_group(outputs, inputs, group) > 0


def dequantization(rows: Size, columns: Size, *, itemsize: int) -> Kernel:
    """A weight that is dequantized."""
    return Movement(how="dequantize", rows=rows, columns=columns, itemsize=itemsize)


def convolution(
    use: LayerUse,
    kernel: tuple[int, ...],
    channels: tuple[Size, Size],
    *,
    sizes: tuple[tuple[int, ...], tuple[int, ...]],
    itemsize: int,
    transposed: bool = False,
) -> Convolution:
    """A convolution from the first to the second of the numbers of channels and of the spatial sizes."""
    return Convolution(
        batch=use.batch,
        in_channels=channels[0],
        out_channels=channels[1],
        kernel=kernel,
        in_size=sizes[0],
        out_size=sizes[1],
        transposed=transposed,
        itemsize=itemsize,
    )
