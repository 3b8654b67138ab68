"""Small networks of the kinds whose code differs by device, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)


@dataclass(frozen=True)
class Network:
    """How a network is built, always the same, and a batch of four examples is drawn for it."""

    build: Callable[[], nn.Module]
    draw: Callable[[torch.Generator], Tensor]

    def on(self, device: torch.device | str) -> nn.Module:
        torch.manual_seed(0)
        model = self.build().eval().to(device)
        if isinstance(model, PreTrainedModel):  # to a device that PyTorch does not know, tied weights move one by one
            model.tie_weights()
        return model

    def batches(self, count: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        return [self.draw(generator) for _ in range(count)]


class Recurrent(nn.Module):
    """A recurrent layer and attention, both of which multiply with weights of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(16, 24, batch_first=True)
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)
        self.head = nn.Linear(24, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        states, _ = self.recurrent(inputs)
        attended, _ = self.attention(states, states, states, need_weights=False)
        logits: Tensor = self.head((states + attended)[:, -1])
        return logits


# Sizes of a language model, but for its blocks.
DECODER: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}


def _llama(*, tied: bool) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, tie_word_embeddings=tied, **DECODER))


def _mixture() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(num_hidden_layers=1, num_local_experts=4, **DECODER))


def _bert() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForMaskedLM(BertConfig(vocab_size=40, max_position_embeddings=32, **sizes))


def _vit() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes))


def _t5() -> nn.Module:
    config = T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


def _convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5))


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def _tokens(generator: torch.Generator) -> Tensor:
    return torch.randint(40, (4, 12), generator=generator)


def _normal(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(4, *shape, generator=generator)


NETWORKS = {
    "llama": Network(lambda: _llama(tied=False), _tokens),
    "tied": Network(lambda: _llama(tied=True), _tokens),
    "convolutions": Network(_convolutions, _normal(3, 10, 10)),
    "perceptron": Network(_perceptron, _normal(20)),
    "recurrent": Network(Recurrent, _normal(6, 16)),
    "encoder": Network(_encoder, _normal(6, 16)),
    "mixture": Network(_mixture, _tokens),
    "bert": Network(_bert, _tokens),
    "vit": Network(_vit, _normal(3, 8, 8)),
    "t5": Network(_t5, _tokens),
}
