"""Attention layers are told by the configuration, or else by the usual names of their weights."""

from __future__ import annotations

import pytest

from compressor.network.attention import has_attention


@pytest.mark.parametrize("setting", ["num_attention_heads", "n_head", "encoder_attention_heads"])
def test_a_configuration_tells(setting: str) -> None:
    assert has_attention({setting: 4, "hidden_size": 8}, [])
    assert not has_attention({"hidden_size": 8}, [])


@pytest.mark.parametrize(
    "tensor",
    [
        *("layers.0.self_attn.q_proj.weight", "encoder.layer.0.attention.self.query.bias", "blocks.1.attn.qkv.weight"),
        *("transformer.h.0.attn.c_attn.weight", "self_attn.in_proj_weight", "decoder.0.SelfAttention.q.weight"),
    ],
)
def test_a_name_tells(tensor: str) -> None:
    assert has_attention({}, ["embedding.weight", tensor])


def test_other_names_tell_nothing() -> None:
    assert not has_attention({}, ["0.weight", "conv.q.weight", "query_like.weight", "attention.k.weight"])
