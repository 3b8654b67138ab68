"""Trains digits-vit from nothing: a vision transformer that reads handwritten digits."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import ViTConfig, ViTForImageClassification

FOLDER = Path(__file__).resolve().parent
SEED = 0
LEARNING_RATE, WEIGHT_DECAY, BETAS, EPSILON = 1e-3, 0.05, (0.9, 0.999), 1e-8
BATCH_SIZE, EPOCHS, WARMUP_STEPS = 32, 60, 100
MAX_GRADIENT_NORM = 1.0
IMAGE_SIZE, PATCH_SIZE, WIDTH = 8, 2, 96


def build_model() -> ViTForImageClassification:
    """Return the untrained model: four blocks of width 96 over sixteen patches of 2 x 2 pixels."""
    return ViTForImageClassification(
        ViTConfig(
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            num_channels=1,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            # 1 / sqrt(width), about: the default suits a width of 768, and leaves a narrow model slow to start
            initializer_range=0.1,
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
    groups = [
        {"params": [p for p in model.parameters() if p.ndim in {2, 4}], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim not in {2, 4}], "weight_decay": 0.0},
    ]
    train(
        model,
        torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON),
        data["train"],
        schedule=Schedule(
            batch_size=BATCH_SIZE,
            epochs=EPOCHS,
            warmup_steps=WARMUP_STEPS,
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
            summary="A small vision transformer that reads handwritten digits.",
            intended_use="""
A reference for compressing vision transformers: small enough to train, compress and evaluate anywhere. Its images are
8 x 8 pixels; it is of no use for others.
""",
            data=DATA + "Training moves every image by up to a pixel each way at random.",
            task="image-classification",
            dataset=("builtin:digits", "UCI handwritten digits"),
            libraries=("transformers", "torch"),
            tags=("vit", "adamw", "reference-model"),
            hyperparameters={
                "learning_rate": LEARNING_RATE,
                "train_batch_size": BATCH_SIZE,
                "eval_batch_size": len(data["test"][1]),
                "seed": SEED,
                "gradient_accumulation_steps": 1,
                "total_train_batch_size": BATCH_SIZE,
                "optimizer": f"Use OptimizerNames.ADAMW_TORCH with betas=({BETAS[0]},{BETAS[1]}) and "
                f"epsilon={EPSILON} and optimizer_args=No additional optimizer arguments",
                "lr_scheduler_type": "cosine",
                "lr_scheduler_warmup_steps": WARMUP_STEPS,
                "num_epochs": EPOCHS,
                "weight_decay": WEIGHT_DECAY,
                "max_grad_norm": MAX_GRADIENT_NORM,
                "dataset_size": len(data["train"][1]),
                "sequence_length": (IMAGE_SIZE // PATCH_SIZE) ** 2 + 1,
                "undecayed": "*.bias, *layernorm*, *cls_token, *position_embeddings",
            },
            results=(Result("accuracy", "accuracy", *accuracies.values(), digits=4),),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            notes="Weight decay acts on the matrices and the patch embedding's kernel, and on nothing else.",
        ),
        extra_figures={},
    )


if __name__ == "__main__":
    main()
