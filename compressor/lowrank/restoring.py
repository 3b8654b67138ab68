"""Restore a low-rank module to a dense one in memory, as `restore` does with files."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compressor.forms import QuantizedHead
from compressor.io import open_checkpoint
from compressor.lowrank.modules import SameEmbedding, TiedHead, carry_hooks, put_layer, tied_head
from compressor.lowrank.stored_pairs import stored_pairs
from compressor.lowrank.tensor_format import dense_weight
from compressor.network import embedding_scale, fuse_experts


def restored_module(module: nn.Module, architecture: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The module, changed in place: every low-rank layer multiplied back to the dense one that it stands for.

    `architecture` is the model as it was before, on any device and with any numbers; layers are taken out of it. The
    dense weights are on the factors' device, in their dtype or in `dtype`.
    """
    checkpoint = open_checkpoint(module)
    pairs = stored_pairs(checkpoint)
    heads = {name: tied_head(architecture, name) for name in pairs}
    for name, pair in pairs.items():
        low_rank, dense = module.get_submodule(name), architecture.get_submodule(name)
        like = low_rank.weight
        assert isinstance(like, Tensor)
        own = {"weight": dense_weight(checkpoint, pair).to(like.device, dtype or like.dtype)}
        if pair.has_bias:
            own["bias"] = checkpoint.read(pair.tensors["bias"]).to(own["weight"])
        dense.load_state_dict(own, assign=True)
        for parameter, tensor in low_rank.named_parameters():
            dense.get_parameter("bias" if parameter.endswith("bias") else "weight").requires_grad_(tensor.requires_grad)
        _fill_scale(dense)
        carry_hooks(low_rank, dense)
        places = [
            place
            for place, each in module.named_modules(remove_duplicate=False)
            if each is low_rank or (isinstance(each, SameEmbedding) and each.embedding is low_rank)
        ]
        for place in places:
            module = put_layer(module, place, dense.train(low_rank.training))
        if len(places) > 1:
            _declare_as_before(module, architecture)
        if (head := heads[name]) is not None:
            _tie(module, architecture, head=head, embedding=dense)
    return fuse_experts(module)


def _tie(module: nn.Module, architecture: nn.Module, *, head: str, embedding: nn.Module) -> None:
    """Put a linear layer in the place of a head that was tied to a low-rank embedding, and tie it to the dense one.

    A transformers model is told.
    """
    tied, dense = module.get_submodule(head), architecture.get_submodule(head)
    assert isinstance(tied, TiedHead | QuantizedHead)
    assert isinstance(embedding.weight, nn.Parameter)
    dense.register_parameter("weight", embedding.weight)
    dense.register_parameter("bias", tied.bias)
    carry_hooks(tied, dense)
    put_layer(module, head, dense.train(tied.training))
    _declare_as_before(module, architecture)


def _declare_as_before(module: nn.Module, architecture: nn.Module) -> None:
    """Say of a transformers model what is tied in it, as it is said of the architecture."""
    for place, original in architecture.named_modules():
        for name in ("_tied_weights_keys", "all_tied_weights_keys"):
            if isinstance(declared := getattr(original, name, None), dict):
                setattr(module.get_submodule(place), name, declared)


def _fill_scale(dense: nn.Module) -> None:
    """Give an embedding that was built without values the scale that it has as a number."""
    scale = embedding_scale(dense)
    for name, buffer in dense._buffers.items():
        if isinstance(dense, nn.Embedding) and buffer is not None and buffer.is_meta:
            dense._buffers[name] = torch.full_like(buffer, scale, device="cpu")
