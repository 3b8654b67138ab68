"""Separate the experts of transformers' mixtures: one linear layer per matrix.

In memory, transformers keeps the matrices of all experts of a block in two parameters of three dimensions, and some
models' files do too. Separated, each is a layer like any other: with a rank of its own, and visible to calibration,
adapters and quantization.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from compressor.io import Stack
from compressor.network.conversions import assembles, merged_experts, name_conversions
from compressor.network.embeddings import join_embeddings, same_table

# The parameters of fused experts: those that all have, and the biases that some have.
_WEIGHTS, _BIASES = ("gate_up_proj", "down_proj"), ("gate_up_proj_bias", "down_proj_bias")
# What the layers of an expert are called whose matrices no file has by themselves.
_NAMES = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ExpertLayout:
    """How the parameters of a module hold the matrices of its experts, and what the layers of each are called.

    The names are those of gate, up and down, and `count` is the number of experts. `sorted_inputs` says that the module
    is given the inputs of one expert after the other, as in Llama 4, and not the experts of each token, and
    `apart_in_files` that transformers writes one tensor a matrix.
    """

    count: int
    names: tuple[str, str, str] = _NAMES
    transposed: bool = False
    interleaved: bool = False
    biases: bool = False
    sorted_inputs: bool = False
    apart_in_files: bool = False

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the parameters."""
        return (*_WEIGHTS, *(_BIASES if self.biases else ()))

    def stack(self, parameter: str, *, tensor: str, stem: str) -> Stack:
        """The layers in one of the parameters, which is called `tensor`, with names that begin with `stem`."""
        together = parameter.startswith("gate_up")
        return Stack(
            tensor,
            stem,
            self.names[:2] if together else self.names[2:],
            self.count,
            "bias" if parameter.endswith("bias") else "weight",
            transposed=self.transposed and not parameter.endswith("bias"),
            interleaved=self.interleaved and together,
        )

    def stacks(self, place: str) -> list[Stack]:
        """All parameters of a module of this name."""
        return [self.stack(each, tensor=f"{place}.{each}", stem=place) for each in self.parameters]


class Gate(nn.Module):
    """What an expert makes of the outputs of its gate and up layers: what transformers' own module does."""

    def __init__(self, fused: nn.Module, *, interleaved: bool) -> None:
        super().__init__()
        self.interleaved, self.plain = interleaved, _has_plain_gate(type(fused))
        self.act_fn = getattr(fused, "act_fn", None)
        # Untracked: it has no weights.
        vars(self)["fused"] = fused

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.plain:
            return self.act_fn(gate) * up  # type: ignore[no-any-return, misc]
        together = torch.stack([gate, up], -1).flatten(-2) if self.interleaved else torch.cat([gate, up], -1)
        return self.fused._apply_gate(together)  # type: ignore[no-any-return, operator, union-attr]


class Expert(nn.Module):
    """One expert: `y = down(act(gate(x)) * up(x))`, or with a gate of its own."""

    def __init__(self, names: tuple[str, str, str], tensors: Mapping[str, nn.Parameter], gate: Gate) -> None:
        """`tensors` are the weights and biases by the names of the layers, `NAME.weight` and `NAME.bias`."""
        super().__init__()
        self.names = names
        for name in names:
            weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
            layer.weight, layer.bias = weight, bias  # type: ignore[assignment]
            self.add_module(name, layer)
        self.gating = gate

    @property
    def layers(self) -> list[nn.Module]:
        """Gate, up and down, dense or low-rank."""
        return [self.get_submodule(name) for name in self.names]

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.layers
        return down(self.gating(gate(x), up(x)))  # type: ignore[no-any-return]


class SeparateExperts(nn.Module):
    """The experts of one block, each applied to the tokens that are routed to it.

    Replaces transformers' experts, shares their weights and takes their inputs: hidden states of `(tokens, d)`, and for
    each token the indices and weights of its experts, both of `(tokens, k)`.
    """

    def __init__(self, fused: nn.Module, layout: ExpertLayout) -> None:
        super().__init__()
        self.layout, self.config = layout, getattr(fused, "config", None)
        # Untracked: it has no weights.
        vars(self)["without_weights"] = shell = without_weights(fused)
        parameters = {name: fused.get_parameter(name) for name in layout.parameters}
        tensors: dict[str, dict[str, nn.Parameter]] = {}
        for name, parameter in parameters.items():
            for part, view in layout.stack(name, tensor="", stem="").views(parameter.detach()).items():
                number, _, own = part.removeprefix(".").partition(".")
                tensors.setdefault(number, {})[own] = nn.Parameter(view, parameter.requires_grad)
        gate = Gate(shell, interleaved=layout.interleaved)
        for number, own_tensors in tensors.items():
            self.add_module(number, Expert(layout.names, own_tensors, gate))
        self.train(fused.training)

    @property
    def experts(self) -> list[Expert]:
        """The experts in order."""
        return [expert for expert in self.children() if isinstance(expert, Expert)]

    @property
    def layers(self) -> list[list[nn.Module]]:
        """Gate, up and down of every expert."""
        return [expert.layers for expert in self.experts]

    @property
    def dense(self) -> bool:
        """Whether no layer of any expert was replaced."""
        return all(type(layer) is nn.Linear for layer in chain.from_iterable(self.layers))

    @property
    def unfilled(self) -> bool:
        """Whether weights are not in memory."""
        return any(parameter.is_meta for parameter in self.parameters())

    def tokens(self, hidden_states: Tensor, top_k_index: Tensor, _: Tensor | None = None) -> list[Tensor]:
        """Which of the tokens each expert gets, in the order in which it gets them, of the arguments of `forward`."""
        return [torch.where(top_k_index == number)[0] for number in range(len(self.experts))]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden_states)
        experts, choices = self.experts, top_k_index.shape[-1]
        order, counts = sorted_by_expert(top_k_index, len(experts))
        for expert, own in zip(experts, torch.split(order, counts), strict=True):
            if not len(own):
                continue
            tokens = own // choices
            output = expert(hidden_states[tokens])
            result.index_add_(0, tokens, (output * top_k_weights.flatten()[own, None]).to(result.dtype))
        return result

    def fused(self) -> nn.Module:
        """Transformers' own experts with a copy of these weights; only for experts that are `dense`."""
        experts = without_weights(self.without_weights)  # type: ignore[arg-type]
        own = dict(self.named_parameters())
        trained = any(parameter.requires_grad for parameter in own.values())
        for name in self.layout.parameters:
            stack = self.layout.stack(name, tensor="", stem="")
            parts = {f".{each}": tensor.detach() for each, tensor in own.items()}
            shape = stack.shape({each: tuple(tensor.shape) for each, tensor in parts.items()})
            first = parts[stack.first]
            assert shape is not None
            whole = torch.empty(shape, dtype=first.dtype, device=first.device)
            for each, view in stack.views(whole).items():
                view.copy_(parts[each])
            experts.register_parameter(name, nn.Parameter(whole, trained))
        return experts.train(self.training)


class SeparateSortedExperts(SeparateExperts):
    """The experts of one block that are given all tokens each, one expert after the other, as in Llama 4.

    A token that is not routed to an expert is zero there, and its output is zero: it is left out.
    """

    def tokens(self, hidden_states: Tensor, *_: Any) -> list[Tensor]:
        routed = hidden_states.view(len(self.experts), -1, hidden_states.shape[-1]).any(-1)
        return [torch.where(own)[0] for own in routed]

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        x = hidden_states.view(len(self.experts), -1, hidden_states.shape[-1])
        result = torch.zeros_like(x)
        routed = x.any(-1)
        places = routed.flatten().nonzero().flatten()
        for expert, own in zip(self.experts, torch.split(places, routed.sum(1).tolist()), strict=True):
            if len(own):
                result.view(-1, x.shape[-1]).index_copy_(0, own, expert(hidden_states[own]).to(result.dtype))
        return result.view_as(hidden_states)


def sorted_by_expert(top_k_index: Tensor, experts: int) -> tuple[Tensor, list[int]]:
    """The choices of all tokens, flattened, in the order of the experts, and how many there are of each expert."""
    chosen = top_k_index.flatten()
    # An accelerator waits once, for all counts.
    counts = (chosen[:, None] == torch.arange(experts, device=chosen.device)).sum(0).tolist()
    return chosen.argsort(stable=True), counts


def without_weights(module: nn.Module) -> nn.Module:
    """A copy of a module that shares all but its parameters, which it does not have."""
    copied = module.__new__(type(module))
    copied.__dict__.update(module.__dict__ | {"_parameters": {}})
    return copied


def separable_experts(model: nn.Module) -> dict[str, ExpertLayout]:
    """How the fused experts in a transformers model that can be separated hold their matrices, by name.

    Their layers are called as in files of one tensor a matrix that transformers would read, if there are such.
    """
    fused = {name: layout for name, module in model.named_modules() if (layout := _layout(module)) is not None}
    if not fused or not hasattr(model, "base_model_prefix"):
        return {}
    conversions = name_conversions(model)
    merges = [found for conversion in conversions if (found := merged_experts(conversion)) is not None]
    layouts: dict[str, ExpertLayout] = {}
    for name, layout in fused.items():
        layers = [
            next((each.layers for each in merges if f".{name}.{own}".endswith(each.parameter)), ()) for own in _WEIGHTS
        ]
        if [len(each) for each in layers] == [2, 1]:
            layouts[name] = replace(layout, names=(*layers[0], *layers[1]), apart_in_files=True)  # type: ignore[arg-type]
        elif not any(assembles(each, f"{name}.{own}") for each in conversions for own in layout.parameters):
            layouts[name] = layout
    return layouts


def _layout(module: nn.Module) -> ExpertLayout | None:
    """How a module of transformers holds the matrices of experts that have a gate; None if it is no such module."""
    weights = [module._parameters.get(name) for name in _WEIGHTS]
    if any(weight is None or weight.dim() != 3 for weight in weights):
        return None
    if type(module).__name__ == "Llama4TextExperts":
        return ExpertLayout(len(weights[0]), transposed=True, sorted_inputs=True)  # type: ignore[arg-type]
    said = [getattr(module, name, None) for name in ("has_gate", "is_concatenated", "has_bias", "is_transposed")]
    if not all(type(each) is bool for each in said) or not said[0] or getattr(module, "has_post_expert_norm", False):
        return None
    layout = ExpertLayout(len(weights[0]), transposed=said[3], interleaved=not said[1], biases=said[2])  # type: ignore[arg-type]
    if set(module._parameters) != set(layout.parameters) or (layout.interleaved and _has_plain_gate(type(module))):
        return None
    return layout


def _has_plain_gate(experts: type[nn.Module]) -> bool:
    """Whether experts multiply what an activation function makes of the gate with the up layer's outputs."""
    own = getattr(experts, "_apply_gate", None)
    return own is None or own.__name__ == "_default_apply_gate"


def roles_of_experts(module: nn.Module) -> dict[str, str]:
    """The layers of separate experts by name, with what tells those of a block that do the same in every expert."""
    found: dict[str, str] = {}
    for place, experts in module.named_modules():
        if isinstance(experts, SeparateExperts):
            for number, expert in enumerate(experts.experts):
                found |= {f"{place}.{number}.{name}": f"{place}.*.{name}" for name in expert.names}
    return found


def separate_experts(model: nn.Module) -> bool:
    """Separate the experts of a model where possible; return whether there were any."""
    found = separable_experts(model)
    for name, layout in found.items():
        parent, _, child = name.rpartition(".")
        kind = SeparateSortedExperts if layout.sorted_inputs else SeparateExperts
        setattr(model.get_submodule(parent), child, kind(model.get_submodule(name), layout))
    return bool(found)


def with_separate_experts(model: nn.Module) -> nn.Module:
    """A model with separate experts, and with one module for embeddings that share a table; all weights are those of
    `model`. It is `model` itself if it has none of either."""
    if not separable_experts(model) and not same_table(model):
        return model
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    apart = copy.deepcopy(model, shared)
    separate_experts(apart)
    join_embeddings(apart)
    return apart


def fuse_experts(model: nn.Module) -> nn.Module:
    """Fuse the experts of a model again, in place, unless a layer was replaced or is not in memory."""
    apart = {name: module for name, module in model.named_modules() if isinstance(module, SeparateExperts)}
    if all(experts.dense and not experts.unfilled for experts in apart.values()):
        for name, experts in apart.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, experts.fused())
    return model
