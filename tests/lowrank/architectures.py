"""Tiny randomly initialized models of the transformers architectures that the tests compress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_TOKENS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT = _SIZES | _TOKENS | {"max_position_embeddings": 64}
_GROUPED = _TEXT | {"num_key_value_heads": 2}
_VISION = {"num_channels": 1, "num_labels": 5}


def _tokens(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.randint(3, 60, (2, 7)) for name in names}


@dataclass(frozen=True)
class Fused:
    """How a file holds the matrices of all experts of a block in one tensor."""

    transposed: bool = False
    alternating: bool = False
    gate_up: str = "experts.gate_up_proj"
    down: str = "experts.down_proj"

    def parts(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The matrices or biases in a tensor of this name, by name; none for any other tensor."""
        own = name.removesuffix("_bias")
        role = next((role for role in (self.gate_up, self.down) if own.endswith(role)), None)
        if role is None:
            return {}
        stem, kind = own.removesuffix(role), "bias" if own != name else "weight"
        found = {}
        for number, each in enumerate(tensor):
            rows = each.T if self.transposed and each.dim() == 2 else each
            half = len(rows) // 2
            by_layer = {"down_proj": rows}
            if role == self.gate_up and self.alternating:
                by_layer = {"gate_proj": rows[::2], "up_proj": rows[1::2]}
            elif role == self.gate_up:
                by_layer = {"gate_proj": rows[:half], "up_proj": rows[half:]}
            found |= {f"{stem}experts.{number}.{layer}.{kind}": part for layer, part in by_layer.items()}
        return found

    def together(self, name: str, like: torch.Tensor, apart: dict[str, torch.Tensor]) -> torch.Tensor:
        """The tensor of this name and of the shape of `like` that holds those of its matrices or biases."""
        whole = torch.empty_like(like)
        for part, view in self.parts(name, whole).items():
            view.copy_(apart[part])
        return whole


@dataclass(frozen=True)
class Architecture:
    """How a tiny model is made and fed, and what is known of it.

    `renamed` says that names in its file are known to differ from those of its modules, in every release, and `tied`
    which two of its parameters are one.
    `a_layer` is the name in the file of one of the layers that ought to be factorized. `fused` says that its files hold
    the matrices of all experts of a block in one tensor, and how: whether they are transposed, and whether rows of gate
    and up alternate.
    """

    auto: str
    config: Callable[[], Any]
    a_layer: str
    inputs: Callable[[], dict[str, torch.Tensor]] = field(default=lambda: _tokens("input_ids"))
    renamed: bool = False
    tied: tuple[str, str] | None = None
    fused: Fused | None = None

    def dense(self) -> Any:
        """The model, the same each time."""
        torch.manual_seed(0)
        return getattr(transformers, self.auto).from_config(self.config()).eval()

    def apart(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of a file with each matrix and bias of its experts by itself."""
        if self.fused is None:
            return tensors
        found: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            found |= self.fused.parts(name, tensor) or {name: tensor}
        return found

    def load(self, folder: Any, **keywords: Any) -> Any:
        return getattr(transformers, self.auto).from_pretrained(folder, **keywords)


ARCHITECTURES = {
    "llama": Architecture(
        "AutoModelForCausalLM", lambda: transformers.LlamaConfig(**_GROUPED), "model.layers.1.mlp.gate_proj"
    ),
    "mistral": Architecture(
        "AutoModelForCausalLM", lambda: transformers.MistralConfig(**_GROUPED), "model.layers.0.self_attn.q_proj"
    ),
    "qwen3": Architecture(
        "AutoModelForCausalLM",
        lambda: transformers.Qwen3Config(**_GROUPED, head_dim=8, tie_word_embeddings=True),
        "model.layers.0.mlp.down_proj",
        tied=("lm_head.weight", "model.embed_tokens.weight"),
    ),
    "gemma3": Architecture(
        "AutoModelForCausalLM",
        lambda: transformers.Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=4),
        "model.layers.0.mlp.up_proj",
        tied=("lm_head.weight", "model.embed_tokens.weight"),
    ),
    "phi3": Architecture(
        "AutoModelForCausalLM", lambda: transformers.Phi3Config(**_GROUPED), "model.layers.0.self_attn.qkv_proj"
    ),
    "gpt2": Architecture(
        "AutoModelForCausalLM",
        lambda: transformers.GPT2Config(**_tiny_gpt2()),
        "transformer.h.0.attn.c_attn",
        tied=("lm_head.weight", "transformer.wte.weight"),
    ),
    "gpt-neox": Architecture(
        "AutoModelForCausalLM",
        lambda: transformers.GPTNeoXConfig(**_TEXT),
        "gpt_neox.layers.0.attention.query_key_value",
    ),
    "opt": Architecture(
        "AutoModelForCausalLM",
        lambda: transformers.OPTConfig(**_TEXT, ffn_dim=48, word_embed_proj_dim=32),
        "model.decoder.layers.0.fc1",
        tied=("lm_head.weight", "model.decoder.embed_tokens.weight"),
    ),
    "bert": Architecture(
        "AutoModelForMaskedLM",
        lambda: transformers.BertConfig(**_TEXT),
        "bert.encoder.layer.0.attention.self.query",
        tied=("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    ),
    "t5": Architecture(
        "AutoModelForSeq2SeqLM",
        lambda: transformers.T5Config(
            vocab_size=60, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
        ),
        "decoder.block.0.layer.1.EncDecAttention.k",
        inputs=lambda: _tokens("input_ids", "decoder_input_ids"),
        tied=("lm_head.weight", "shared.weight"),
    ),
    "vit": Architecture(
        "AutoModelForImageClassification",
        lambda: transformers.ViTConfig(**_SIZES, **_VISION, image_size=8, patch_size=4),
        "vit.encoder.layer.0.attention.attention.query",
        inputs=lambda: {"pixel_values": torch.rand(2, 1, 8, 8)},
        renamed=True,
    ),
    "whisper": Architecture(
        "AutoModelForSpeechSeq2Seq",
        lambda: transformers.WhisperConfig(**_tiny_whisper()),
        "model.encoder.conv2",
        inputs=lambda: _tokens("decoder_input_ids") | {"input_features": torch.randn(2, 8, 20)},
        tied=("proj_out.weight", "model.decoder.embed_tokens.weight"),
    ),
    "resnet": Architecture(
        "AutoModelForImageClassification",
        lambda: transformers.ResNetConfig(**_VISION, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1]),
        "resnet.encoder.stages.1.layers.0.layer.1.convolution",
        inputs=lambda: {"pixel_values": torch.rand(2, 1, 16, 16)},
    ),
    "mixtral": Architecture(
        "AutoModelForCausalLM",
        lambda: transformers.MixtralConfig(**_GROUPED, num_local_experts=4),
        "model.layers.1.block_sparse_moe.experts.3.w2",
        renamed=True,
    ),
    "qwen3-moe": Architecture(
        "AutoModelForCausalLM",
        lambda: transformers.Qwen3MoeConfig(
            **_GROUPED, head_dim=8, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[0]
        ),
        "model.layers.1.mlp.experts.0.gate_proj",
    ),
    "deepseek-v3": Architecture(
        "AutoModelForCausalLM",
        lambda: transformers.DeepseekV3Config(**_GROUPED | _tiny_deepseek()),
        "model.layers.1.mlp.experts.0.gate_proj",
    ),
    "gpt-oss": Architecture(
        "AutoModelForCausalLM",
        lambda: transformers.GptOssConfig(**_GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
        "model.layers.1.mlp.experts.3.gate_proj",
        fused=Fused(transposed=True, alternating=True),
    ),
    "granite-moe": Architecture(
        "AutoModelForCausalLM",
        lambda: transformers.GraniteMoeConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2),
        "model.layers.1.block_sparse_moe.experts.3.up_proj",
        fused=Fused(gate_up="input_linear.weight", down="output_linear.weight"),
    ),
    "llama4": Architecture(
        "AutoModelForCausalLM",
        lambda: transformers.Llama4TextConfig(
            **_GROUPED, intermediate_size_mlp=48, head_dim=8, num_local_experts=4, num_experts_per_tok=1
        ),
        "model.layers.1.feed_forward.experts.3.down_proj",
        fused=Fused(transposed=True),
    ),
}


def _tiny_deepseek() -> dict[str, Any]:
    heads = {"num_key_value_heads": 4, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16}
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    return heads | ranks | experts | {"moe_intermediate_size": 24, "first_k_dense_replace": 1}


def _tiny_gpt2() -> dict[str, Any]:
    special = {name: number for name, number in _TOKENS.items() if name != "vocab_size"}
    return {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60, "n_positions": 32} | special


def _tiny_whisper() -> dict[str, Any]:
    sides = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in _WHISPER_SIDE.items()}
    lengths = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16}
    return {"d_model": 32, **sides, **lengths, **_TOKENS, "decoder_start_token_id": 1}


_WHISPER_SIDE = {"layers": 1, "attention_heads": 4, "ffn_dim": 48}
