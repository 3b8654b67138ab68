"""Text that a language model writes itself, to calibrate it on where there are no data.

A causal model continues random first tokens by sampling from its own predictions (Liu et al., "LLM-QAT: Data-Free
Quantization Aware Training for Large Language Models", Findings of ACL 2024, section 3.1). A masked one starts from
masks alone and fills a part of them at a time, in a random order, from its own predictions (Ghazvininejad et al.,
"Mask-Predict", EMNLP 2019; sampled as in Wang and Cho, "BERT has a Mouth, and It Must Speak", 2019).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from compressor.calibration.settings import SelfGeneratedSettings
from compressor.freed_memory import freed_memory
from compressor.model.example_inputs import is_transformer
from compressor.model.head import find_head
from compressor.model.streaming import device_of

# Told after each token or round how many are done, and of how many.
Told = Callable[[int, int], None]


@dataclass(frozen=True)
class Sampler:
    """Draws tokens from logits: among the first `vocabulary` ids and without the `excluded` ones, by its own numbers.

    The numbers are drawn on the CPU, so that every device writes the same text from the same predictions.
    """

    generator: torch.Generator
    vocabulary: int
    settings: SelfGeneratedSettings
    excluded: tuple[int, ...] = ()

    def draw(self, logits: Tensor) -> Tensor:
        """One token for each row of logits, `(rows, vocabulary)`, on the CPU."""
        chosen = logits[:, : self.vocabulary].float().cpu() / self.settings.temperature
        chosen[:, list(self.excluded)] = -math.inf
        return torch.multinomial(chosen.softmax(-1), 1, generator=self.generator)[:, 0]


def continues_texts(model: nn.Module) -> bool:
    """Whether a model is a causal language model of transformers, which takes what `continued` gives it."""
    running: Any = model
    if not is_transformer(model) or running.main_input_name != "input_ids":
        return False
    causal = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    if not causal or getattr(running.config, "is_encoder_decoder", False):
        return False
    try:
        signature(model.forward).bind_partial(input_ids=None, use_cache=True, **{_cache_name(model): None})
        return vocabulary_of(model) > 0
    except (TypeError, AttributeError):  # such as of code of its own
        return False


def _cache_name(model: nn.Module) -> str:
    """What a model of transformers calls the keys and values of earlier tokens; the name changed in 5.24."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


def vocabulary_of(model: Any) -> int:
    """How many tokens a model of texts knows, by its configuration."""
    size: int = (getattr(model.config, "text_config", None) or model.config).vocab_size
    return size


def continued(
    model: nn.Module, prompts: Tensor, length: int, *, sampler: Sampler, told: Told, **inputs: Tensor
) -> Tensor:
    """Texts of `length` tokens that begin with `prompts`, (texts, tokens), each next token sampled from the model.

    Earlier tokens are kept in the model's cache, where it has one. With `inputs`, those of an encoder, the texts are
    the decoder's.
    """
    named = "decoder_input_ids" if inputs else "input_ids"
    device = device_of(model)
    running: Any = model
    more: dict[str, Any] = {}
    kept = _cache_name(model)
    if inputs:
        encoder = running.get_encoder()
        more["encoder_outputs"] = encoder(**{name: tensor.to(device) for name, tensor in inputs.items()})
    if "logits_to_keep" in signature(model.forward).parameters:
        more["logits_to_keep"] = 1  # of a model without a cache there would be those of whole texts
    texts, new, cache = prompts, prompts, None
    while texts.shape[1] < length:
        freed_memory().give_back()
        output = running(**{named: new.to(device), kept: cache}, use_cache=True, **more)
        texts = torch.cat([texts, sampler.draw(output.logits[:, -1])[:, None]], dim=1)
        cache = getattr(output, kept, None)
        new = texts if cache is None else texts[:, -1:]
        told(texts.shape[1], length)
    return texts


def unmasked(model: nn.Module, masked: Tensor, mask: int, *, sampler: Sampler, told: Told) -> Tensor:
    """The texts `masked`, (texts, tokens), with every mask replaced by a token sampled from the model's predictions.

    In each round an equal part of the masks of each text is filled, at random places.
    """
    texts, device = masked.clone(), device_of(model)
    order = torch.rand(texts.shape, generator=sampler.generator).masked_fill(texts != mask, math.inf).argsort(dim=1)
    turns, rounds = order.argsort(dim=1), sampler.settings.unmasking_rounds
    counts = (texts == mask).sum(dim=1, keepdim=True)
    head = find_head(model, partial(_logits, texts[:1].to(device)))
    for done in range(1, rounds + 1):
        # Rounded up, so that no place is left after the last round.
        chosen = (texts == mask) & (turns < (counts * done / rounds).ceil())
        if chosen.any():
            predicted = partial(_logits, texts.to(device))
            if head is None:
                logits = predicted(model)[chosen.to(device)]
            else:  # a large vocabulary has many logits
                logits = head(model, head.inputs(model, predicted)[chosen.to(device)][None])[0]
            texts[chosen] = sampler.draw(logits)
        told(done, rounds)
    return texts


def _logits(texts: Tensor, model: nn.Module) -> Tensor:
    logits: Tensor = model(input_ids=texts).logits
    return logits
