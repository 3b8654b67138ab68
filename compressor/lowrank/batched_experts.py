"""Experts of a block that run in batched products: their matrices, or the pairs of one rank, stacked for all of them.

`batched.X` is a layer of one weight of `(E, d_out, d_in)`, or a pair of two, `batched.X.down.weight` of `(E, r, d_in)`
and `batched.X.up.weight` of `(E, d_out, r)`, for the layer `X` of each expert. In a file they are called so too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compressor.forms import MARKERS, PLAIN, LowRankLinear
from compressor.lowrank.modules import low_rank_layer, put_layer
from compressor.network import SeparateExperts
from compressor.network.experts import SeparateSortedExperts, sorted_by_expert, without_weights


class BatchedLinear(nn.Module):
    """A linear layer for each expert: `weight` of `(E, d_out, d_in)` and `bias` of `(E, d_out)` or None."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    @classmethod
    def of(cls, layers: Sequence[nn.Module]) -> BatchedLinear:
        """A copy of the weights of some layers of one shape."""
        weight, bias = (_stacked([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
        assert weight is not None
        return cls(weight, bias)

    def forward(self, x: Tensor, counts: Sequence[int] | None) -> Tensor:
        """`x` has the rows of one expert after the other, so many of each; without counts `(E, rows, d_in)`."""
        if counts is None:
            product = torch.bmm(x, self.weight.transpose(1, 2))
            return product if self.bias is None else product + self.bias[:, None]
        product = _grouped_product(x, self.weight, counts)
        if self.bias is None:
            return product
        rows = torch.tensor(counts, device=x.device)
        return product + self.bias.repeat_interleave(rows, dim=0, output_size=len(x))

    def extra_repr(self) -> str:
        count, d_out, d_in = self.weight.shape
        return f"experts={count}, in_features={d_in}, out_features={d_out}"


class BatchedPair(nn.Module):
    """A plain pair for each expert, all of one rank."""

    def __init__(self, down: BatchedLinear, up: BatchedLinear) -> None:
        super().__init__()
        self.down, self.up = down, up

    def forward(self, x: Tensor, counts: Sequence[int] | None) -> Tensor:
        return self.up(self.down(x, counts), counts)  # type: ignore[no-any-return]


def _stacked(tensors: Sequence[Tensor | None]) -> nn.Parameter | None:
    there = [tensor for tensor in tensors if tensor is not None]
    if not there:
        return None
    return nn.Parameter(torch.stack([tensor.detach() for tensor in there]), there[0].requires_grad)


def _grouped_product(x: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
    """`x @ weight[e].T` for the rows of each expert, in one product where there is a kernel for that."""
    aligned = all(side * x.dtype.itemsize % 16 == 0 for side in weight.shape[1:])
    known = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}.get(x.device.type, ())
    grouped: Any = getattr(nn.functional, "grouped_mm", None)
    if grouped is not None and aligned and x.dtype in known and x.dtype == weight.dtype and len(x):
        ends = torch.tensor(counts, device=x.device).cumsum(0, dtype=torch.int32)
        return grouped(x, weight.transpose(1, 2), offs=ends)  # type: ignore[no-any-return]
    parts = zip(torch.split(x, list(counts)), weight, strict=True)
    return torch.cat([nn.functional.linear(rows, each) for rows, each in parts])


class BatchedExperts(nn.Module):
    """The experts of one block, in the place of `SeparateExperts`, with the same inputs."""

    def __init__(self, experts: SeparateExperts) -> None:
        super().__init__()
        self.layout, self.config = experts.layout, experts.config
        vars(self)["without_weights"] = experts.without_weights
        # In a module of their own: transformers knows parameters of the same names, which it renames in files.
        self.batched = nn.ModuleDict(
            {name: _batched([each.get_submodule(name) for each in experts.experts]) for name in self.layout.names}
        )
        self.gating = experts.experts[0].gating
        self.train(experts.training)

    def _outputs(self, x: Tensor, counts: Sequence[int] | None) -> Tensor:
        gate, up, down = (self.batched[name] for name in self.layout.names)
        return down(self.gating(gate(x, counts), up(x, counts)), counts)  # type: ignore[no-any-return]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        order, counts = sorted_by_expert(top_k_index, self.layout.count)
        tokens = order // top_k_index.shape[-1]
        output = self._outputs(hidden_states[tokens], counts)
        weighted = (output * top_k_weights.flatten()[order, None]).to(hidden_states.dtype)
        return torch.zeros_like(hidden_states).index_add_(0, tokens, weighted)

    def separate(self) -> SeparateExperts:
        """The same experts by themselves, whose weights are views of these."""
        count = self.layout.count
        shell = vars(self)["without_weights"]
        kind = SeparateSortedExperts if self.layout.sorted_inputs else SeparateExperts
        experts = kind(_with_meta_weights(self, shell), self.layout)
        for name in self.layout.names:
            layer = self.batched[name]
            for number in range(count):
                place = f"{number}.{name}"
                dense = experts.get_submodule(place)
                if isinstance(layer, BatchedPair):
                    rank = layer.down.weight.shape[1]
                    own = low_rank_layer(dense, PLAIN.name, rank)
                    assert isinstance(own, LowRankLinear)
                    _view(own.down, layer.down, number)
                    _view(own.up, layer.up, number)
                    own.weight = layer.down.weight.new_empty(MARKERS["linear"])
                    put_layer(experts, place, own)
                else:
                    assert isinstance(layer, BatchedLinear)
                    _view(dense, layer, number)
        return experts.train(self.training)


class BatchedSortedExperts(BatchedExperts):
    """The experts of one block that are given all tokens each, one expert after the other, as in Llama 4."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        x = hidden_states.view(self.layout.count, -1, hidden_states.shape[-1])
        return self._outputs(x, None).view_as(hidden_states)


def _batched(layers: Sequence[nn.Module]) -> nn.Module:
    if isinstance(layers[0], LowRankLinear):
        pairs = [layer for layer in layers if isinstance(layer, LowRankLinear)]
        down, up = (BatchedLinear.of(each) for each in zip(*((pair.down, pair.up) for pair in pairs), strict=True))
        return BatchedPair(down, up)
    return BatchedLinear.of(layers)


def _view(layer: nn.Module, batched: BatchedLinear, number: int) -> None:
    layer.weight = nn.Parameter(batched.weight.detach()[number], batched.weight.requires_grad)
    if batched.bias is not None:
        layer.bias = nn.Parameter(batched.bias.detach()[number], batched.bias.requires_grad)


def _with_meta_weights(experts: BatchedExperts, shell: nn.Module) -> nn.Module:
    """Transformers' own experts with weights of the right shapes on the meta device."""
    fused = without_weights(shell)
    sides = {}
    for name in experts.layout.names:
        layer: Any = experts.batched[name]
        up, down = (layer.up, layer.down) if isinstance(layer, BatchedPair) else (layer, layer)
        sides[name] = (up.weight.shape[1], down.weight.shape[2])
        dtype = up.weight.dtype
    for stack, name in zip(experts.layout.stacks(""), experts.layout.parameters, strict=True):
        d_out, d_in = sides[stack.members[0]]
        parts = dict.fromkeys(stack.names(), (d_out, d_in) if stack.of == "weight" else (d_out,))
        shape = stack.shape(parts)
        assert shape is not None
        fused.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")))
    return fused


def batch_experts(model: nn.Module, places: Sequence[str]) -> None:
    """Put batched experts in the places of separate ones."""
    for place in places:
        experts = model.get_submodule(place)
        assert isinstance(experts, SeparateExperts)
        kind = BatchedSortedExperts if isinstance(experts, SeparateSortedExperts) else BatchedExperts
        put_layer(model, place, kind(experts))


def separate_batched(model: nn.Module) -> nn.Module:
    """Put separate experts in the places of batched ones, in place."""
    for place, experts in list(model.named_modules()):
        if isinstance(experts, BatchedExperts):
            put_layer(model, place, experts.separate())
    return model
