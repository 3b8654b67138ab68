"""Random inputs that a model takes, known from its configuration or its first layer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compressor import BadInput
from compressor.model import Model, open_model, open_runnable
from compressor.model.example_inputs import example_inputs, most_tokens, ordinary_tokens
from compressor.model.inference import forward_call
from tests.lowrank.architectures import ARCHITECTURES

CARDS = Path(__file__).parents[2] / "model_cards"


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def made(model: Model, count: int = 3, length: int | None = None) -> dict[str, Tensor]:
    return example_inputs(model, count, generator=seeded(), length=length)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_of_transformers_takes_its_inputs(name: str) -> None:
    module = ARCHITECTURES[name].dense()
    inputs = made(open_runnable(module), length=7)
    expected = {name: tensor.dtype for name, tensor in ARCHITECTURES[name].inputs().items()}
    assert {name: tensor.dtype for name, tensor in inputs.items()} == expected
    assert all(len(each) == 3 for each in inputs.values())
    with torch.no_grad():
        logits = forward_call(module, inputs)().logits
    assert len(logits) == 3
    if "input_ids" in inputs:
        assert inputs["input_ids"].shape == (3, 7)
        assert inputs["input_ids"].max() < module.config.vocab_size


def test_tokens_are_ordinary_ones_of_all_the_vocabulary() -> None:
    model = open_runnable(ARCHITECTURES["llama"].dense())
    assert ordinary_tokens(model).tolist() == list(range(3, 60))
    assert made(model, 64)["input_ids"].unique().tolist() == list(range(3, 60))
    assert torch.equal(made(model)["input_ids"], made(model)["input_ids"])


def test_texts_are_as_long_as_the_model_takes() -> None:
    assert made(open_runnable(ARCHITECTURES["gpt2"].dense()))["input_ids"].shape == (3, 32)
    assert made(open_runnable(ARCHITECTURES["gpt2"].dense()), length=90)["input_ids"].shape == (3, 32)
    assert made(open_runnable(ARCHITECTURES["t5"].dense()))["input_ids"].shape == (3, 128)


def test_positions_of_the_padding_are_not_taken() -> None:
    import transformers

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.RobertaConfig(**sizes, vocab_size=30, max_position_embeddings=20, pad_token_id=1)
    module = transformers.RobertaForMaskedLM(config).eval()
    model = open_runnable(module)
    assert most_tokens(model) == 18
    assert forward_call(module, made(model))().logits.shape == (3, 18, 30)


def test_images_of_a_folder_are_in_its_normalization_and_size() -> None:
    images = made(open_model(CARDS / "digits-resnet"), 50)["pixel_values"]
    assert images.shape == (50, 1, 8, 8)
    assert images.min() == pytest.approx((0 - 0.3056) / 0.3757, abs=1e-2)
    assert images.max() == pytest.approx((1 - 0.3056) / 0.3757, abs=1e-2)


class Reshaped(nn.Module):
    """Convolutions whose outputs are flattened: images of one size."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.norm, self.convolution = nn.BatchNorm2d(2), nn.Conv2d(2, 4, 3, padding=1)
        self.head = nn.Linear(4 * side * side, 5)

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        return self.head(self.convolution(self.norm(x)).flatten(1))


class Branching(nn.Module):
    """A network that looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.LSTM(5, 7, batch_first=True), nn.Linear(7, 2)

    def forward(self, x: Tensor, start: Tensor | None = None) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), (12,)),
    "over positions": (lambda: nn.Sequential(nn.Linear(6, 6), nn.Conv1d(9, 2, 1)), (9, 6)),
    "28 x 28": (lambda: Reshaped(28), (2, 28, 28)),
    "any size": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)), (3, 32, 32)),
    "large images": (lambda: nn.Sequential(nn.Conv2d(3, 4, 7, stride=2), nn.AdaptiveAvgPool2d(1)), (3, 224, 224)),
    "volume": (lambda: nn.Sequential(nn.Conv3d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 6**3, 2)), (1, 8, 8, 8)),
    "branching": (Branching, (6,)),
    "recurrent": (Recurrent, (9, 5)),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), (9, 8)),
    "tokens": (lambda: nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 2)), (9,)),
}


@pytest.mark.parametrize("kind", MODULES)
def test_a_module_takes_inputs_that_are_known_from_its_first_layer(kind: str) -> None:
    build, shape = MODULES[kind]
    module = build().eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    inputs = made(open_runnable(module), length=9)
    assert inputs["input"].shape == (3, *shape)
    with torch.no_grad():
        assert len(module(inputs["input"])) == 3
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_a_shape_can_be_said() -> None:
    model = open_runnable(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)))
    assert example_inputs(model, 2, generator=seeded(), shape=(3, 40, 50))["input"].shape == (2, 3, 40, 50)


class Locked(nn.Module):
    """A network that cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.lock = nn.Linear(6, 6), threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


UNKNOWN = {
    "Locked takes inputs of an unknown shape": Locked,
    "MultiheadAttention takes inputs query, key, value,": lambda: nn.MultiheadAttention(8, 2),
    "Sequential takes inputs of an unknown shape": lambda: nn.Sequential(nn.LSTM(5, 7)),
    "Reshaped takes inputs of an unknown shape": lambda: Reshaped(13),
}


@pytest.mark.parametrize("words", UNKNOWN)
def test_unknown_inputs_ask_for_data(words: str) -> None:
    with pytest.raises(BadInput, match=words) as raised:
        made(open_runnable(UNKNOWN[words]()))
    assert "give `data` or `calibration`" in str(raised.value)
    assert "\n" not in str(raised.value)
