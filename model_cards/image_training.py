"""Trains, measures and saves a transformers classifier of the UCI digits; two of the training scripts share it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ViTImageProcessor, get_cosine_schedule_with_warmup

from compressor.data.builtin_data import Split, digits

SIZE = 8  # pixels, both ways

DATA = """
The 1797 digits of the UCI repository as scikit-learn carries them, 8 x 8 pixels in [0, 1]:
`compressor.data.builtin_data.digits` puts 60 % into training, 20 % into validation and 20 % into the test.
`preprocessor_config.json` normalizes pixels by their mean and standard deviation over the training split.
"""


def build_image_processor() -> ViTImageProcessor:
    """Return the preprocessing: pixels of the training split get mean 0 and standard deviation 1."""
    images, _ = digits("train")
    return ViTImageProcessor(
        size={"height": SIZE, "width": SIZE},
        image_mean=[round(float(images.mean()), 4)],
        image_std=[round(float(images.std()), 4)],
    )


def preprocessed(processor: ViTImageProcessor, split: Split) -> tuple[Tensor, Tensor]:
    """Return pixel values `(N, 1, 8, 8)` and labels `(N,)` of one split."""
    images, labels = digits(split)
    pixels = [image.permute(1, 2, 0).numpy() for image in images]
    encoded = processor(
        images=pixels, input_data_format="channels_last", do_rescale=False, do_resize=False, return_tensors="pt"
    )
    return encoded["pixel_values"], labels


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images `(B, 1, 8, 8)` moved by up to a pixel each way at random, with their background moving in."""
    padded = nn.functional.pad(images, (1, 1, 1, 1), value=float(images.min()))
    offsets = torch.randint(3, (len(images), 2), generator=generator).tolist()
    return torch.stack([image[:, y : y + SIZE, x : x + SIZE] for image, (y, x) in zip(padded, offsets, strict=True)])


@dataclass(frozen=True)
class Schedule:
    """How long a model is trained, and in which steps."""

    batch_size: int
    epochs: int
    warmup_steps: int
    max_gradient_norm: float
    seed: int


def train(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor], *, schedule: Schedule
) -> None:
    """Fit the model to shifted images with their labels; it is in evaluation mode afterwards.

    The learning rate is warmed up, and then follows a cosine.
    """
    images, labels = data
    steps = schedule.epochs * math.ceil(len(images) / schedule.batch_size)
    learning_rate = get_cosine_schedule_with_warmup(optimizer, schedule.warmup_steps, steps)
    generator = torch.Generator().manual_seed(schedule.seed)
    model.train()
    for _ in range(schedule.epochs):
        for batch in torch.randperm(len(images), generator=generator).split(schedule.batch_size):
            logits = model(pixel_values=shifted(images[batch], generator)).logits
            nn.functional.cross_entropy(logits, labels[batch]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), schedule.max_gradient_norm)
            optimizer.step()
            learning_rate.step()
            optimizer.zero_grad()
    model.eval()


@torch.inference_mode()
def accuracy(model: PreTrainedModel, images: Tensor, labels: Tensor) -> float:
    """Return the share of images whose largest logit is at their label."""
    return float((model(pixel_values=images).logits.argmax(dim=1) == labels).double().mean())


def save(model: PreTrainedModel, processor: ViTImageProcessor, folder: Path) -> None:
    """Write weights, configuration and preprocessing."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes 0600
