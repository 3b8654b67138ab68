"""Quantized weights that gradient descent can fit: their scales, zero points, and how each weight is rounded.

The forward rounds as what is stored will be, and gradients pass through the rounding unchanged (straight-through
estimation, Bengio et al., 2013). A weight is rounded from its integer and an offset, which signed gradient
steps move (AutoRound, Cheng et al., EMNLP 2024): beyond 1/2 it is the next integer, and never another one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compressor.forms.quantized_layers import QuantizedWeight
from compressor.quantize import Quantization, QuantizedMatrix, unpack


class FittedWeight(nn.Module):
    """The matrix of a quantized weight, differentiable in what it is made of.

    `offsets` are there where the rounding is fitted.
    """

    integers: Tensor
    zero_points: nn.Parameter | None
    offsets: nn.Parameter | None

    def __init__(self, stored: QuantizedMatrix, *, rounding: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.quantization, self.dtype, self.scale_dtype = stored.quantization, dtype, stored.scales.dtype
        self.register_buffer("integers", stored.integers)
        self.scales = nn.Parameter(stored.scales.to(torch.float32))
        zeros = None if stored.zero_points is None else nn.Parameter(stored.zero_points.to(torch.float32))
        self.register_parameter("zero_points", zeros)
        offsets = nn.Parameter(torch.zeros_like(stored.integers, dtype=torch.float32)) if rounding else None
        self.register_parameter("offsets", offsets)

    def forward(self) -> Tensor:
        integers, scales, zeros = self._rounded()
        grouped = integers.reshape(*scales.shape, integers.shape[1] // scales.shape[1])
        middle = 2.0 ** (self.quantization.bits - 1) if zeros is None else zeros.unsqueeze(2)
        matrix: Tensor = ((grouped - middle) * scales.unsqueeze(2)).flatten(1).to(self.dtype)
        return matrix

    @torch.no_grad()
    def quantized(self) -> QuantizedMatrix:
        """What it has become, to be stored."""
        integers, scales, zeros = self._rounded()
        return QuantizedMatrix(
            self.quantization,
            integers.to(torch.uint8),
            scales.to(self.scale_dtype),
            None if zeros is None else zeros.to(torch.uint8),
        )

    def _rounded(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Integers, scales, and zero points as they are stored, in float32."""
        largest = 2**self.quantization.bits - 1
        integers = self.integers.to(torch.float32)
        if self.offsets is not None:
            moved = integers + _passed(self.offsets, self.offsets.clamp(-1, 1))
            integers = _passed(moved, moved.round().clamp(0, largest))
        scales = _passed(self.scales, self.scales.to(self.scale_dtype).to(torch.float32))
        zeros = self.zero_points
        return integers, scales, None if zeros is None else _passed(zeros, zeros.round().clamp(0, largest))


@contextmanager
def fitted_weights(modules: Iterable[nn.Module], *, rounding: bool) -> Iterator[None]:
    """Let the quantized weights in modules be fitted, and put into them afterwards what they have become."""
    weights = [each for module in modules for each in module.modules() if isinstance(each, QuantizedWeight)]
    for each in weights:
        each.hold_as_stored()
        each.fitted = FittedWeight(_stored(each), rounding=rounding, dtype=each.weight.dtype)
    try:
        yield
    finally:
        for each in weights:
            assert isinstance(each.fitted, FittedWeight)
            found = each.fitted.quantized().tensors()
            each.fitted = None
            for name in ("weight_packed", "weight_scale", "weight_zero_point"):
                if name in found:
                    getattr(each, name).copy_(found[name])


def _stored(weight: QuantizedWeight) -> QuantizedMatrix:
    """The integers, scales, and zero points that a layer holds."""
    zeros = weight.weight_zero_point
    return QuantizedMatrix(
        Quantization(weight.bits, weight.group_size, zeros is not None),
        weight.integers(),
        weight.weight_scale,
        None if zeros is None else unpack(zeros.T, weight.bits, weight.rows).T.contiguous(),
    )


def _passed(wide: Tensor, rounded: Tensor) -> Tensor:
    """The rounded numbers, with the gradients of those before."""
    return wide + (rounded - wide).detach()
