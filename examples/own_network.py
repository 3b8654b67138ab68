"""A network of one's own: trained on handwritten digits, then made smaller and faster, and measured.

    python examples/own_network.py [--keep 0.25] [--epochs 15] [--report FILE.html]

Nothing about it is made for compression: an ordinary convolutional network with batch normalization and an ordinary
recipe. It is trained in less than a minute of one core, and ranks alone make it faster: in few bits it would only be
smaller, which the last lines say. It needs the extras `data` and `report`.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import compressor

Batches = DataLoader[tuple[torch.Tensor, ...]]


def build_network() -> nn.Sequential:
    """`(N, 1, 8, 8)` images in, `(N, 10)` logits out."""

    def convolution(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
        return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()

    return nn.Sequential(
        *convolution(1, 64),
        *convolution(64, 128),
        nn.MaxPool2d(2),
        *convolution(128, 256),
        *convolution(256, 256),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1024, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


def loaders() -> tuple[Batches, Batches]:
    """Four fifths of the digits to train on, and a fifth that training never sees."""
    digits = load_digits()
    images, labels = torch.from_numpy(digits.images).float().unsqueeze(1) / 16, torch.from_numpy(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    seen, unseen = (TensorDataset(images[part], labels[part]) for part in (order[:1438], order[1438:]))
    return DataLoader(seen, batch_size=32, shuffle=True), DataLoader(unseen, batch_size=32)


def train(network: nn.Module, batches: Batches, epochs: int) -> None:
    """SGD with momentum, weight decay, and a cosine."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    network.train()
    for _ in range(epochs):
        for images, labels in batches:
            nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def main(given: list[str] | None = None) -> compressor.Compression:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.25, help="share of the layers' size to keep")
    parser.add_argument("--epochs", type=int, default=15, help="passes over the training images")
    parser.add_argument("--report", type=Path, help="a page to write")
    asked = parser.parse_args(given)
    torch.manual_seed(0)
    network, (train_loader, test_loader) = build_network(), loaders()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.info("training for %d epochs", asked.epochs)
    train(network, train_loader, asked.epochs)
    found = compressor.compress(
        network,
        keep=asked.keep,
        bits="16",
        prefer="speed",
        calibration=train_loader,
        data=test_loader,
    )
    print(found)
    if asked.report is not None:
        compressor.write_report(found, asked.report, overwrite=True)
    return found


if __name__ == "__main__":
    main()
