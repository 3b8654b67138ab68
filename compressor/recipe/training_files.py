"""The files that training leaves beside a model, by name."""

from __future__ import annotations

from pathlib import Path

TRAINING_ARGUMENTS = "training_args.bin"

# What a Trainer and accelerate save of the optimizer and its schedule.
OPTIMIZER_STATES = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scheduler.bin")

# Descriptions of a training, which are true of the original weights alone.
DESCRIPTIONS = ("trainer_state.json", "args.yaml", "ds_config.json", "recipe.*", "training_args.json", "hparams.yaml")

_STATES = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states")


def is_training_state(path: Path) -> bool:
    """Whether a file name is that of an optimizer, a scheduler, a random state, or a trainer's arguments."""
    return path.name.startswith(_STATES)
