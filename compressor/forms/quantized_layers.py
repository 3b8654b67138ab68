"""Layers that hold integers and scales in the place of a weight, and dequantize it when they run.

Like `forms/layers.py` it imports nothing of this package but what is copied into exported folders too.

A layer has the tensors of a quantized matrix as buffers, called as in its file. Scales keep their dtype of 16 bits
when a module is cast: what a layer computes in is the dtype of its zero-size `weight`, which is not stored.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compressor.forms.layers import (
    MARKERS,
    Convolution,
    TransposedConvolution,
    applied,
    copy_geometry,
    is_lookup,
    kind_name,
    linear_sides,
    lookup_scale,
    scaled,
)
from compressor.quantize.packing import pack, packed_width, unpack
from compressor.quantize.products import (
    has_kernel,
    held_for_kernel,
    kernel_group,
    most_rows,
    product_of_8_bits,
    product_of_few_bits,
    unheld,
)


class QuantizedWeight(nn.Module):
    """A `rows x columns` matrix as packed integers with scales, and zero points where it has them.

    `shape` is that of the tensor whose first dimension are the rows and whose others are the columns.
    """

    weight: Tensor
    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    weight_shape: Tensor
    kernel_scales: Tensor | None

    # What a convolution says of itself.
    kernel_size: Any
    stride: Any
    padding: Any
    dilation: Any
    groups: int
    padding_mode: str

    def __init__(
        self, shape: tuple[int, ...], *, like: Tensor, bits: int, group_size: int | None, zero_points: bool
    ) -> None:
        super().__init__()
        rows, columns = shape[0], 1
        for side in shape[1:]:
            columns *= side
        groups = 1 if group_size is None else columns // group_size
        self.rows, self.columns, self.bits, self.group_size = rows, columns, bits, group_size
        self.shape = shape
        device = like.device
        scale = like.dtype if like.dtype in (torch.bfloat16, torch.float16) else torch.float16
        integers: dict[str, Any] = {"dtype": torch.int32, "device": device}
        self.register_buffer("weight_packed", torch.empty(rows, packed_width(columns, bits), **integers))
        self.register_buffer("weight_scale", torch.empty(rows, groups, dtype=scale, device=device))
        zeros = torch.empty(packed_width(rows, bits), groups, **integers) if zero_points else None
        self.register_buffer("weight_zero_point", zeros)
        self.register_buffer("weight_shape", torch.tensor(shape, dtype=torch.int64, device=device))
        self.register_buffer("weight", like.new_empty(0), persistent=False)
        self.register_buffer("kernel_scales", None, persistent=False)
        # Whether it is multiplied in int8, and in which groups a kernel of 4 bits takes it; 0 where it does not.
        self.is_int8 = bits == 8 and groups == 1 and not zero_points
        self.kernel_group, self.has_kernel = self._fitting_group(), False
        # The type of device in whose order the integers are held: a buffer can be moved without the module.
        self.kernel_order: str | None = None
        # What gives the matrix while it is fitted.
        self.fitted: nn.Module | None = None

    def _fitting_group(self) -> int:
        fits = self.bits < 8 and self.weight_zero_point is None and not self.is_table
        return kernel_group(self.rows, self.columns, self.group_size) if fits else 0

    def dequantized(self, rows: Tensor | None = None) -> Tensor:
        """The matrix, or some of its rows, in the dtype of the layer."""
        if self.fitted is not None:
            matrix: Tensor = self.fitted()
            return matrix if rows is None else matrix[rows]
        dtype, scale = self.weight.dtype, self.weight_scale if rows is None else self.weight_scale[rows]
        # A product of an integer and a scale of the same 16 bits is rounded once.
        exact = dtype if dtype.itemsize >= 4 or scale.dtype == dtype else torch.float32
        size = self.columns // scale.shape[1]  # which -1 would leave open where there are no rows
        numbers = self._integers(rows).to(exact).view(*scale.shape, size)
        if self.weight_packed.dtype != torch.int8:
            numbers -= self._zeros(rows, exact)
        numbers *= scale.to(exact).unsqueeze(2)
        return numbers.flatten(1).to(dtype)

    def integers(self) -> Tensor:
        """The integers as they are stored, `rows x columns` in uint8."""
        found = self._integers(None)
        return found.view(torch.uint8) ^ 128 if found.dtype == torch.int8 else found

    def _integers(self, rows: Tensor | None) -> Tensor:
        """The integers, or some rows of them, in uint8; in int8 without their zero point where they are held so."""
        packed = self.weight_packed
        if packed.dtype == torch.uint8:
            packed = unheld(packed, self.bits, order=self.kernel_order)
            return packed if rows is None else packed[rows]
        packed = packed if rows is None else packed[rows]
        return packed if packed.dtype == torch.int8 else unpack(packed, self.bits, self.columns)

    def _zeros(self, rows: Tensor | None, dtype: torch.dtype) -> Tensor | int:
        zeros = self.weight_zero_point
        if zeros is None:
            return 1 << (self.bits - 1)
        found: Tensor = unpack(zeros.T, self.bits, self.rows).T
        found = found if rows is None else found[rows]
        widened: Tensor = found.to(dtype).unsqueeze(2)
        return widened

    def multiplied(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        """The inputs times the transposed matrix, plus a bias: by a kernel for integers where there is one.

        In bfloat16 outputs differ by 2^-8 of the largest from those of the dequantized matrix (`quantize/products.py`).
        """
        kernel = self._kernel(input)
        if kernel is None:
            return nn.functional.linear(input, self.dequantized(), bias)
        product: Tensor = kernel(input)
        return product if bias is None else product + bias

    def _kernel(self, input: Tensor) -> Any:
        """What multiplies with the integers as they are held; None where the matrix has to be dequantized.

        The integers are brought into the order that the kernel takes when they are first multiplied with.
        """
        own = self.__dict__
        tensors = own["_buffers"]  # looked up in half the time of attributes
        dtype, held, is_int8 = tensors["weight"].dtype, tensors["weight_packed"], own["is_int8"]
        if (
            not (is_int8 or own["kernel_group"])
            or type(input) is not Tensor
            or input.dtype != dtype
            or not (dtype == torch.bfloat16 or (is_int8 and dtype == torch.float32))
            or input.is_meta
            or self.fitted is not None
            or input.numel() == 0
            or (torch.is_grad_enabled() and input.requires_grad)
            or torch.is_autocast_enabled(input.device.type)
            or torch.compiler.is_exporting()
            or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        ):
            return None
        if is_int8:
            if held.dtype == torch.int32:
                if torch.compiler.is_compiling():  # what is held cannot be changed while it is traced
                    return None
                self.has_kernel = has_kernel(8, held.device)
                self.weight_packed = (held.view(torch.uint8)[:, : self.columns] ^ 128).view(torch.int8).contiguous()
            return self._product_of_8_bits
        if input.numel() > most_rows(own["bits"]) * self.columns:
            return None
        if held.dtype == torch.int32 or own["kernel_order"] != held.device.type:
            if torch.compiler.is_compiling():
                return None
            self.hold_as_stored()
            if not self._held_for_kernel(self.weight_packed):
                return None
        return self._product_of_few_bits

    # Whether rows of it are looked up.
    is_table = False

    def _product_of_8_bits(self, input: Tensor) -> Tensor:
        tensors = self._buffers
        integers, scales = tensors["weight_packed"], tensors["weight_scale"]
        assert integers is not None
        assert scales is not None
        scales = scales.view(-1).to(input.dtype)
        product = product_of_8_bits(input.reshape(-1, self.columns), integers, scales, kernel=self.has_kernel)
        return product.view(*input.shape[:-1], self.rows)

    def _product_of_few_bits(self, input: Tensor) -> Tensor:
        tensors = self._buffers
        held, scales = tensors["weight_packed"], tensors["kernel_scales"]
        assert held is not None
        assert scales is not None
        rows = input.reshape(-1, self.columns)
        product = product_of_few_bits(rows, held, scales, bits=self.bits, group=self.kernel_group)
        return product.view(*input.shape[:-1], self.rows)

    def _held_for_kernel(self, held: Tensor) -> bool:
        """Bring the integers into the order of the kernel; whether there is one for them."""
        scales = self.weight_scale.T.to(torch.bfloat16)
        if not has_kernel(4, held.device) or not torch.equal(scales.T.to(self.weight_scale.dtype), self.weight_scale):
            self.kernel_group = 0
            return False
        # Scales and what is added, here nothing, lie beside each other; the scales that are stored become a view.
        self.kernel_scales = torch.stack([scales, torch.zeros_like(scales)], dim=-1).contiguous()
        if self.weight_scale.dtype == torch.bfloat16:
            self.weight_scale = self.kernel_scales[:, :, 0].T
        self.weight_packed = held_for_kernel(unpack(held, self.bits, self.columns), self.bits)
        self.kernel_order = held.device.type
        return True

    def hold_as_stored(self) -> None:
        """Hold the integers as they are stored; a kernel's own order is found again when it is needed."""
        held = self.weight_packed
        if held.dtype == torch.int8:
            self.weight_packed = pack(held.view(torch.uint8) ^ 128, 8)
        elif held.dtype == torch.uint8:
            self.weight_packed = pack(unheld(held, self.bits, order=self.kernel_order), self.bits)
        self.weight_scale = self.weight_scale.contiguous()
        self.kernel_scales = None
        self.kernel_group = self._fitting_group()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.hold_as_stored()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.hold_as_stored()
        super()._load_from_state_dict(*arguments)

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedWeight":
        self.hold_as_stored()
        # As integers the scales are moved, and not cast: rounded to another dtype they would not come back.
        dtype = self.weight_scale.dtype
        self.weight_scale = self.weight_scale.view(torch.int16)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.weight_scale = self.weight_scale.view(dtype)
        return self

    def extra_repr(self) -> str:
        groups = "" if self.group_size is None else f", group_size={self.group_size}"
        return f"bits={self.bits}{groups}"


class QuantizedLinear(QuantizedWeight):
    """A linear layer of quantized weights, with a low-rank correction `up(down(x))` where there is one."""

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool, like: Tensor, **quantization: Any) -> None:
        super().__init__((out_features, in_features), like=like, **quantization)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", _bias(out_features, like) if bias else None)

    def forward(self, input: Tensor) -> Tensor:
        return corrected(self, input, self.multiplied(input, self.bias))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {super().extra_repr()}"


class QuantizedEmbedding(QuantizedWeight):
    """An embedding of quantized vectors, of which those that are looked up are dequantized."""

    is_table = True

    def __init__(self, dense: nn.Embedding, **quantization: Any) -> None:
        super().__init__(tuple(dense.weight.shape), like=dense.weight, **quantization)
        self.num_embeddings, self.embedding_dim = dense.num_embeddings, dense.embedding_dim
        self.padding_idx = dense.padding_idx
        self.scale, self.scale_rounds = lookup_scale(dense)

    def forward(self, input: Tensor) -> Tensor:
        vectors = self.dequantized(input.flatten()).reshape(*input.shape, -1)
        return scaled(corrected(self, input, vectors), self.scale, self.scale_rounds)

    def extra_repr(self) -> str:
        return f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}, {super().extra_repr()}"


class QuantizedHead(nn.Module):
    """An output head that is tied to an embedding that is quantized, or whose factors are.

    It holds nothing but its bias, and multiplies with what the embedding holds.
    """

    weight: Tensor

    def __init__(self, embedding: nn.Module, bias: nn.Parameter | None) -> None:
        super().__init__()
        own: Any = embedding
        self.in_features, self.out_features = own.embedding_dim, own.num_embeddings
        self._embedding = (own,)  # in a tuple, so that it is no part of this module
        self.bias = bias
        self.register_buffer("weight", own.weight.new_empty(self.out_features, 0), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        [embedding] = self._embedding
        parts = embedding._modules
        output: Tensor | None = self.bias
        if isinstance(embedding, QuantizedWeight):
            output = embedding.multiplied(input, self.bias)
        if "up" in parts:
            logits = parts["down"].multiplied(input @ parts["up"].dequantized())
            output = logits if output is None else logits + output
        assert output is not None
        return output

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class QuantizedConvolution(QuantizedWeight):
    """A convolution of quantized weights."""

    bias: nn.Parameter | None

    def __init__(self, dense: Convolution, **quantization: Any) -> None:
        super().__init__(tuple(dense.weight.shape), like=dense.weight, **quantization)
        self.in_channels, self.out_channels = dense.in_channels, dense.out_channels
        copy_geometry(dense, self)
        self.around = list(dense._reversed_padding_repeated_twice)
        self.register_parameter("bias", None if dense.bias is None else _bias(self.out_channels, dense.weight))

    def forward(self, input: Tensor) -> Tensor:
        weight = self.dequantized().view(*self.shape)
        padded, padding = input, self.padding
        if self.padding_mode != "zeros":
            padded, padding = nn.functional.pad(input, self.around, mode=self.padding_mode), 0
        convolution = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[len(self.shape) - 3]
        output = convolution(padded, weight, self.bias, self.stride, padding, self.dilation, self.groups)
        return corrected(self, input, output)

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, out_channels={self.out_channels}, {super().extra_repr()}"


class QuantizedTransposedConvolution(QuantizedWeight):
    """A transposed convolution of quantized weights."""

    bias: nn.Parameter | None

    def __init__(self, dense: TransposedConvolution, **quantization: Any) -> None:
        super().__init__(tuple(dense.weight.shape), like=dense.weight, **quantization)
        self.in_channels, self.out_channels = dense.in_channels, dense.out_channels
        copy_geometry(dense, self)
        self.output_padding = dense.output_padding
        self.register_parameter("bias", None if dense.bias is None else _bias(self.out_channels, dense.weight))

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        sides = len(self.shape) - 2
        place: Any = nn.ConvTranspose2d._output_padding
        beside = place(
            self, input, output_size, self.stride, self.padding, self.kernel_size, sides, dilation=self.dilation
        )
        functions = (nn.functional.conv_transpose1d, nn.functional.conv_transpose2d, nn.functional.conv_transpose3d)
        weight = self.dequantized().view(*self.shape)
        output: Tensor = functions[sides - 1](
            input, weight, self.bias, self.stride, self.padding, beside, 1, self.dilation
        )
        parts = self._modules
        down, up = parts.get("down"), parts.get("up")
        return output if down is None or up is None else output + up(down(input), list(output.shape[2:]))

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, out_channels={self.out_channels}, {super().extra_repr()}"


def _bias(size: int, like: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty(size, dtype=like.dtype, device=like.device))


def corrected(layer: nn.Module, input: Tensor, output: Tensor) -> Tensor:
    """The output of a layer and of the low-rank correction that it has, if it has one."""
    parts = layer._modules
    down, up = parts.get("down"), parts.get("up")
    return output if down is None or up is None else output + applied(up, applied(down, input))


def quantized_layer(dense: nn.Module, **quantization: Any) -> nn.Module:
    """An unfilled quantized layer in the place of a linear layer, a transformers `Conv1D`, an embedding, or a
    convolution, transposed only without groups; else ValueError."""
    if isinstance(dense, nn.Embedding) and is_lookup(dense):
        return QuantizedEmbedding(dense, **quantization)
    if isinstance(dense, TransposedConvolution) and dense.groups > 1:
        raise ValueError(f"the convolution has {dense.groups} groups")
    if isinstance(dense, TransposedConvolution):
        return QuantizedTransposedConvolution(dense, **quantization)
    if isinstance(dense, Convolution):
        return QuantizedConvolution(dense, **quantization)
    _, d_in, d_out = linear_sides(dense)
    weight = dense.weight
    assert isinstance(weight, Tensor)
    has_bias = getattr(dense, "bias", None) is not None
    return QuantizedLinear(d_in, d_out, bias=has_bias, like=weight, **quantization)


# The group size that so many inputs have; None for whole rows.
Fitted = Callable[[int], int | None]


def quantized_part(dense: nn.Module, *, bits: int, zero_points: bool, fitted: Fitted) -> nn.Module:
    """The unfilled quantized layer in the place of a dense one, with the group size that its inputs have."""
    weight = dense.weight
    assert isinstance(weight, Tensor)
    inputs = weight.shape[0] if type(dense).__name__ == "Conv1D" else weight.shape[1:].numel()
    return quantized_layer(dense, bits=bits, group_size=fitted(inputs), zero_points=zero_points)


def quantized_pair(pair: nn.Module, *, bits: int, zero_points: bool, fitted: Fitted) -> nn.Module:
    """An unfilled pair, changed in place, with quantized layers in the place of its two."""
    for name in ("down", "up"):
        pair.add_module(name, quantized_part(pair._modules[name], bits=bits, zero_points=zero_points, fitted=fitted))  # type: ignore[arg-type]
    mark(pair, tuple(pair._buffers["weight"].shape), bits)  # type: ignore[union-attr]
    return pair


def quantized_matrix(
    dense: nn.Module, correction: nn.Module | None, *, bits: int, zero_points: bool, fitted: Fitted
) -> nn.Module:
    """The unfilled quantized layer in the place of a dense one, with the layers of the unfilled pair that corrects it,
    if one does."""
    layer, kind = quantized_part(dense, bits=bits, zero_points=zero_points, fitted=fitted), kind_name(dense)
    if kind != "linear":
        mark(layer, MARKERS[kind], bits)
    if correction is not None:
        parts = correction._modules
        for name in ("down", "up"):
            layer.add_module(name, parts[name])
        if "bias" in parts["up"]._parameters:  # type: ignore[union-attr]
            parts["up"].register_parameter("bias", None)  # type: ignore[union-attr]
    return layer


def mark(layer: nn.Module, marker: tuple[int, ...], bits: int) -> None:
    """Let the zero-size weight of a layer say its bits too: the packed widths of short rows leave these open."""
    weight = layer._buffers["weight"]
    assert weight is not None
    layer.register_buffer("weight", weight.new_empty(*marker, bits))
