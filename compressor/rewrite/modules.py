"""Low-rank layers as torch modules: each a pair of ordinary layers, `down` and `up`, in place of a dense one.

Every one registers a persistent zero-size buffer `weight`. A loader that expects the dense layer then meets a shape
mismatch and stops, instead of filling the layer with random numbers; and code that asks for `weight.dtype` or
`weight.device` goes on working.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compressor.planning.form import Form

_CONVOLUTIONS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.Conv1d,
    nn.Conv2d: nn.Conv2d,
    nn.Conv3d: nn.Conv3d,
}


def _unfilled(kind: type[nn.Module], *arguments: Any, device: torch.device, **keywords: Any) -> nn.Module:
    """A module whose parameters have memory but no values yet."""
    return kind(*arguments, device="meta", **keywords).to_empty(device=device)


class LowRankLinear(nn.Module):
    """A plain pair: `y = up(down(x))`, with `down` of `r x d_in` and `up` of `d_out x r` and the bias."""

    weight: Tensor

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool, like: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        factory: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self.down = _unfilled(nn.Linear, in_features, rank, bias=False, **factory)
        self.up = _unfilled(nn.Linear, rank, out_features, bias=bias, **factory)
        self.register_buffer("weight", torch.empty(0, **factory))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class PivotedLinear(nn.Module):
    """A pivoted pair: r rows of the matrix (`down`) and the other rows' coefficients in them (`up`), put in `order`."""

    weight: Tensor
    order: Tensor

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool, like: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        factory: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self.down = _unfilled(nn.Linear, in_features, rank, bias=False, **factory)
        self.up = _unfilled(nn.Linear, rank, out_features - rank, bias=False, **factory)
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.register_buffer("order", torch.empty(out_features, dtype=torch.int32, device=like.device))
        self.register_buffer("weight", torch.empty(0, **factory))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.down(x)
        y = torch.cat([rows, self.up(rows)], dim=-1).index_select(-1, self.order)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class LowRankConvolution(nn.Module):
    """A channel pair: a convolution to r channels with the dense one's kernel, then a 1 x 1 convolution with its
    bias."""

    weight: Tensor

    def __init__(self, dense: nn.Conv1d | nn.Conv2d | nn.Conv3d, rank: int) -> None:
        super().__init__()
        factory: dict[str, Any] = {"dtype": dense.weight.dtype, "device": dense.weight.device}
        self.in_channels, self.out_channels, self.rank = dense.in_channels, dense.out_channels, rank
        kind = _CONVOLUTIONS[type(dense)]
        self.down = _unfilled(
            kind,
            dense.in_channels,
            rank,
            dense.kernel_size,
            stride=dense.stride,
            padding=dense.padding,
            dilation=dense.dilation,
            padding_mode=dense.padding_mode,
            bias=False,
            **factory,
        )
        self.up = _unfilled(kind, rank, dense.out_channels, 1, bias=dense.bias is not None, **factory)
        self.register_buffer("weight", torch.empty(0, **factory))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, out_channels={self.out_channels}, rank={self.rank}"


class SpatialConvolution(nn.Module):
    """A spatial pair: a `k_h x 1` convolution to r channels, then a `1 x k_w` one with the bias.

    Each takes its own axis of the dense one's stride, padding and dilation, and both its padding mode. The first works
    on the columns one by one, so whether these are padded before or after it is the same in every mode.
    """

    weight: Tensor

    def __init__(self, dense: nn.Conv2d, rank: int) -> None:
        super().__init__()
        factory: dict[str, Any] = {"dtype": dense.weight.dtype, "device": dense.weight.device}
        self.in_channels, self.out_channels, self.rank = dense.in_channels, dense.out_channels, rank
        padding, mode = dense.padding, dense.padding_mode
        vertical, horizontal = (padding, padding) if isinstance(padding, str) else ((padding[0], 0), (0, padding[1]))
        self.down = _unfilled(
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
        self.up = _unfilled(
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
        self.register_buffer("weight", torch.empty(0, **factory))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, out_channels={self.out_channels}, rank={self.rank}"


def low_rank_layer(dense: nn.Module, form: Form, rank: int) -> nn.Module:
    """An unfilled low-rank layer in place of a linear layer, a transformers `Conv1D` or a convolution.

    On the dense layer's device, in its dtype, with its training flag and `requires_grad`. ValueError for other layers,
    and for a spatial pair of anything but a two-dimensional convolution.
    """
    layer: nn.Module
    if form == "spatial":
        if not isinstance(dense, nn.Conv2d):
            raise ValueError(f"{type(dense).__name__} is not a two-dimensional convolution")
        layer = SpatialConvolution(dense, rank)
    elif isinstance(dense, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        layer = LowRankConvolution(dense, rank)
    else:
        weight = dense.weight
        assert isinstance(weight, Tensor)
        if isinstance(dense, nn.Linear):
            sides = (dense.in_features, dense.out_features)
        elif type(dense).__name__ == "Conv1D":
            sides = (weight.shape[0], weight.shape[1])
        else:
            raise ValueError(f"{type(dense).__name__} is not a layer that can be factorized")
        kind = PivotedLinear if form == "pivoted" else LowRankLinear
        has_bias = getattr(dense, "bias", None) is not None
        layer = kind(*sides, rank, bias=has_bias, like=weight)
    layer.train(dense.training)
    trainable = any(parameter.requires_grad for parameter in dense.parameters())
    return layer.requires_grad_(trainable)


def put_layer(root: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """Put a layer in the place `name` of a module tree, and return the tree.

    The tree itself is changed, unless the root is the layer. AttributeError when there is no such place.
    """
    if not name:
        return layer
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, layer)
    return root
