"""Embeddings that do more than look rows up: those that scale what they find, and those that share one table."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

# What classes call their scale: as a number, and as a buffer of it.
_SCALE_AS_NUMBER, _SCALE = "scalar_embed_scale", "embed_scale"


def embedding_scale(module: nn.Module) -> float:
    """The factor that an embedding, dense or low-rank, multiplies the rows with that it looks up; 1 where it has none.

    Its class may do something else with it: `only_scales` finds that out.
    """
    for name in (_SCALE_AS_NUMBER, _SCALE):
        value = getattr(module, name, None)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
            return float(value)
    return 1.0


@torch.no_grad()
def only_scales(embedding: nn.Embedding, rows: int = 4) -> bool:
    """Whether an embedding of a class of its own looks rows up and multiplies them with its scale, and nothing else.

    It is tried on a small table in the place of its own: its code is run, as it is whenever the model is.
    """
    scale, beside = embedding_scale(embedding), {*embedding._buffers, *embedding._modules, *embedding._parameters}
    if embedding.max_norm is not None or not math.isfinite(scale) or scale == 0 or beside - {"weight", _SCALE}:
        return False
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(rows, embedding.embedding_dim, generator=generator, device="cpu", dtype=torch.float32)
    tried = copy.copy(embedding)
    tried.__dict__["_parameters"] = {"weight": nn.Parameter(table, requires_grad=False)}
    tried.__dict__["_buffers"] = {name: torch.tensor(scale, device="cpu") for name in embedding._buffers}
    tried.num_embeddings, tried.padding_idx = rows, None
    tokens = torch.arange(rows, device="cpu").flip(0)[None]
    try:
        found = type(embedding).forward(tried, tokens)
    except Exception:  # whatever a class of others needs that is not there
        return False
    return (
        isinstance(found, Tensor)
        and found.shape == (1, rows, table.shape[1])
        and torch.allclose(found[0], scale * table.flip(0), rtol=1e-6, atol=0)
    )


def same_table(model: nn.Module) -> dict[str, str]:
    """The embeddings that another one can stand for, by name, with the name of that: they share a table, and are alike.

    They hold one parameter, or a transformers model that is not filled yet says that they will. Of other models none
    are found: what their own code does with either is not known.
    """
    embeddings = {name: each for name, each in model.named_modules() if isinstance(each, nn.Embedding)}
    declared = getattr(model, "all_tied_weights_keys", None)
    if not isinstance(declared, Mapping):
        return {}
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, each in embeddings.items():
        source = str(declared.get(f"{name}.weight", "")).removesuffix(".weight")
        other = source if source in embeddings else first.setdefault(id(each.weight), name)
        if other != name and _alike(each, embeddings[other]):
            found[name] = found.get(other, other)
    return found


def _alike(one: nn.Embedding, other: nn.Embedding) -> bool:
    """Whether two embeddings of one table give the same vectors and gradients, and nothing else runs with either."""
    facts = [
        (type(each), tuple(each.weight.shape), each.padding_idx, each.max_norm, each.scale_grad_by_freq, each.sparse)
        for each in (one, other)
    ]
    hooks = (
        hook
        for each in (one, other)
        for hook in (each._forward_hooks, each._forward_pre_hooks, each._backward_hooks, each._backward_pre_hooks)
    )
    plain = type(one) is nn.Embedding or only_scales(one)
    replaced = any("forward" in vars(each) for each in (one, other))
    scales = embedding_scale(one) == embedding_scale(other)
    return facts[0] == facts[1] and plain and scales and not replaced and not any(hooks)


def join_embeddings(model: nn.Module) -> bool:
    """Put one embedding in all the places of those that share its table; return whether there were any."""
    found = same_table(model)
    for name, first in found.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, model.get_submodule(first))
    return bool(found)
