"""The networks whose latency is measured, and how each of them is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CARDS = Path(__file__).parent.parent / "model_cards"

# Runs a model once in one way: gets the module whose `forward` is called, compiled or not.
Run = Callable[[Callable[..., Any]], Any]


@dataclass(frozen=True)
class Workload:
    """One way in which a network is run.

    Attributes:
        name: What is run: `forward`, `prefill`, or `decode`.
        prepare: From a model and a number of examples what runs a module once on them.
    """

    name: str
    prepare: Callable[[nn.Module, int], Run]


@dataclass(frozen=True)
class Network:
    """A network of the table.

    Attributes:
        name: What it is called.
        build: Makes it, in float32 on the CPU.
        workloads: How it is run.
    """

    name: str
    build: Callable[[], nn.Module]
    workloads: tuple[Workload, ...]


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def images(channels: int, side: int) -> Workload:
    """Forward passes over images of noise."""

    def prepare(model: nn.Module, batch: int) -> Run:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(batch, channels, side, side, generator=generator)
        pixels = pixels.to(device_of(model), dtype_of(model))
        return lambda forward: forward(pixel_values=pixels)

    return Workload("forward", prepare)


def token_ids(model: nn.Module, batch: int, length: int) -> Tensor:
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, config.vocab_size, (batch, length), generator=generator).to(device_of(model))


def tokens(name: str, length: int, **keywords: Any) -> Workload:
    """Forward passes over sequences of one length."""

    def prepare(model: nn.Module, batch: int) -> Run:
        ids = token_ids(model, batch, length)
        return lambda forward: forward(input_ids=ids, **keywords)

    return Workload(name, prepare)


def decode(context: int) -> Workload:
    """Steps of one token each after the same context, whose keys and values are in the cache."""

    def prepare(model: nn.Module, batch: int) -> Run:
        ids = token_ids(model, batch, context + 1)
        with torch.inference_mode():
            cache: Any = model(input_ids=ids[:, :-1], use_cache=True).past_key_values

        def run(forward: Callable[..., Any]) -> Any:
            outputs = forward(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
            cache.crop(-1)  # the token leaves the cache again: every step is the same one
            return outputs

        return run

    return Workload("decode", prepare)


def digits_vit() -> nn.Module:
    from transformers import ViTForImageClassification

    return ViTForImageClassification.from_pretrained(CARDS / "digits-vit", dtype=torch.float32)


def llama(hidden: int = 1024, intermediate: int = 2816, blocks: int = 4) -> nn.Module:
    """A Llama of random weights whose embedding and head are small."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=256,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


def bert(blocks: int = 12, hidden: int = 768) -> nn.Module:
    """BERT-base of random weights with a small vocabulary."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        max_position_embeddings=32,
    )
    return BertForSequenceClassification(config)


def resnet(**sizes: Any) -> nn.Module:
    """ResNet-50 of random weights, by default."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(num_labels=1000, **sizes))


def digits_resnet() -> nn.Module:
    from transformers import ResNetForImageClassification

    return ResNetForImageClassification.from_pretrained(CARDS / "digits-resnet", dtype=torch.float32)


def network_of_images(name: str, build: Callable[[], nn.Module], workload: Workload) -> Network:
    return Network(name, build, (workload,))


def networks() -> Mapping[str, Network]:
    """The networks of the table by name."""
    of_llama = (tokens("prefill", 32, use_cache=False), decode(32))
    found = (
        Network("digits-vit", digits_vit, (images(1, 8),)),
        Network("Llama, hidden 1024", llama, of_llama),
        Network("BERT-base", bert, (tokens("forward", 32),)),
        Network("ResNet-50", resnet, (images(3, 64),)),
    )
    return {network.name: network for network in found}
