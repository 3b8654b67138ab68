"""Separate the experts of transformers' mixtures: one linear layer per matrix, as in the file.

In memory, transformers keeps the matrices of all experts of a block in two parameters of three dimensions. Separated,
each is a layer like any other: with a rank of its own, and visible to calibration, adapters and quantization.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from compressor.network.conversions import merged_experts, name_conversions


class Expert(nn.Module):
    """One expert: `y = down(act(gate(x)) * up(x))`, with its layers under their names in the file."""

    def __init__(self, names: Sequence[str], *, gate: Tensor, up: Tensor, down: Tensor, activation: nn.Module) -> None:
        super().__init__()
        self.names = tuple(names)
        for name, weight in zip(self.names, (gate, up, down), strict=True):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(weight.detach(), weight.requires_grad)
            self.add_module(name, layer)
        self.act_fn = activation

    @property
    def layers(self) -> list[nn.Module]:
        """Gate, up and down, dense or low-rank."""
        return [self.get_submodule(name) for name in self.names]

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.layers
        return down(self.act_fn(gate(x)) * up(x))  # type: ignore[no-any-return]


class SeparateExperts(nn.Module):
    """The experts of one block, each applied to the tokens that are routed to it.

    Replaces transformers' experts, shares their weights and takes their inputs: hidden states of `(tokens, d)`, and for
    each token the indices and weights of its experts, both of `(tokens, k)`.
    """

    def __init__(self, fused: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.config, self.kind = fused.config, type(fused)
        for index, (gate_up, down) in enumerate(zip(fused.gate_up_proj, fused.down_proj, strict=True)):
            gate, up = gate_up.chunk(2)
            self.add_module(str(index), Expert(names, gate=gate, up=up, down=down, activation=fused.act_fn))
        self.train(fused.training)

    @property
    def layers(self) -> list[list[nn.Module]]:
        """Gate, up and down of every expert."""
        return [expert.layers for expert in self.children() if isinstance(expert, Expert)]

    @property
    def dense(self) -> bool:
        """Whether no layer of any expert was replaced."""
        return all(type(layer) is nn.Linear for layer in chain.from_iterable(self.layers))

    @property
    def unfilled(self) -> bool:
        """Whether weights are not in memory."""
        return any(parameter.is_meta for parameter in self.parameters())

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden_states)
        experts = [expert for expert in self.children() if isinstance(expert, Expert)]
        chosen, choices = top_k_index.flatten(), top_k_index.shape[-1]
        # An accelerator waits once, for how many tokens each expert has.
        counts = (chosen[:, None] == torch.arange(len(experts), device=chosen.device)).sum(0).tolist()
        for expert, own in zip(experts, torch.split(chosen.argsort(stable=True), counts), strict=True):
            if not len(own):
                continue
            tokens = own // choices
            output = expert(hidden_states[tokens])
            result.index_add_(0, tokens, (output * top_k_weights.flatten()[own, None]).to(result.dtype))
        return result

    def fused(self) -> nn.Module:
        """Transformers' own experts with a copy of these weights; only for experts that are `dense`."""
        with torch.device("meta"):
            experts: nn.Module = self.kind(self.config)
        weights = [[layer.get_parameter("weight") for layer in layers] for layers in self.layers]
        trained = any(weight.requires_grad for weight in chain.from_iterable(weights))
        gate_up = torch.stack([torch.cat([gate, up]) for gate, up, _ in weights]).detach()
        down = torch.stack([down for _, _, down in weights]).detach()
        experts.gate_up_proj, experts.down_proj = nn.Parameter(gate_up, trained), nn.Parameter(down, trained)
        return experts.train(self.training)


def separable_experts(model: nn.Module) -> dict[str, tuple[str, str, str]]:
    """Names of the fused experts in a transformers model that can be separated, each with its layers' names.

    Those are the experts that transformers assembles from one linear layer per matrix, without biases, and that compute
    what `Expert` does.
    """
    fused = {name: module for name, module in model.named_modules() if _is_fused(module)}
    if not fused or not hasattr(model, "base_model_prefix"):
        return {}
    merges = [found for conversion in name_conversions(model) if (found := merged_experts(conversion)) is not None]
    names: dict[str, tuple[str, str, str]] = {}
    for name in fused:
        layers = [
            next((each.layers for each in merges if f".{name}.{own}".endswith(each.parameter)), ())
            for own in ("gate_up_proj", "down_proj")
        ]
        if [len(each) for each in layers] == [2, 1]:
            names[name] = (*layers[0], *layers[1])  # type: ignore[assignment]
    return names


def _is_fused(module: nn.Module) -> bool:
    """Whether these are transformers' experts with a plain gate and weights of `(E, d_out, d_in)`."""
    plain = getattr(type(module), "_apply_gate", None)
    said = [getattr(module, name, None) for name in ("has_gate", "is_concatenated", "has_bias", "is_transposed")]
    weights = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    return (
        said == [True, True, False, False]
        and not getattr(module, "has_post_expert_norm", False)
        and getattr(plain, "__name__", None) == "_default_apply_gate"
        and all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in weights)
    )


def separate_experts(model: nn.Module) -> bool:
    """Separate the experts of a model where possible; return whether there were any."""
    found = separable_experts(model)
    for name, layers in found.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, SeparateExperts(model.get_submodule(name), layers))
    return bool(found)


def with_separate_experts(model: nn.Module) -> nn.Module:
    """A model with separate experts that shares all weights with `model`; `model` itself if there are none."""
    if not separable_experts(model):
        return model
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    apart = copy.deepcopy(model, shared)
    separate_experts(apart)
    return apart


def fuse_experts(model: nn.Module) -> nn.Module:
    """Fuse the experts of a model again, in place, unless a layer was replaced or is not in memory."""
    apart = {name: module for name, module in model.named_modules() if isinstance(module, SeparateExperts)}
    if all(experts.dense and not experts.unfilled for experts in apart.values()):
        for name, experts in apart.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, experts.fused())
    return model
