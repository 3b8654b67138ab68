"""The networks of benchmarks/initial.py: what they are, how they are trained, and what they are worth.

All learn the digits of scikit-learn, their pixels at mean 0 and standard deviation 1, at batch 32 with a cosine
schedule after 5 % of warm-up, and with gradients clipped at norm 1. Weight decay acts on matrices and kernels alone.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from compressor import TrainingRecipe
from compressor.data.builtin_data import Split, digits

CARDS = Path(__file__).parent.parent / "model_cards"
BATCH, WARMUP = 32, 0.05
DECAYED_DIMENSIONS = {2, 4}


def perceptron() -> nn.Module:
    """64-768-768-10."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 768), nn.ReLU(), nn.Linear(768, 768), nn.ReLU(), nn.Linear(768, 10)
    )


def convolutions() -> nn.Module:
    """Three convolutions and two dense layers."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 64, 1), (64, 128, 2), (128, 128, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))


def transformer() -> nn.Module:
    """The network of model_cards/digits-vit."""
    spec = importlib.util.spec_from_file_location("digits_vit", CARDS / "digits-vit" / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model: nn.Module = module.build_model()
    return model


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "perceptron": perceptron,
    "convolutions": convolutions,
    "vision transformer": transformer,
}


@dataclass(frozen=True)
class Optimizer:
    """How a network is optimized: the names are those of `TrainingRecipe`."""

    optimizer: str
    learning_rate: float
    weight_decay: float = 0.0
    momentum: float | None = None

    def over(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a model's parameters."""
        groups = [
            {"params": [each for each in model.parameters() if (each.ndim in DECAYED_DIMENSIONS) is decayed]}
            | {"weight_decay": self.weight_decay if decayed else 0.0}
            for decayed in (True, False)
        ]
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, self.learning_rate, momentum=self.momentum or 0.0)
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.optimizer]
        return kind(groups, self.learning_rate)

    def recipe(self, model: nn.Module, epochs: int) -> TrainingRecipe:
        """The same as the tool reads it."""
        undecayed = tuple(name for name, each in model.named_parameters() if each.ndim not in DECAYED_DIMENSIONS)
        return TrainingRecipe(
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            schedule="cosine",
            warmup_steps=warmup_steps(epochs),
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            batch_size=BATCH,
            steps=steps_of(epochs),
            undecayed=undecayed,
        )


OPTIMIZERS = {
    "SGD, momentum": Optimizer("sgd", 0.05, momentum=0.9),
    "SGD, momentum, decay": Optimizer("sgd", 0.05, 5e-4, momentum=0.9),
    "Adam": Optimizer("adam", 1e-3),
    "AdamW": Optimizer("adamw", 1e-3, 0.05),
    "AdamW, strong decay": Optimizer("adamw", 1e-3, 1.0),
}


@cache
def split_of(split: Split) -> tuple[Tensor, Tensor]:
    """Images `(N, 1, 8, 8)` and labels of one split."""
    pixels, _ = digits("train")
    images, labels = digits(split)
    return (images - pixels.mean()) / pixels.std(), labels


def steps_of(epochs: int) -> int:
    return epochs * math.ceil(len(split_of("train")[1]) / BATCH)


def warmup_steps(epochs: int) -> int:
    return round(WARMUP * steps_of(epochs))


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    outputs = model(images)
    logits: Tensor = outputs if isinstance(outputs, Tensor) else outputs.logits
    return logits


def trained(network: str, optimizer: Optimizer, *, seed: int, epochs: int) -> nn.Module:
    """The network after its training from the initialization that a seed draws, in evaluation mode."""
    torch.manual_seed(seed)
    model = BUILDERS[network]()
    stepper = optimizer.over(model)
    schedule = get_cosine_schedule_with_warmup(stepper, warmup_steps(epochs), steps_of(epochs))
    images, labels = split_of("train")
    order = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=order).split(BATCH):
            stepper.zero_grad()
            nn.functional.cross_entropy(logits_of(model, images[batch]), labels[batch]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            stepper.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def quality(model: nn.Module) -> tuple[float, float]:
    """Accuracy and loss in nats on the test split."""
    images, labels = split_of("test")
    logits = logits_of(model, images)
    accuracy = float((logits.argmax(-1) == labels).double().mean())
    return accuracy, float(nn.functional.cross_entropy(logits, labels))


def calibration_batches(seed: int, *, count: int = 128) -> list[tuple[Tensor, Tensor]]:
    """Examples of the training split, at random."""
    images, labels = split_of("train")
    rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:count]
    return [(images[batch], labels[batch]) for batch in rows.split(16)]
