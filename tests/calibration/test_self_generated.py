"""Examples that models make themselves: what they are, for every kind of model, and that they repeat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor import BadInput, CalibrationSettings, compress
from compressor.calibration.noise import matched, spectral_noise, statistics_distance
from compressor.calibration.self_generated import SelfRequest, kind_of_model, self_generated
from compressor.calibration.settings import SelfGeneratedSettings
from compressor.calibration.written_text import Sampler, continued, unmasked
from compressor.data import EvaluationData, Preprocessing
from compressor.engine import Run
from compressor.model import open_model
from tests.calibration.tiny_models import CPU
from tests.lowrank.architectures import ARCHITECTURES

QUICK = SelfGeneratedSettings(length=9, unmasking_rounds=4, image_steps=3, at_once=4)


@dataclass(frozen=True)
class Tokenizer:
    """As many tokens as characters; a text stands between `before` and `after`."""

    before: int = 1
    after: int = 2
    mask_token_id: int = 3
    all_special_ids: tuple[int, ...] = (0, 1, 2, 3)

    def __call__(self, text: str, *, add_special_tokens: bool = True, **_: object) -> dict[str, list[int]]:
        inner = [10] * len(text)
        return {"input_ids": [self.before, *inner, self.after] if add_special_tokens else inner}


def sampler(vocabulary: int, seed: int = 0, **settings: Any) -> Sampler:
    return Sampler(torch.Generator().manual_seed(seed), vocabulary, SelfGeneratedSettings(**settings))


def quiet(_done: int, _of: int) -> None:
    pass


def made(module: nn.Module, count: int = 6, *, seed: int = 0, tokenizer: Any = None) -> EvaluationData:
    model = open_model(module)
    preprocessing = model.preprocessing.with_objects(tokenizer)
    return self_generated(model, SelfRequest(count, None, preprocessing, QUICK), run=Run(CPU, seed))


class Bigrams(nn.Module):
    """A language model whose next token depends on the last one alone, by known probabilities."""

    def __init__(self, probabilities: Tensor, *, caches: bool) -> None:
        super().__init__()
        self.logits, self.caches, self.lengths = nn.Parameter(probabilities.log()), caches, []

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = False) -> Any:
        self.lengths.append(input_ids.shape[1])
        return SimpleNamespace(logits=self.logits[input_ids], past_key_values=() if self.caches else None)


class RenamedCache(Bigrams):
    """The same with the name that the cache has in transformers from 5.24 on."""

    def forward(self, input_ids: Tensor, cache: Any = None, use_cache: bool = False) -> Any:
        output = super().forward(input_ids)
        return SimpleNamespace(logits=output.logits, cache=output.past_key_values)


@pytest.mark.parametrize(("kind", "caches"), [(Bigrams, True), (Bigrams, False), (RenamedCache, True)])
def test_a_language_model_of_known_bigrams_writes_text_with_these(kind: type[Bigrams], caches: bool) -> None:
    probabilities = torch.rand(5, 5, generator=torch.Generator().manual_seed(1)).softmax(-1)
    model = kind(probabilities, caches=caches)
    with torch.no_grad():
        texts = continued(model, torch.arange(400)[:, None] % 5, 40, sampler=sampler(5), told=quiet)
    assert texts.shape == (400, 40)
    assert texts[:, 0].tolist() == [number % 5 for number in range(400)]
    counts = torch.zeros(5, 5)
    counts.index_put_((texts[:, :-1].flatten(), texts[:, 1:].flatten()), torch.ones(400 * 39), accumulate=True)
    # Each row has about 3,000 draws: their standard error is below 0.01.
    assert torch.allclose(counts / counts.sum(1, keepdim=True), probabilities, atol=0.04)
    assert set(model.lengths) == ({1} if caches else set(range(1, 40)))


def test_a_low_temperature_takes_the_likeliest_token() -> None:
    logits = torch.tensor([[0.0, 1.0, 0.5], [2.0, 0.0, 1.9]]).repeat(50, 1)
    assert sampler(3, temperature=1e-3).draw(logits).reshape(-1, 2).tolist() == [[1, 0]] * 50


def test_what_is_cut_off_or_excluded_is_never_drawn() -> None:
    logits = torch.zeros(500, 6)
    drawn = Sampler(torch.Generator().manual_seed(0), 4, SelfGeneratedSettings(), excluded=(1,)).draw(logits)
    assert drawn.unique().tolist() == [0, 2, 3]


class Masked(nn.Module):
    """A masked language model that predicts a known token at each place, and notes what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.shown = nn.Parameter(torch.zeros(1)), []

    def forward(self, input_ids: Tensor) -> Any:
        self.shown.append(input_ids.clone())
        places = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        return SimpleNamespace(logits=100.0 * nn.functional.one_hot(places % 7, 12))


def test_masked_sampling_visits_every_place_once_a_part_in_each_round() -> None:
    model, start = Masked(), torch.full((5, 12), 11)
    start[:, 0], start[:, -1] = 8, 9
    with torch.no_grad():
        texts = unmasked(model, start, 11, sampler=sampler(12, unmasking_rounds=4), told=quiet)
    assert texts.tolist() == [[8, *(place % 7 for place in range(1, 11)), 9]] * 5
    tried, *rounds = model.shown
    assert len(tried) == 1  # whether it has a head
    assert [int((shown == 11).sum(1)[0]) for shown in rounds] == [10, 7, 5, 2]
    first = rounds[1] != 11
    assert len({tuple(row) for row in first.tolist()}) > 1  # in an order that differs from text to text
    filled = rounds[1] == rounds[2]
    assert filled[first].all()


def test_the_noise_of_images_has_the_spectrum_of_natural_ones() -> None:
    images = spectral_noise((200, 3, 16, 16), torch.Generator().manual_seed(0))
    amplitudes = torch.fft.fft2(images).abs().square().mean((0, 1)).sqrt()
    assert float(amplitudes[0, 2] / amplitudes[0, 8]) == pytest.approx(4, rel=0.1)
    assert float(images.std()) == pytest.approx(1)


def normalized() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip
    for _ in range(30):
        model(0.5 + 2 * torch.randn(16, 2, 8, 8))
    return model.eval().requires_grad_(False)


def test_matching_lowers_the_distance_to_the_statistics_of_training() -> None:
    model = normalized()
    noise = spectral_noise((32, 2, 8, 8), torch.Generator().manual_seed(0))
    settings = SelfGeneratedSettings(image_steps=60, image_learning_rate=0.1)
    images = matched(model, noise, run=model, settings=settings, told=quiet)

    def distance(inputs: Tensor) -> float:
        return float(statistics_distance(model, lambda: model(inputs)))

    assert distance(images) < 0.1 * distance(noise)
    assert distance(0.5 + 2 * torch.randn(512, 2, 8, 8)) < 0.1 * distance(noise)  # what it was trained on
    assert not images.requires_grad


def bert() -> nn.Module:
    return ARCHITECTURES["bert"].dense()


KINDS: dict[str, tuple[Callable[[], nn.Module], str, Any, dict[str, tuple[int, ...]]]] = {
    "gpt2": (ARCHITECTURES["gpt2"].dense, "causal language model", None, {"input_ids": (9,)}),
    "llama": (ARCHITECTURES["llama"].dense, "causal language model", Tokenizer(), {"input_ids": (9,)}),
    "bert": (bert, "masked language model", Tokenizer(), {"input_ids": (9,)}),
    "bert without tokenizer": (bert, "encoder", None, {"input_ids": (64,)}),
    "t5": (ARCHITECTURES["t5"].dense, "encoder-decoder", None, {"input_ids": (9,), "decoder_input_ids": (9,)}),
    "resnet": (ARCHITECTURES["resnet"].dense, "image model with batch normalization", None,
               {"pixel_values": (1, 224, 224)}),
    "vit": (ARCHITECTURES["vit"].dense, "image model", None, {"pixel_values": (1, 8, 8)}),
    "convolutions": (normalized, "image model with batch normalization", None, {"inputs": (2, 32, 32)}),
    "perceptron": (lambda: nn.Sequential(nn.Linear(5, 3)), "module", None, {"input": (5,)}),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_model_makes_examples_that_it_takes_the_same_for_a_seed(name: str) -> None:
    build, kind, tokenizer, shapes = KINDS[name]
    module = build()
    model = open_model(module)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    assert kind_of_model(model, model.preprocessing.with_objects(tokenizer)) == kind
    data = made(module, tokenizer=tokenizer)
    batch = data.read(range(6))
    assert {key: tuple(each.shape) for key, each in batch.inputs.items()} == {
        key: (6, *shape) for key, shape in shapes.items()
    }
    again, other = made(module, tokenizer=tokenizer), made(module, seed=1, tokenizer=tokenizer)
    for key, tensor in batch.inputs.items():
        assert torch.equal(tensor, again.read(range(6)).inputs[key])
        assert not torch.equal(tensor, other.read(range(6)).inputs[key])
        assert len(tensor.unique(dim=0)) == 6
    assert all(torch.equal(before[key], tensor) for key, tensor in module.state_dict().items())
    assert [each.requires_grad for each in module.parameters()] == [each.requires_grad for each in build().parameters()]


def test_a_model_whose_blocks_are_read_for_every_token_writes_the_same(tmp_path: Path) -> None:
    ARCHITECTURES["llama"].dense().save_pretrained(tmp_path)
    request = SelfRequest(4, 6, Preprocessing(), SelfGeneratedSettings())
    ours, theirs = (
        self_generated(open_model(tmp_path), request, run=Run(CPU), by_block=by_block).read(range(4))
        for by_block in (True, False)
    )
    assert torch.equal(ours.inputs["input_ids"], theirs.inputs["input_ids"])


def test_texts_begin_as_the_tokenizer_begins_them() -> None:
    tokens = made(ARCHITECTURES["llama"].dense(), tokenizer=Tokenizer()).read(range(6)).inputs["input_ids"]
    assert tokens[:, 0].tolist() == [1] * 6
    assert (tokens[:, 1] > 3).all()
    masked = made(bert(), tokenizer=Tokenizer()).read(range(6)).inputs["input_ids"]
    assert masked[:, 0].tolist() == [1] * 6
    assert masked[:, -1].tolist() == [2] * 6
    assert (masked[:, 1:-1] > 3).all()


def test_a_model_that_needs_data_says_so_in_one_line() -> None:
    with pytest.raises(BadInput, match=r"cannot make its own examples.*takes inputs query, key, value") as raised:
        compress(nn.MultiheadAttention(8, 2), keep=0.5, calibration="self", prefer="size", bits=16)
    assert "\n" not in str(raised.value)
    assert str(raised.value).count("give `") == 1


def test_a_compression_calibrated_on_itself_says_what_was_done() -> None:
    fast = CalibrationSettings(
        exponents=(1.0,), recalibration_rounds=0, compensate=False, refine=False, self_generated=QUICK
    )
    asked = {"keep": 0.7, "calibration_samples": 8, "calibration_settings": fast, "prefer": "size", "bits": 16}
    model = ARCHITECTURES["llama"].dense()
    small, same, other = (compress(model, calibration="self", seed=seed, **asked) for seed in (0, 0, 1))
    assert small.plan.calibration is not None
    assert (small.plan.calibration.examples, small.plan.calibration.holdout) == (6, 2)
    assert "6 texts that the model wrote itself; loss increase" in str(small)
    assert not any("without calibration" in words for words in small.warnings)
    states = [each.model.state_dict() for each in (small, same, other) if each.model is not None]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert any(not torch.equal(tensor, states[2].get(name, tensor[:0])) for name, tensor in states[0].items())


def test_none_of_them_is_no_calibration() -> None:
    model = nn.Sequential(nn.Linear(12, 12))
    assert compress(model, keep=0.5, calibration="none", prefer="size").plan.calibration is None
    with pytest.raises(BadInput, match="about calibration data, and none were given"):
        compress(model, keep=0.5, calibration="none", seed=3)
