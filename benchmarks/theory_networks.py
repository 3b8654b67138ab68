"""The small networks of benchmarks/theory.py, on scikit-learn's digits, and how they are trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor import TrainingRecipe
from compressor.data.builtin_data import digits


class Attention(nn.Module):
    """Self-attention of two heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        query, key, value = self.qkv(x).view(batch, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """The eight rows of a digit are its tokens."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(8, width), nn.Parameter(0.1 * torch.randn(8, width))
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(images.flatten(1, 2)) + self.position).mean(1)))


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def convolutional() -> nn.Module:
    layers: list[nn.Module] = []
    for channels, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 1)):
        layers += [nn.Conv2d(channels, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


@dataclass(frozen=True)
class Network:
    """A network and the grid it is trained over.

    `hidden`: its matrices whose ranks are studied, with how often an example uses each. `most_steps`: runs that would
    take longer to forget so much of their start as is compared are left out of that comparison.
    """

    name: str
    build: Callable[[], nn.Module]
    hidden: dict[str, int]
    epochs: int
    batches: Sequence[int]
    learning_rates: Sequence[float]
    weight_decays: Sequence[float]
    most_steps: int
    adamw_decays: Sequence[float] = (0.3, 1.0)


NETWORKS = (
    Network(
        "perceptron",
        perceptron,
        {"1": 1, "3": 1},
        epochs=60,
        batches=(4, 16, 64),
        learning_rates=(0.05, 0.1),
        weight_decays=(0.0, 1e-3, 3e-3, 1e-2),
        most_steps=14_000,
    ),
    Network(
        "convolutions, batch norm",
        convolutional,
        {"3": 16, "6": 16},
        epochs=20,
        batches=(4, 16, 64),
        learning_rates=(0.05, 0.1),
        weight_decays=(0.0, 4e-3, 1.2e-2),
        most_steps=7_000,
    ),
    Network(
        "transformer",
        Transformer,
        {
            f"blocks.{block}.{layer}": 8
            for block in (0, 1)
            for layer in ("attention.qkv", "attention.out", "up", "down")
        },
        epochs=20,
        batches=(4, 16, 64),
        learning_rates=(0.05, 0.1),
        weight_decays=(0.0, 2e-3, 8e-3),
        most_steps=10_100,
    ),
)


def steps_of(network: Network, batch: int) -> int:
    """Optimizer steps of the network's epochs."""
    return network.epochs * (len(digits("train")[1]) // batch)


def trained(
    network: Network, recipe: TrainingRecipe, *, lengths: Sequence[int], seed: int
) -> Iterator[tuple[nn.Module, TrainingRecipe]]:
    """Train at a constant learning rate, and give a copy of the network, in evaluation mode, after each of `lengths`.

    With each comes the recipe of training for so long.
    """
    assert recipe.learning_rate is not None
    assert recipe.weight_decay is not None
    assert recipe.batch_size is not None
    torch.manual_seed(seed)
    model = network.build()
    rates = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    optimizer = (
        torch.optim.AdamW(model.parameters(), **rates)
        if recipe.optimizer == "adamw"
        else torch.optim.SGD(model.parameters(), momentum=recipe.momentum or 0.0, **rates)
    )
    images, labels = digits("train")
    rows = torch.empty(0, dtype=torch.int64)
    for step in range(1, max(lengths) + 1):
        if len(rows) < recipe.batch_size:  # the last few examples of an epoch are left out
            rows = torch.randperm(len(labels))
        chosen, rows = rows[: recipe.batch_size], rows[recipe.batch_size :]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        if step in lengths:
            yield copy.deepcopy(model).eval(), TrainingRecipe.from_dict(recipe.to_dict() | {"steps": step})


@torch.no_grad()
def accuracy(model: nn.Module, splits: Sequence[str] = ("validation", "test")) -> float:
    """On examples that were neither trained on nor used to choose anything."""
    images, labels = (torch.cat(halves) for halves in zip(*(digits(split) for split in splits), strict=True))  # type: ignore[arg-type]
    return float((model(images).argmax(1) == labels).double().mean())
