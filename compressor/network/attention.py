"""Whether a network has attention layers."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import pairwise

# The number of attention heads in a transformer's config.json, under one of its names.
ATTENTION_SETTINGS = frozenset({"num_attention_heads", "encoder_attention_heads", "num_heads", "n_heads", "n_head"})

# Names of the query projection in the attention layers of PyTorch, transformers, timm, diffusers and llama.
QUERIES = frozenset(
    {"q_proj", "query", "qkv", "Wqkv", "qkv_proj", "c_attn", "query_key_value", "in_proj_weight", "to_q", "wq", "q_lin"}
)


def has_attention(settings: Collection[str], tensors: Iterable[str]) -> bool:
    """Whether the keys of a configuration, or the usual names of attention weights, show attention layers."""
    if not ATTENTION_SETTINGS.isdisjoint(settings):
        return True
    parts = (name.split(".") for name in tensors)
    return any(
        part in QUERIES or (part == "q" and "attention" in owner.lower())
        for name in parts
        for owner, part in pairwise(["", *name])
    )
