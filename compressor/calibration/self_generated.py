"""Calibration examples that a model makes itself where nobody gave data: texts, images or random inputs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressor.calibration.calibration import frozen
from compressor.calibration.criterion import outputs_of
from compressor.calibration.noise import batch_normalizations, matched, spectral_noise
from compressor.calibration.settings import SelfGeneratedSettings
from compressor.calibration.written_text import Sampler, Told, continued, continues_texts, unmasked, vocabulary_of
from compressor.data import Batch, EvaluationData, Preprocessing
from compressor.data.data import NO_LABELS, Task
from compressor.data.text import special_tokens
from compressor.engine import Run
from compressor.errors import BadInput
from compressor.evaluation import count_macs
from compressor.model import Model, evaluation_mode
from compressor.model.example_inputs import (
    architecture_of,
    example_inputs,
    is_transformer,
    most_tokens,
    ordinary_tokens,
)
from compressor.model.streaming import device_of

logger = logging.getLogger(__name__)

SelfMaking = Literal[
    "causal language model",
    "masked language model",
    "encoder",
    "encoder-decoder",
    "image model with batch normalization",
    "image model",
    "module",
]

# What the examples of each kind of model are, after their number.
MADE: Mapping[SelfMaking, str] = {
    "causal language model": "texts that the model wrote itself",
    "masked language model": "texts sampled from the model's own masked predictions",
    "encoder": "texts of random tokens",
    "encoder-decoder": "random texts, with targets that the model wrote itself",
    "image model with batch normalization": "images of noise, matched to the statistics of the batch normalizations",
    "image model": "images of noise with the spectrum of natural images",
    "module": "random inputs",
}


@dataclass(frozen=True)
class SelfRequest:
    """How many examples a model is to make itself, of how many tokens, and what prepares its data."""

    count: int
    length: int | None
    preprocessing: Preprocessing
    settings: SelfGeneratedSettings


def kind_of_model(model: Model, preprocessing: Preprocessing) -> SelfMaking:
    """How a model makes examples of its own, by its class, what it takes, and its tokenizer."""
    module = architecture_of(model)
    named = getattr(module, "main_input_name", None) if is_transformer(module) else None
    name = type(module).__name__
    if named == "input_ids":
        if getattr(module.config, "is_encoder_decoder", False):
            return "encoder-decoder" if name.endswith("ForConditionalGeneration") else "encoder"
        if continues_texts(module):
            return "causal language model"
        masked = name.endswith("ForMaskedLM") and _mask_token(preprocessing) is not None
        return "masked language model" if masked else "encoder"
    if named == "pixel_values" or (named is None and _takes_images(module)):
        return "image model with batch normalization" if batch_normalizations(module) else "image model"
    return "module"


# Where their own examples were measured to win at least half of what real ones do: benchmarks/self_calibration.py.
BY_DEFAULT: tuple[SelfMaking, ...] = (
    "causal language model",
    "image model with batch normalization",
    "image model",
)


def examples_by_default(model: Model, request: SelfRequest, *, device: torch.device) -> int | None:
    """How many examples a model makes itself where nobody asked it to, at most those of the request.

    None for a kind of model of which it is not known that they help, for images whose normalization is not known, and
    where calibration on them would take long.
    """
    kind, module = kind_of_model(model, request.preprocessing), architecture_of(model)
    if kind not in BY_DEFAULT or (kind == "image model" and not is_transformer(module)):
        return None
    settings = request.settings
    most = settings.most_multiplications if device.type == "cpu" else settings.most_multiplications_accelerated
    if kind == "causal language model":
        each = most_tokens(model, request.length or settings.length) * sum(map(torch.numel, module.parameters()))
    else:
        each = count_macs(
            model.module, example_inputs(model, 1, generator=torch.Generator().manual_seed(0)), device=device
        )
    count = min(request.count, int(most / max(1, each)))
    return count if count >= min(settings.fewest, request.count) else None


def self_generated(model: Model, request: SelfRequest, *, run: Run, by_block: bool = False) -> EvaluationData:
    """Examples that the model makes itself, seeded, without labels.

    With `by_block` it is never whole in memory, and its blocks are read again for every token. Raises `BadInput` for a
    model whose inputs are not known.
    """
    kind = kind_of_model(model, request.preprocessing)
    logger.info("calibration on %d %s", request.count, MADE[kind])
    generator = torch.Generator().manual_seed(run.seed)
    network = model.streamed if by_block else model.module
    making = _Making(model, network, request, generator, partial(run.report, "generate"))
    try:
        with evaluation_mode(run.device, network), frozen(network):
            inputs = making.inputs(kind)
    except BadInput as error:
        what, remedy = f"the model cannot make its own examples: {error.what}", "give `calibration=DATA`"
        raise BadInput(what, option="calibration", remedy=remedy) from error
    task: Task = "language-modeling" if kind == "causal language model" else _TASKS.get(kind, "other")

    def read(positions: Any) -> Batch:
        rows = list(positions)
        chosen = {name: tensor[rows] for name, tensor in inputs.items()}
        labels = chosen["input_ids"][:, 1:] if kind == "causal language model" else NO_LABELS
        return Batch(chosen, labels)

    return EvaluationData(MADE[kind], task, request.count, request.settings.at_once, read)


_TASKS: Mapping[SelfMaking, Task] = {
    "masked language model": "language-modeling",
    "encoder": "text-classification",
    "encoder-decoder": "text-to-text",
    "image model with batch normalization": "image-classification",
    "image model": "image-classification",
}


@dataclass(frozen=True)
class _Making:
    """One model making its examples."""

    model: Model
    network: nn.Module
    request: SelfRequest
    generator: torch.Generator
    told: Told

    def inputs(self, kind: SelfMaking) -> dict[str, Tensor]:
        match kind:
            case "causal language model":
                return {"input_ids": self._in_parts(self._prompts(), self._written)}
            case "masked language model":
                return {"input_ids": self._in_parts(self._masks(), self._filled)}
            case "encoder-decoder":
                return self._translated()
            case "image model with batch normalization" | "image model":
                return {self._name_of_images(): self._images(kind)}
            case "encoder" | "module":
                return self._random()

    def _random(self, length: int | None = None) -> dict[str, Tensor]:
        count, length = self.request.count, length or self.request.length
        return example_inputs(self.model, count, generator=self.generator, length=length)

    def _length(self) -> int:
        request = self.request
        return most_tokens(self.model, request.length or request.settings.length)

    def _in_parts(self, starts: Tensor, make: Callable[[Tensor, Told], Tensor]) -> Tensor:
        """What is made of some starts, a few at a time."""
        parts = torch.split(starts, self.request.settings.at_once)

        def told(part: int, done: int, of: int) -> None:
            self.told(part * of + done, len(parts) * of)

        return torch.cat([make(part, partial(told, number)) for number, part in enumerate(parts)])

    def _sampler(self, *, decoder: bool = False, special: bool = True) -> Sampler:
        ordinary = self._ordinary(decoder=decoder)
        config: Any = self.network.config
        size = getattr(getattr(config, "decoder", None) if decoder else None, "vocab_size", None)
        size = size or vocabulary_of(self.network)
        excluded = () if special else tuple(set(range(size)) - set(ordinary.tolist()))
        return Sampler(self.generator, size, self.request.settings, excluded)

    def _ordinary(self, *, decoder: bool = False) -> Tensor:
        """The vocabulary without special tokens, those of a tokenizer that was given among them."""
        ordinary = ordinary_tokens(self.model, decoder=decoder)
        special = torch.tensor(_special_of(self.request.preprocessing), dtype=torch.int64)
        return ordinary[~torch.isin(ordinary, special)]

    def _prompts(self) -> Tensor:
        """The tokens that a tokenizer puts before a text, and a random one."""
        ordinary = self._ordinary()
        first = ordinary[torch.randint(len(ordinary), (self.request.count, 1), generator=self.generator)]
        before, _ = _around(self.request.preprocessing)
        return torch.cat([before.expand(len(first), -1), first], dim=1)

    def _written(self, prompts: Tensor, told: Told) -> Tensor:
        return continued(self.network, prompts, self._length(), sampler=self._sampler(), told=told)

    def _masks(self) -> Tensor:
        mask = _mask_token(self.request.preprocessing)
        assert mask is not None
        before, after = _around(self.request.preprocessing)
        inner = torch.full((max(1, self._length() - len(before) - len(after)),), mask)
        return torch.cat([before, inner, after]).expand(self.request.count, -1)

    def _filled(self, masked: Tensor, told: Told) -> Tensor:
        mask = _mask_token(self.request.preprocessing)
        assert mask is not None
        return unmasked(self.network, masked, mask, sampler=self._sampler(special=False), told=told)

    def _translated(self) -> dict[str, Tensor]:
        inputs = self._random(self._length())
        sources = inputs["input_ids"]
        first, length = inputs["decoder_input_ids"][:, :1], inputs["decoder_input_ids"].shape[1]
        sampler, rows = self._sampler(decoder=True), torch.arange(len(sources))[:, None]

        def written(chosen: Tensor, told: Told) -> Tensor:
            places = chosen[:, 0]
            named = {"input_ids": sources[places]}
            return continued(self.network, first[places], length, sampler=sampler, told=told, **named)

        return {"input_ids": sources, "decoder_input_ids": self._in_parts(rows, written)}

    def _name_of_images(self) -> str:
        return "pixel_values" if is_transformer(self.network) else "inputs"

    def _images(self, kind: SelfMaking) -> Tensor:
        [example] = self._random().values()
        noise = spectral_noise(tuple(example.shape), self.generator)
        if kind == "image model":
            return noise
        return self._in_parts(noise, self._matched)

    def _matched(self, noise: Tensor, told: Told) -> Tensor:
        model, device = self.network, device_of(self.network)
        run = partial(_run_on_images, model, self._name_of_images())
        return matched(model, noise.to(device), run=run, settings=self.request.settings, told=told).cpu()


def _run_on_images(model: nn.Module, name: str, images: Tensor) -> Tensor:
    return outputs_of(model, {name: images})


def _takes_images(module: nn.Module) -> bool:
    """Whether the first layer of a module that has weights is a convolution of images."""
    kinds = (nn.Linear, nn.Embedding, nn.RNNBase, nn.MultiheadAttention, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return isinstance(next((layer for layer in module.modules() if isinstance(layer, kinds)), None), nn.Conv2d)


def _mask_token(preprocessing: Preprocessing) -> int | None:
    try:
        token = getattr(preprocessing.tokenizer, "mask_token_id", None)
    except BadInput:  # a tokenizer that cannot be loaded
        return None
    return token if isinstance(token, int) else None


def _special_of(preprocessing: Preprocessing) -> list[int]:
    try:
        return list(getattr(preprocessing.tokenizer, "all_special_ids", ()))
    except BadInput:
        return []


def _around(preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    """The special tokens that the tokenizer puts before and after a text; none without a tokenizer."""
    none = torch.empty(0, dtype=torch.int64)
    if preprocessing.tokenizer is None:
        return none, none
    try:
        before, after = special_tokens(preprocessing.tokenizer)
    except BadInput:
        return none, none
    return before.long(), after.long()
