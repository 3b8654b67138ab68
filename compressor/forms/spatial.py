"""Spatial pairs: a vertical convolution to r channels, then a horizontal one; for kernels of two wide sides.

`X.down.weight` is `r x c x k_h x 1` and `X.up.weight` is `d_out x r x 1 x k_w`. Factorized is the
`(d_out k_w) x (c k_h)` arrangement of the kernel.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.factorize import (
    Decomposition,
    FactorizationSettings,
    FactorPair,
    Metric,
    SpatialPair,
    TiedMetric,
    balanced,
    spatial_errors,
    spatial_matrix,
    spatial_pair,
)
from compressor.forms.kernels import convolution
from compressor.forms.layers import MARKERS, LayerPair, copy_geometry, unfilled
from compressor.forms.pair_form import Approximations, MatrixPair, PairForm, StoredPairShape
from compressor.forms.weights import DenseWeight
from compressor.io import TensorInfo
from compressor.latency import Kernel, LayerUse, ModuleCall, Size
from compressor.measure import Spectrum, singular_values, truncation_errors
from compressor.network import Kind


class SpatialConvolution(LayerPair):
    """A spatial pair: a `k_h x 1` convolution to r channels, then a `1 x k_w` one with the bias.

    Each takes its own axis of the dense one's stride, padding and dilation, and both its padding mode. The first works
    on the columns one by one, so whether these are padded before or after it is the same in every mode.
    """

    def __init__(self, dense: nn.Conv2d, rank: int) -> None:
        super().__init__()
        factory: dict[str, Any] = {"dtype": dense.weight.dtype, "device": dense.weight.device}
        self.in_channels, self.out_channels, self.rank = dense.in_channels, dense.out_channels, rank
        copy_geometry(dense, self)
        padding, mode = dense.padding, dense.padding_mode
        vertical, horizontal = (padding, padding) if isinstance(padding, str) else ((padding[0], 0), (0, padding[1]))
        self.down = unfilled(
            nn.Conv2d,
            dense.in_channels,
            rank,
            (dense.kernel_size[0], 1),
            stride=(dense.stride[0], 1),
            padding=vertical,
            dilation=(dense.dilation[0], 1),
            padding_mode=mode,
            bias=False,
            **factory,
        )
        self.up = unfilled(
            nn.Conv2d,
            rank,
            dense.out_channels,
            (1, dense.kernel_size[1]),
            stride=(1, dense.stride[1]),
            padding=horizontal,
            dilation=(1, dense.dilation[1]),
            padding_mode=mode,
            bias=dense.bias is not None,
            **factory,
        )
        self.register_buffer("weight", torch.empty(MARKERS["convolution"], **factory))

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, out_channels={self.out_channels}, rank={self.rank}"


def spatial_layer(dense: nn.Module, rank: int) -> nn.Module:
    """An unfilled spatial pair in place of a two-dimensional convolution without groups; else ValueError."""
    if not isinstance(dense, nn.Conv2d):
        raise ValueError(f"{type(dense).__name__} is not a two-dimensional convolution")
    if dense.groups > 1:
        raise ValueError(f"the convolution has {dense.groups} groups")
    return SpatialConvolution(dense, rank)


@dataclass(frozen=True, kw_only=True)
class SpatialForm(PairForm):
    """`r (d_out k_w + c k_h)` numbers."""

    name: str = "spatial"
    has_own_errors: bool = True
    build: Callable[..., nn.Module] = spatial_layer
    classes: tuple[type[nn.Module], ...] = (SpatialConvolution,)

    def takes(self, weight: DenseWeight) -> bool:
        return weight.kind == "convolution" and len(weight.tensor_shape) == 4 and min(weight.tensor_shape[2:]) > 1

    def sides(self, weight: DenseWeight) -> tuple[int, int]:
        d_out, c, k_h, k_w = weight.tensor_shape
        return d_out * k_w, c * k_h

    def kernels(self, weight: DenseWeight, rank: Size, use: LayerUse, *, itemsize: int) -> list[Kernel]:
        d_out, c, k_h, k_w = weight.tensor_shape
        between = (use.out_size[0], use.in_size[1])
        down = convolution(use, (k_h, 1), (c, rank), sizes=(use.in_size, between), itemsize=itemsize)
        up = convolution(use, (1, k_w), (rank, d_out), sizes=(between, use.out_size), itemsize=itemsize)
        return [ModuleCall(itemsize=itemsize), down, up]

    def infos(self, weight: DenseWeight, rank: int, dtype: torch.dtype) -> list[TensorInfo]:
        d_out, c, k_h, k_w = weight.tensor_shape
        return [
            TensorInfo("down.weight", (rank, c, k_h, 1), dtype),
            TensorInfo("up.weight", (d_out, rank, 1, k_w), dtype),
        ]

    def recognizes(self, kind: Kind, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        down, up = shapes["down.weight"], shapes["up.weight"]
        return kind == "convolution" and len(down) > 2 and max(up[2:], default=1) > 1

    def read(self, kind: Kind, shapes: Mapping[str, tuple[int, ...]]) -> StoredPairShape | None:
        down, up = shapes["down.weight"], shapes["up.weight"]
        if len(down) != 4 or len(up) != 4 or up[1] != down[0] or min(down) < 1 or not down[3] == up[2] == 1:
            return None
        return StoredPairShape(down[0], (up[0], down[1], down[2], up[3]))

    def approximate(
        self,
        weight: DenseWeight,
        matrix: Tensor,
        rank: int,
        *,
        metric: Metric | TiedMetric | None,
        settings: FactorizationSettings,
        decomposition: Decomposition | None = None,
    ) -> SpatialPair:
        assert not isinstance(metric, TiedMetric)
        return spatial_pair(matrix.reshape(weight.tensor_shape), rank, metric, settings=settings)

    def stored(self, weight: DenseWeight, pair: MatrixPair, dtype: torch.dtype) -> dict[str, Tensor]:
        assert isinstance(pair, SpatialPair)
        even = balanced(pair, dtype)
        return {"down.weight": even.down.to(dtype).unsqueeze(3), "up.weight": even.up.to(dtype).unsqueeze(2)}

    def product(self, weight: DenseWeight, tensors: Mapping[str, Tensor]) -> Tensor:
        return SpatialPair(up=tensors["up.weight"].squeeze(2), down=tensors["down.weight"].squeeze(3)).product()

    def merged(self, kind: Kind, tensors: Mapping[str, Tensor]) -> FactorPair:
        return FactorPair(up=tensors["up.weight"], down=tensors["down.weight"])

    def own_values(self, weight: Tensor) -> Spectrum:
        return singular_values(spatial_matrix(weight))

    def errors_in(self, approximations: Approximations) -> Spectrum:
        kernel, metric = approximations.matrix.reshape(approximations.weight.tensor_shape), approximations.metric
        if metric is None:
            return truncation_errors(singular_values(spatial_matrix(kernel)))
        assert isinstance(metric, Metric)
        return spatial_errors(kernel, metric, settings=approximations.settings)


SPATIAL = SpatialForm()
