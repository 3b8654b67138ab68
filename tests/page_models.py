"""What the names in the pages stand for when their blocks are run: tiny models, adapters, and data in one folder."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)

import compressor
from compressor.initial import keep_initial
from tests.adapters.adapters_of import peft_folder
from tests.conftest import ALPHABET

ROOT = Path(__file__).parents[1]
CODE = """from torch import nn


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 2),
        )


def build_network():
    return Net()


build = build_network
"""
RECIPE = """---
training:
  optimizer: sgd
  learning_rate: 0.1
  weight_decay: 0.01
  batch_size: 8
  steps: 2000
---
"""


def network() -> nn.Module:
    """The network that `CODE` builds, and this module's own of it."""
    names: dict[str, Any] = {}
    exec(CODE, names)
    torch.manual_seed(0)
    built: nn.Module = names["build_network"]()
    return built


def llama(steps: int = 1) -> LlamaForCausalLM:
    """A language model of seed 0, and on its start what so many steps of training wrote, of rank 4."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 2 + len(ALPHABET), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    tokens = {"bos_token_id": None, "eos_token_id": None}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens)).eval()
    for step in range(steps):
        write(model, step)
    return model


def write(model: nn.Module, step: int) -> None:
    """Add a change of rank 4 to every matrix."""
    torch.manual_seed(100 + step)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                matrix = weight.flatten(1)
                change = torch.randn(len(matrix), 4) @ torch.randn(4, matrix.shape[1])
                matrix.add_(change, alpha=0.03 / (1 + step))


def vit() -> ViTForImageClassification:
    """An image classifier of the digits, of seed 0."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1, num_labels=10))
    write(model.eval(), 0)
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def text(seed: int, length: int = 12_000) -> str:
    """Words of a small language, so that one letter says something of the next."""
    drawn = random.Random(seed)
    words = ["".join(drawn.choices(ALPHABET[:8], k=drawn.randint(2, 5))) for _ in range(30)]
    return " ".join(drawn.choices(words, k=length // 4))


def make(place: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write everything that pages name into a folder."""
    _language_models(place, tokenizer)
    _adapters(place)
    _networks(place)
    for seed, name in enumerate(("train", "test", "text")):
        (place / f"{name}.txt").write_text(text(seed))
    (place / "test.jsonl").write_text("".join(json.dumps({"text": text(seed, 400)}) + "\n" for seed in range(8)))
    for folder, seed in (("images", 0), ("test", 1)):
        _images(place / folder, seed)
    (place / "run.yaml").write_text("keep: 0.6\ncalibration: none\n")
    (place / "recipe.yaml").write_text("optimizer: sgd\nlearning_rate: 0.1\nweight_decay: 0.01\nbatch_size: 8\n")


def _language_models(place: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    def folder(name: str, model: LlamaForCausalLM, **state: Any) -> None:
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
        (place / name / "README.md").write_text(RECIPE)
        if state:
            (place / name / "trainer_state.json").write_text(json.dumps(state))

    folder("model", llama())
    folder("original", llama())
    folder("tuned", llama(2))
    for steps in (1, 2, 3):
        folder(f"RUN/checkpoint-{500 * steps}", llama(steps), global_step=500 * steps, max_steps=1500)
    folder("untrained", llama(0))
    keep_initial(llama(0), place / "RUN", seeds=[0])
    shutil.copyfile(place / "model" / "model.safetensors", place / "model.safetensors")
    compressor.compress(place / "model", keep=0.5, prefer="size", calibration="none", output=place / "model-compressed")


def _adapters(place: Path) -> None:
    from peft import LoraConfig, get_peft_model

    for seed, name in enumerate(("adapter-a", "adapter-b")):
        base = LlamaForCausalLM.from_pretrained(place / "original")
        adapted = get_peft_model(base, LoraConfig(r=20, lora_alpha=20, target_modules="all-linear"))
        torch.manual_seed(200 + seed)
        with torch.no_grad():
            for key, factor in adapted.named_parameters():
                if "lora_" in key:
                    factor.normal_(std=0.05)
        adapted.save_pretrained(place / name)
    peft_folder(place / "adapter-of-unet")


def _networks(place: Path) -> None:
    (place / "package").mkdir()
    for name in ("model.py", "train.py", "package/module.py"):
        (place / name).write_text(CODE)
    net = network()
    for step in (0, 1):
        write(net, step)
    (place / "run").mkdir()
    save_file(weights(net), place / "weights.safetensors")
    torch.save(net.state_dict(), place / "run" / "model.pt")
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        part = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))
        save_file(weights(part), place / f"{name}.safetensors")
    compressor.compress(place / "weights.safetensors", keep=0.6, output=place / "small.safetensors")
    cards = place / "model_cards"
    cards.mkdir()
    vit().save_pretrained(cards / "digits-vit")
    shutil.copy(ROOT / "model_cards" / "digits-vit" / "preprocessor_config.json", cards / "digits-vit")
    shutil.copytree(place / "model", cards / "stdlib-llama")
    for name in ("digits-mlp", "digits-resnet"):
        shutil.copytree(ROOT / "model_cards" / name, cards / name)
    for name in ("image_training.py", "card.py"):
        shutil.copy(ROOT / "model_cards" / name, cards)
    shutil.copytree(ROOT / "examples", place / "examples")


def _images(place: Path, seed: int) -> None:
    """Two classes, the darker and the lighter."""
    drawn = np.random.default_rng(seed)
    for label in (0, 1):
        (place / f"class{label}").mkdir(parents=True)
        for number in range(8):
            pixels = drawn.integers(100 * label, 156 + 100 * label, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"class{label}" / f"{number}.png")
