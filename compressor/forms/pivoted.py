"""Pivoted pairs: r rows of a matrix, and the coefficients of the other rows in them.

`X.down.weight` is `r x d_in`, `X.up.weight` is `(d_out - r) x r`, and `X.order` of `d_out` int32 says where each row is
found. The bias stays `X.bias`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from compressor.factorize import FactorPair, PivotedPair, pivoted_pair
from compressor.forms.kernels import dense_kernels, products
from compressor.forms.layers import MARKERS, in_order, linear_sides, unfilled
from compressor.forms.pair_form import MatrixPair, PairForm, StoredPairShape, Values
from compressor.forms.plain import PLAIN
from compressor.forms.weights import Count, DenseWeight
from compressor.io import TensorInfo
from compressor.latency import Kernel, LayerUse, ModuleCall, Movement, Size
from compressor.network import Kind


class PivotedLinear(nn.Module):
    """A pivoted pair: r rows of the matrix (`down`) and the other rows' coefficients in them (`up`), put in `order`."""

    weight: Tensor
    order: Tensor

    def __init__(
        self, in_features: int, out_features: int, rank: int, *, bias: bool, like: Tensor, kind: str = "linear"
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        factory: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self.down = unfilled(nn.Linear, in_features, rank, bias=False, **factory)
        self.up = unfilled(nn.Linear, rank, out_features - rank, bias=False, **factory)
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        self.register_buffer("order", torch.empty(out_features, dtype=torch.int32, device=like.device))
        self.register_buffer("weight", torch.empty(MARKERS[kind], **factory))

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            rows = self.down(input)
            y = torch.cat([rows, self.up(rows)], dim=-1).index_select(-1, self.order)
        else:
            parts = self._modules  # looked up in half the time of `self.down`
            y = in_order(input, parts["down"], parts["up"], order=self._buffers["order"])  # type: ignore[arg-type]
        bias = self.bias
        return y if bias is None else y + bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def pivoted_layer(dense: nn.Module, rank: int) -> nn.Module:
    """An unfilled pivoted pair in place of a linear layer or a transformers `Conv1D`; else ValueError."""
    kind, d_in, d_out = linear_sides(dense)
    has_bias, weight = getattr(dense, "bias", None) is not None, dense.weight
    assert isinstance(weight, Tensor)
    return PivotedLinear(d_in, d_out, rank, bias=has_bias, like=weight, kind=kind)


@dataclass(frozen=True, kw_only=True)
class PivotedForm(PairForm):
    """`r (d_out + d_in - r)` numbers and the order, whose int32 count as two numbers of 16 bits each."""

    name: str = "pivoted"
    names: tuple[str, ...] = ("down.weight", "up.weight", "order")
    bias: str = "bias"
    build: Callable[..., nn.Module] = pivoted_layer
    classes: tuple[type[nn.Module], ...] = (PivotedLinear,)

    @property
    def compared(self) -> PairForm:
        return PLAIN

    def takes(self, weight: DenseWeight) -> bool:
        return len(weight.tensor_shape) == 2 and weight.kind != "embedding"

    def parameters(self, weight: DenseWeight, rank: Count) -> Count:
        d_out, d_in = weight.shape
        return rank * (d_out + d_in - rank) + 2 * d_out

    def numbers(self, weight: DenseWeight, rank: int) -> int:
        return self.parameters(weight, rank) - weight.shape[0]

    def nbytes(self, weight: DenseWeight, rank: Count, itemsize: int) -> Count:
        order = 2 * weight.shape[0]
        return (self.parameters(weight, rank) - order) * itemsize + order * 2

    def kernels(self, weight: DenseWeight, rank: Size, use: LayerUse, *, itemsize: int) -> list[Kernel]:
        d_out, d_in = weight.shape
        if weight.kind == "parameter":
            product = products(d_out - rank, (rank, d_in), itemsize=itemsize)
            copied = Movement(how="copy", rows=d_out, columns=d_in, itemsize=itemsize)
            put = [copied, replace(copied, how="lookup")]
            return [*product, *put, *dense_kernels(weight, use, itemsize=itemsize)]
        factors = products(use.rows, (d_in, rank, d_out - rank), itemsize=itemsize)
        copied = Movement(how="copy", rows=use.rows, columns=d_out, itemsize=itemsize)
        bias = [replace(copied, how="add")] if use.bias else []
        # What it asks before it puts columns in order takes as long as the call of a module.
        calls = [ModuleCall(itemsize=itemsize)] * 2
        return [*calls, *factors, copied, replace(copied, how="order"), *bias]

    def infos(self, weight: DenseWeight, rank: int, dtype: torch.dtype) -> list[TensorInfo]:
        d_out, d_in = weight.shape
        return [
            TensorInfo("down.weight", (rank, d_in), dtype),
            TensorInfo("up.weight", (d_out - rank, rank), dtype),
            TensorInfo("order", (d_out,), torch.int32),
        ]

    def recognizes(self, kind: Kind, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return True

    def read(self, kind: Kind, shapes: Mapping[str, tuple[int, ...]]) -> StoredPairShape | None:
        down, up, order = shapes["down.weight"], shapes["up.weight"], shapes["order"]
        fits = len(down) == len(up) == 2 and up[1] == down[0] and min(down) > 0 and order == (up[0] + down[0],)
        if not fits or kind == "embedding":
            return None
        return StoredPairShape(down[0], (down[1], *order) if kind == "transposed linear" else (*order, down[1]))

    def stored(self, weight: DenseWeight, pair: MatrixPair, dtype: torch.dtype) -> dict[str, Tensor]:
        assert isinstance(pair, FactorPair)
        pivoted = pivoted_pair(pair)
        return {"down.weight": pivoted.down.to(dtype), "up.weight": pivoted.up.to(dtype), "order": pivoted.order}

    def product(self, weight: DenseWeight, tensors: Mapping[str, Tensor]) -> Tensor:
        down, up = tensors["down.weight"], tensors["up.weight"]
        return torch.cat([down, up @ down]).index_select(0, tensors["order"])

    def defect(self, rank: int, read: Values) -> str | None:
        order = read("order").long()
        if torch.equal(order.sort().values, torch.arange(order.numel(), device=order.device)):
            return None
        return "order is not an order of rows"

    def merged(self, kind: Kind, tensors: Mapping[str, Tensor]) -> PivotedPair:
        return PivotedPair(up=tensors["up.weight"], down=tensors["down.weight"], order=tensors["order"].int())


PIVOTED = PivotedForm()
