"""Finding the recipe of a model: what was asked for, then the files beside the model, by order of trust."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from compressor.documents import read_text, read_yaml
from compressor.errors import BadInput
from compressor.recipe.card import has_hyperparameters, read_model_card
from compressor.recipe.deepspeed import read_deepspeed_config
from compressor.recipe.recipe import TrainingRecipe, merge
from compressor.recipe.timm import read_timm_args
from compressor.recipe.trainer import read_trainer_state, read_training_args

_log = logging.getLogger(__name__)

# Keys by which a DeepSpeed configuration is recognised.
_OF_DEEPSPEED = {"train_batch_size", "train_micro_batch_size_per_gpu", "zero_optimization"}

Reader = Callable[[Path], TrainingRecipe]


def read_recipe_file(path: str | Path) -> TrainingRecipe:
    """The recipe in a YAML or JSON file whose keys are the fields of `TrainingRecipe`.

    Raises `BadInput` for an unknown key, naming the ones that resemble it, and for an impossible value.
    """
    path = Path(path)
    return TrainingRecipe.from_dict(read_yaml(path), source=path.name)


# The files that tell how a model was trained, the most trusted first.
_BESIDE_THE_MODEL: tuple[tuple[str, Reader], ...] = (
    ("training_args.bin", read_training_args),
    ("trainer_state.json", read_trainer_state),
    ("args.yaml", read_timm_args),
    ("ds_config.json", read_deepspeed_config),
    ("README.md", read_model_card),
    ("recipe.yaml", read_recipe_file),
    ("recipe.json", read_recipe_file),
)


def read_recipe(path: str | Path) -> TrainingRecipe:
    """The recipe in a file of any format that this package reads, told apart by what is in it.

    Raises `BadInput` if it cannot be read as any of them.
    """
    path = Path(path)
    return _reader_for(path)(path)


def find_recipe(
    model: str | Path, *, flags: TrainingRecipe | None = None, recipe_file: str | Path | None = None
) -> TrainingRecipe:
    """What is known about how `model` (a folder, or a file in one) was trained.

    By order of trust: `flags`, `recipe_file`, and beside the model `training_args.bin`,
    `trainer_state.json`, timm's `args.yaml`, `ds_config.json` the card `README.md`, and a plain `recipe.yaml` or
    `recipe.json`. A file that was only found is left out, with a warning in the log, if it is broken or if what is
    trusted more rules it out.
    Raises `BadInput` if `recipe_file` is broken or contradicts `flags`.
    """
    folder = Path(model)
    folder = folder if folder.is_dir() else folder.parent
    recipe = flags or TrainingRecipe()
    if recipe_file is not None:
        recipe = merge(recipe, read_recipe(recipe_file))
    for name, read in _BESIDE_THE_MODEL:
        path = folder / name
        if not path.is_file():
            continue
        try:
            recipe = merge(recipe, read(path))
        except BadInput as error:
            _log.warning("left out of the training recipe: %s (%s)", path, error)
    return recipe


def _reader_for(path: Path) -> Reader:
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise BadInput(
            f"cannot be read ({error.strerror or error})", where=path, remedy="check the path of the recipe"
        ) from error
    # A pickle of protocol 2 or above starts with 0x80, which no UTF-8 text does.
    if start.startswith(b"\x80") or zipfile.is_zipfile(path):
        return read_training_args
    if path.name == "trainer_state.json":
        return read_trainer_state
    if path.suffix.lower() == ".md" or has_hyperparameters(read_text(path)):
        return read_model_card
    return _reader_of_mapping(read_yaml(path))


def _reader_of_mapping(document: dict[str, Any]) -> Reader:
    keys = document.keys()
    if {"global_step", "log_history"} <= keys:
        return read_trainer_state
    if {"opt", "sched"} <= keys:
        return read_timm_args
    # A recipe with a stray DeepSpeed key must be told so, and not be taken for a DeepSpeed configuration.
    own = keys & ({entry.name for entry in fields(TrainingRecipe)} - {"optimizer"})
    if not own and (isinstance(document.get("optimizer"), dict) or keys & _OF_DEEPSPEED):
        return read_deepspeed_config
    return read_recipe_file
