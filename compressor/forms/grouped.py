"""Grouped pairs: of a grouped convolution one channel pair a group, all of the same rank r.

For a convolution of c channels in g groups `X.down.weight` is `(g r) x (c / g) x kernel` and `X.up.weight` is
`d_out x r x 1 ..`, both of convolutions with g groups.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compressor.factorize import (
    Decomposition,
    FactorizationSettings,
    FactorPair,
    GroupedMetric,
    GroupedPair,
    Metric,
    TiedMetric,
    balanced,
    grouped_truncated_svd,
)
from compressor.forms.channel import LowRankConvolution
from compressor.forms.kernels import convolution
from compressor.forms.layers import Convolution
from compressor.forms.pair_form import MatrixPair, PairForm, StoredPairShape
from compressor.forms.weights import Count, DenseWeight
from compressor.io import TensorInfo
from compressor.latency import Kernel, LayerUse, ModuleCall, Size
from compressor.network import Kind


def grouped_layer(dense: nn.Module, rank: int) -> nn.Module:
    """An unfilled grouped pair in place of a convolution with groups that is not transposed; else ValueError."""
    if not isinstance(dense, Convolution):
        raise ValueError(f"{type(dense).__name__} is not a convolution")
    if dense.groups == 1:
        raise ValueError("the convolution has no groups")
    return LowRankConvolution(dense, rank)


@dataclass(frozen=True, kw_only=True)
class GroupedForm(PairForm):
    """`r (d_out + c k_h k_w)` numbers, where the dense layer has `d_out c k_h k_w / g`."""

    name: str = "grouped"
    build: Callable[..., nn.Module] = grouped_layer
    classes: tuple[type[nn.Module], ...] = (LowRankConvolution,)

    def takes(self, weight: DenseWeight) -> bool:
        return weight.kind == "grouped convolution"

    def sides(self, weight: DenseWeight) -> tuple[int, int]:
        d_out, d_in = weight.shape
        return d_out // weight.groups, d_in

    def parameters(self, weight: DenseWeight, rank: Count) -> Count:
        return rank * (weight.groups * sum(self.sides(weight)))

    def kernels(self, weight: DenseWeight, rank: Size, use: LayerUse, *, itemsize: int) -> list[Kernel]:
        d_out, channels, *sides = weight.tensor_shape
        groups, point = weight.groups, tuple(1 for _ in sides)
        between, size_out = groups * rank, use.out_size
        down = convolution(
            use, tuple(sides), (groups * channels, between), sizes=(use.in_size, size_out), itemsize=itemsize
        )
        up = convolution(use, point, (between, d_out), sizes=(size_out, size_out), itemsize=itemsize)
        return [ModuleCall(itemsize=itemsize), *(replace(each, groups=groups) for each in (down, up))]

    def infos(self, weight: DenseWeight, rank: int, dtype: torch.dtype) -> list[TensorInfo]:
        d_out, channels, *kernel = weight.tensor_shape
        return [
            TensorInfo("down.weight", (weight.groups * rank, channels, *kernel), dtype),
            TensorInfo("up.weight", (d_out, rank, *(1 for _ in kernel)), dtype),
        ]

    def recognizes(self, kind: Kind, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return kind == "grouped convolution"

    def read(self, kind: Kind, shapes: Mapping[str, tuple[int, ...]]) -> StoredPairShape | None:
        down, up = shapes["down.weight"], shapes["up.weight"]
        if len(down) != len(up) or len(down) < 3 or min(*down, *up) < 1 or max(up[2:]) > 1:
            return None
        groups, left = divmod(down[0], up[1])
        if left or groups < 2 or up[0] % groups:
            return None
        return StoredPairShape(up[1], (up[0], *down[1:]), groups)

    def approximate(
        self,
        weight: DenseWeight,
        matrix: Tensor,
        rank: int,
        *,
        metric: Metric | TiedMetric | None,
        settings: FactorizationSettings,
        decomposition: Decomposition | None = None,
    ) -> GroupedPair:
        assert metric is None or isinstance(metric, GroupedMetric)
        return grouped_truncated_svd(matrix, rank, weight.groups, metric=metric, decomposition=decomposition)

    def stored(self, weight: DenseWeight, pair: MatrixPair, dtype: torch.dtype) -> dict[str, Tensor]:
        assert isinstance(pair, GroupedPair)
        even = [balanced(each, dtype) for each in pair.pairs]
        down, up = self.infos(weight, pair.rank, dtype)
        return {
            down.name: torch.cat([each.down for each in even]).to(dtype).reshape(down.shape),
            up.name: torch.cat([each.up for each in even]).to(dtype).reshape(up.shape),
        }

    def product(self, weight: DenseWeight, tensors: Mapping[str, Tensor]) -> Tensor:
        down, up = tensors["down.weight"].flatten(1), tensors["up.weight"].flatten(1)
        rank, (rows, columns) = up.shape[1], self.sides(weight)
        return (up.view(-1, rows, rank) @ down.view(-1, rank, columns)).flatten(0, 1)

    def merged(self, kind: Kind, tensors: Mapping[str, Tensor]) -> FactorPair:
        raise NotImplementedError("models with grouped convolutions are not merged")


GROUPED = GroupedForm()
