"""Channel pairs: a convolution to r channels with the dense one's kernel, then a pointwise one.

For a convolution of c channels `X.down.weight` is `r x c x kernel` and `X.up.weight` is `d_out x r x 1 ..`. For a
transposed convolution of c channels they are transposed convolutions too, of `c x r x 1 ..` and `r x d_out x kernel`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.factorize import FactorPair, balanced
from compressor.forms.layers import MARKERS, Convolution, LayerPair, TransposedConvolution, copy_geometry, unfilled
from compressor.forms.pair_form import MatrixPair, PairForm, StoredPairShape
from compressor.forms.weights import DenseWeight
from compressor.io import TensorInfo
from compressor.network import Kind


class LowRankConvolution(LayerPair):
    """A channel pair: a convolution to r channels with the dense one's kernel, then a 1 x 1 convolution with its
    bias. Both have the groups of the dense one, each with r channels of its own."""

    def __init__(self, dense: Convolution, rank: int) -> None:
        super().__init__()
        factory: dict[str, Any] = {"dtype": dense.weight.dtype, "device": dense.weight.device}
        self.in_channels, self.out_channels, self.rank = dense.in_channels, dense.out_channels, rank
        copy_geometry(dense, self)
        kind = type(dense)
        self.down = unfilled(
            kind,
            dense.in_channels,
            dense.groups * rank,
            dense.kernel_size,
            stride=dense.stride,
            padding=dense.padding,
            dilation=dense.dilation,
            groups=dense.groups,
            padding_mode=dense.padding_mode,
            bias=False,
            **factory,
        )
        self.up = unfilled(
            kind,
            dense.groups * rank,
            dense.out_channels,
            1,
            groups=dense.groups,
            bias=dense.bias is not None,
            **factory,
        )
        self.register_buffer("weight", torch.empty(MARKERS["convolution"], **factory))

    def extra_repr(self) -> str:
        groups = "" if self.groups == 1 else f", groups={self.groups}"
        return f"in_channels={self.in_channels}, out_channels={self.out_channels}, rank={self.rank}{groups}"


class LowRankTransposedConvolution(nn.Module):
    """The channel pair of a transposed convolution: a `1 x 1` one to r channels, then one with the dense one's kernel
    and bias."""

    weight: Tensor

    def __init__(self, dense: TransposedConvolution, rank: int) -> None:
        super().__init__()
        factory: dict[str, Any] = {"dtype": dense.weight.dtype, "device": dense.weight.device}
        self.in_channels, self.out_channels, self.rank = dense.in_channels, dense.out_channels, rank
        copy_geometry(dense, self)
        self.output_padding = dense.output_padding
        kind = type(dense)
        self.down = unfilled(kind, dense.in_channels, rank, 1, bias=False, **factory)
        self.up = unfilled(
            kind,
            rank,
            dense.out_channels,
            dense.kernel_size,
            stride=dense.stride,
            padding=dense.padding,
            output_padding=dense.output_padding,
            dilation=dense.dilation,
            bias=dense.bias is not None,
            **factory,
        )
        self.register_buffer("weight", torch.empty(MARKERS["transposed convolution"], **factory))

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return self.up(self.down(input), output_size)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, out_channels={self.out_channels}, rank={self.rank}"


def channel_layer(dense: nn.Module, rank: int) -> nn.Module:
    """An unfilled channel pair in place of a convolution without groups, transposed or not; else ValueError."""
    if not isinstance(dense, Convolution | TransposedConvolution):
        raise ValueError(f"{type(dense).__name__} is not a convolution")
    if dense.groups > 1:
        raise ValueError(f"the convolution has {dense.groups} groups")
    if isinstance(dense, TransposedConvolution):
        return LowRankTransposedConvolution(dense, rank)
    return LowRankConvolution(dense, rank)


@dataclass(frozen=True, kw_only=True)
class ChannelForm(PairForm):
    """`r (d_out + c k_h k_w)` numbers; of a transposed convolution `r (d_out k_h k_w + c)`."""

    name: str = "channel"
    build: Callable[..., nn.Module] = channel_layer
    classes: tuple[type[nn.Module], ...] = (LowRankConvolution, LowRankTransposedConvolution)

    def takes(self, weight: DenseWeight) -> bool:
        return len(weight.tensor_shape) > 2 and weight.kind not in ("embedding", "grouped convolution")

    def infos(self, weight: DenseWeight, rank: int, dtype: torch.dtype) -> list[TensorInfo]:
        first, second, *kernel = weight.tensor_shape
        pointwise = tuple(1 for _ in kernel)
        down, up = (rank, second, *kernel), (first, rank, *pointwise)
        if weight.kind == "transposed convolution":
            down, up = (first, rank, *pointwise), (rank, second, *kernel)
        return [TensorInfo("down.weight", down, dtype), TensorInfo("up.weight", up, dtype)]

    def recognizes(self, kind: Kind, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        down, up = shapes["down.weight"], shapes["up.weight"]
        return (
            len(down) > 2 and kind != "grouped convolution" and (kind != "convolution" or max(up[2:], default=1) == 1)
        )

    def read(self, kind: Kind, shapes: Mapping[str, tuple[int, ...]]) -> StoredPairShape | None:
        down, up = shapes["down.weight"], shapes["up.weight"]
        if len(down) != len(up) or min(down) < 1:
            return None
        if kind == "transposed convolution":
            return StoredPairShape(up[0], (down[0], *up[1:])) if down[1] == up[0] else None
        return StoredPairShape(down[0], (up[0], *down[1:])) if up[1] == down[0] else None

    def stored(self, weight: DenseWeight, pair: MatrixPair, dtype: torch.dtype) -> dict[str, Tensor]:
        assert isinstance(pair, FactorPair)
        even = balanced(pair, dtype)
        down, up = even.down.to(dtype), even.up.to(dtype)
        if weight.kind == "transposed convolution":
            down, up = down.T, up.T
        shapes = [info.shape for info in self.infos(weight, pair.rank, dtype)]
        return {"down.weight": down.reshape(shapes[0]), "up.weight": up.reshape(shapes[1])}

    def product(self, weight: DenseWeight, tensors: Mapping[str, Tensor]) -> Tensor:
        down, up = tensors["down.weight"].flatten(1), tensors["up.weight"].flatten(1)
        return up.T @ down.T if weight.kind == "transposed convolution" else up @ down

    def merged(self, kind: Kind, tensors: Mapping[str, Tensor]) -> FactorPair:
        down, up = tensors["down.weight"], tensors["up.weight"]
        if kind == "transposed convolution":  # its own tensor is their product in the other order
            down, up = up, down
        return FactorPair(up=up, down=down)


CHANNEL = ChannelForm()
