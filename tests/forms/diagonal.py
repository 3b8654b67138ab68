"""A form that the package does not have, `W = up @ diag(scale) @ down`: all that a new form takes is in this module."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.factorize import FactorPair
from compressor.forms.layers import MARKERS, linear_sides, unfilled
from compressor.forms.pair_form import MatrixPair, PairForm, StoredPairShape
from compressor.forms.weights import Count, DenseWeight
from compressor.io import TensorInfo
from compressor.network import Kind


class DiagonalLinear(nn.Module):
    """A pair with a diagonal: `y = up(scale ** power * down(x))`."""

    def __init__(self, dense: nn.Module, rank: int, power: int) -> None:
        super().__init__()
        kind, d_in, d_out = linear_sides(dense)
        factory = {"dtype": dense.weight.dtype, "device": dense.weight.device}
        self.down = unfilled(nn.Linear, d_in, rank, bias=False, **factory)
        self.up = unfilled(nn.Linear, rank, d_out, bias=getattr(dense, "bias", None) is not None, **factory)
        self.power, self.root = power, f"scale{power}"
        setattr(self, self.root, nn.Parameter(torch.empty(rank, **factory)))
        self.register_buffer("weight", torch.empty(MARKERS[kind], **factory))

    def forward(self, input: Tensor) -> Tensor:
        return self.up(getattr(self, self.root) ** self.power * self.down(input))


def diagonal_layer(dense: nn.Module, rank: int, power: int) -> nn.Module:
    """An unfilled pair with a diagonal in place of a linear layer or a transformers `Conv1D`; else ValueError."""
    return DiagonalLinear(dense, rank, power)


@dataclass(frozen=True, kw_only=True)
class DiagonalForm(PairForm):
    """`r (d_out + d_in + 1)` numbers, of which r are roots of the norms of the columns of `up`."""

    name: str = "diagonal"
    names: tuple[str, ...] = ("down.weight", "up.weight", "scale1")
    build: Callable[..., nn.Module] = diagonal_layer
    classes: tuple[type[nn.Module], ...] = (DiagonalLinear,)
    power: int = 1

    def takes(self, weight: DenseWeight) -> bool:
        return len(weight.tensor_shape) == 2 and weight.kind != "embedding"

    def parameters(self, weight: DenseWeight, rank: Count) -> Count:
        return rank * (sum(weight.shape) + 1)

    def infos(self, weight: DenseWeight, rank: int, dtype: torch.dtype) -> list[TensorInfo]:
        d_out, d_in = weight.shape
        shapes = ((rank, d_in), (d_out, rank), (rank,))
        return [TensorInfo(name, shape, dtype) for name, shape in zip(self.names, shapes, strict=True)]

    def recognizes(self, kind: Kind, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return True

    def read(self, kind: Kind, shapes: Mapping[str, tuple[int, ...]]) -> StoredPairShape | None:
        down, up, scale = (shapes[name] for name in self.names)
        if not len(down) == len(up) == 2 or not down[:1] == up[1:] == scale:
            return None
        sides = (up[0], down[1])
        return StoredPairShape(down[0], sides[::-1] if kind == "transposed linear" else sides)

    def stored(self, weight: DenseWeight, pair: MatrixPair, dtype: torch.dtype) -> dict[str, Tensor]:
        assert isinstance(pair, FactorPair)
        norms = pair.up.norm(dim=0)
        up = pair.up / norms.clamp(min=torch.finfo(torch.float64).tiny)
        values = (pair.down, up, norms ** (1 / self.power))
        return {name: value.to(dtype) for name, value in zip(self.names, values, strict=True)}

    def product(self, weight: DenseWeight, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.merged(weight.kind, tensors).product()

    def merged(self, kind: Kind, tensors: Mapping[str, Tensor]) -> FactorPair:
        down, up, root = (tensors[name] for name in self.names)
        return FactorPair(up=up * root**self.power, down=down)


DIAGONAL = DiagonalForm()
ROOT = DiagonalForm(name="root diagonal", names=("down.weight", "up.weight", "scale2"), power=2)
