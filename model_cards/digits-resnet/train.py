"""Trains digits-resnet from nothing: a residual network that reads handwritten digits."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import ResNetConfig, ResNetForImageClassification

FOLDER = Path(__file__).resolve().parent
SEED = 0
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.05, 0.9, 5e-4
BATCH_SIZE, EPOCHS = 32, 50
MAX_GRADIENT_NORM = 5.0


def build_model() -> ResNetForImageClassification:
    """Return the untrained model: three residual blocks of 64, 64 and 128 channels.

    The stem leaves 2 x 2 positions of an 8 x 8 image, which the first two blocks keep and the last one joins.
    """
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1,
            embedding_size=32,
            hidden_sizes=[64, 128],
            depths=[2, 1],
            layer_type="basic",
            id2label={digit: str(digit) for digit in range(10)},
            label2id={str(digit): digit for digit in range(10)},
        )
    )


def main() -> None:
    """Train, measure, and write the folder."""
    sys.path.append(str(FOLDER.parent))
    from card import Card, Result, write_card
    from image_training import DATA, Schedule, accuracy, build_image_processor, preprocessed, save, train

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    processor, model = build_image_processor(), build_model()
    data = {split: preprocessed(processor, split) for split in ("train", "validation", "test")}
    train(
        model,
        torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY),
        data["train"],
        schedule=Schedule(
            batch_size=BATCH_SIZE,
            epochs=EPOCHS,
            warmup_steps=0,
            max_gradient_norm=MAX_GRADIENT_NORM,
            seed=SEED,
        ),
    )
    save(model, processor, FOLDER)
    accuracies = {split: accuracy(model, *each) for split, each in data.items()}
    write_card(
        FOLDER,
        Card(
            name=FOLDER.name,
            summary="A small residual network with batch normalization that reads handwritten digits.",
            intended_use="""
A reference for compressing convolutions: small enough to train, compress and evaluate anywhere. Its images are
8 x 8 pixels; it is of no use for others.
""",
            data=DATA + "Training moves every image by up to a pixel each way at random.",
            task="image-classification",
            dataset=("builtin:digits", "UCI handwritten digits"),
            libraries=("transformers", "torch"),
            tags=("resnet", "sgd", "reference-model"),
            hyperparameters={
                "learning_rate": LEARNING_RATE,
                "train_batch_size": BATCH_SIZE,
                "eval_batch_size": len(data["test"][1]),
                "seed": SEED,
                "gradient_accumulation_steps": 1,
                "total_train_batch_size": BATCH_SIZE,
                "optimizer": f"Use OptimizerNames.SGD with optimizer_args=momentum={MOMENTUM}",
                "lr_scheduler_type": "cosine",
                "lr_scheduler_warmup_steps": 0,
                "num_epochs": EPOCHS,
                "weight_decay": WEIGHT_DECAY,
                "momentum": MOMENTUM,
                "nesterov": False,
                "max_grad_norm": MAX_GRADIENT_NORM,
                "dataset_size": len(data["train"][1]),
                "sequence_length": 1,
                "undecayed": [],
            },
            results=(Result("accuracy", "accuracy", *accuracies.values(), digits=4),),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
        ),
        extra_figures={},
    )


if __name__ == "__main__":
    main()
