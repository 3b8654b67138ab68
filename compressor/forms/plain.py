"""Plain pairs: `W = up @ down`, of a matrix or of the table of an embedding.

`X.down.weight` is `r x d_in` and `X.up.weight` is `d_out x r`; for an embedding of d_in tokens `X.down.weight` is
`d_in x r`, itself an embedding.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.factorize import FactorPair, balanced
from compressor.forms.layers import (
    MARKERS,
    LayerPair,
    applied,
    is_lookup,
    linear_sides,
    lookup_scale,
    scaled,
    unfilled,
)
from compressor.forms.pair_form import MatrixPair, PairForm, StoredPairShape
from compressor.forms.weights import DenseWeight
from compressor.io import TensorInfo
from compressor.network import Kind


class LowRankLinear(LayerPair):
    """A plain pair: `y = up(down(x))`, with `down` of `r x d_in` and `up` of `d_out x r` and the bias."""

    def __init__(
        self, in_features: int, out_features: int, rank: int, *, bias: bool, like: Tensor, kind: str = "linear"
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        factory: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        self.down = unfilled(nn.Linear, in_features, rank, bias=False, **factory)
        self.up = unfilled(nn.Linear, rank, out_features, bias=bias, **factory)
        self.register_buffer("weight", torch.empty(MARKERS[kind], **factory))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class LowRankEmbedding(nn.Module):
    """The pair of an embedding: `y = up(down(token))`, with `down` of `tokens x r` and `up` of `d x r`.

    That of an embedding that scales what it looks up scales it too.
    """

    weight: Tensor

    def __init__(self, dense: nn.Embedding, rank: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.rank = dense.num_embeddings, dense.embedding_dim, rank
        self.padding_idx = dense.padding_idx
        self.scale, self.scale_rounds = lookup_scale(dense)
        factory: dict[str, Any] = {"dtype": dense.weight.dtype, "device": dense.weight.device}
        self.down = unfilled(
            nn.Embedding,
            dense.num_embeddings,
            rank,
            padding_idx=dense.padding_idx,
            scale_grad_by_freq=dense.scale_grad_by_freq,
            sparse=dense.sparse,
            **factory,
        )
        self.up = unfilled(nn.Linear, rank, dense.embedding_dim, bias=False, **factory)
        self.register_buffer("weight", torch.empty(MARKERS["embedding"], **factory))

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return scaled(self.up(self.down(input)), self.scale, self.scale_rounds)
        else:
            return scaled(applied(self.up, self.down(input)), self.scale, self.scale_rounds)

    def extra_repr(self) -> str:
        return f"num_embeddings={self.num_embeddings}, embedding_dim={self.embedding_dim}, rank={self.rank}"


def plain_layer(dense: nn.Module, rank: int) -> nn.Module:
    """An unfilled plain pair in place of a linear layer, a transformers `Conv1D`, or an embedding; else ValueError."""
    if isinstance(dense, nn.Embedding) and is_lookup(dense):
        return LowRankEmbedding(dense, rank)
    kind, d_in, d_out = linear_sides(dense)
    has_bias, weight = getattr(dense, "bias", None) is not None, dense.weight
    assert isinstance(weight, Tensor)
    return LowRankLinear(d_in, d_out, rank, bias=has_bias, like=weight, kind=kind)


@dataclass(frozen=True, kw_only=True)
class PlainForm(PairForm):
    """`r (d_out + d_in)` numbers. A head that is tied to an embedding has no tensors of its own."""

    name: str = "plain"
    build: Callable[..., nn.Module] = plain_layer
    classes: tuple[type[nn.Module], ...] = (LowRankLinear, LowRankEmbedding)

    def takes(self, weight: DenseWeight) -> bool:
        return len(weight.tensor_shape) == 2

    def infos(self, weight: DenseWeight, rank: int, dtype: torch.dtype) -> list[TensorInfo]:
        d_out, d_in = weight.shape
        down = (d_in, rank) if weight.kind == "embedding" else (rank, d_in)
        return [TensorInfo("down.weight", down, dtype), TensorInfo("up.weight", (d_out, rank), dtype)]

    def recognizes(self, kind: Kind, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        return len(shapes["down.weight"]) <= 2

    def read(self, kind: Kind, shapes: Mapping[str, tuple[int, ...]]) -> StoredPairShape | None:
        down, up = shapes["down.weight"], shapes["up.weight"]
        if kind == "embedding":
            down = down[::-1]
        if len(down) != 2 or len(up) != 2 or up[1] != down[0] or min(down) < 1:
            return None
        turned = kind in ("transposed linear", "embedding")
        return StoredPairShape(down[0], (down[1], up[0]) if turned else (up[0], down[1]))

    def stored(self, weight: DenseWeight, pair: MatrixPair, dtype: torch.dtype) -> dict[str, Tensor]:
        assert isinstance(pair, FactorPair)
        even = balanced(pair, dtype)
        down, up = even.down.to(dtype), even.up.to(dtype)
        return {"down.weight": down.T if weight.kind == "embedding" else down, "up.weight": up}

    def product(self, weight: DenseWeight, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.merged(weight.kind, tensors).product()

    def merged(self, kind: Kind, tensors: Mapping[str, Tensor]) -> FactorPair:
        down = tensors["down.weight"]
        return FactorPair(up=tensors["up.weight"], down=down.T if kind == "embedding" else down)


PLAIN = PlainForm()
