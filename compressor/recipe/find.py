"""Finding the recipe of a model: what was asked for, then the files beside the model, by order of trust."""

from __future__ import annotations

import io
import logging
import math
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from compressor.documents import read_regular_file, read_text, read_yaml
from compressor.errors import BadInput
from compressor.recipe.card import has_hyperparameters, read_model_card
from compressor.recipe.deepspeed import read_deepspeed_config
from compressor.recipe.recipe import TrainingRecipe, fields_like, merge_recipes
from compressor.recipe.settings import has_settings, possible_recipe, read_settings
from compressor.recipe.timm import read_timm_args
from compressor.recipe.trainer import read_trainer_state, read_training_args
from compressor.recipe.training_files import TRAINING_ARGUMENTS

logger = logging.getLogger(__name__)

# Keys by which a DeepSpeed configuration is recognized.
_MOST_BYTES = 2**26
# Fields in which two files are compared; of the others some are told in several ways that do not contradict.
_COMPARED = (
    *("optimizer", "decoupled_weight_decay", "nesterov", "momentum", "dampening", "learning_rate", "weight_decay"),
    *("schedule", "batch_size", "steps", "dataset_size", "sequence_length", "base_model"),
)
_OF_DEEPSPEED = {"train_batch_size", "train_micro_batch_size_per_gpu", "zero_optimization"}

Reader = Callable[[Path], TrainingRecipe]


def read_recipe_file(path: str | Path) -> TrainingRecipe:
    """The recipe in a YAML or JSON file whose keys are the fields of `TrainingRecipe`.

    A key that resembles none of them, such as what else a script keeps in the file, is left out with a warning.
    Raises `BadInput` for a misspelled field, naming the ones that resemble it, and for an impossible value.
    """
    path = Path(path)
    known, unknown = _known_and_unknown(read_yaml(path))
    misspelled = {key: value for key, value in unknown.items() if fields_like(key)}
    recipe = TrainingRecipe.from_dict(known | misspelled, source=path.name)
    if unknown and not known:
        raise BadInput(
            f"holds no training hyperparameter, only {_listed(unknown)}",
            where=path,
            remedy="name them as " + ", ".join(entry.name for entry in fields(TrainingRecipe)[:-1]),
        )
    if unknown:
        logger.warning("%s: no part of a training recipe, and left out: %s", path, _listed(unknown))
    return recipe


def _read_recipe_beside(path: Path) -> TrainingRecipe:
    """The recipe in a file that nobody named: unusable entries are skipped with a warning."""
    known, unknown = _known_and_unknown(read_yaml(path))
    sources = known.pop("sources", None)
    recipe, why = possible_recipe(known, path.name)
    if isinstance(sources, dict) and all(isinstance(each, str) for pair in sources.items() for each in pair):
        recipe = replace(recipe, sources={**recipe.sources, **sources})
    for reason in why:
        logger.warning("left out of the training recipe: %s (%s)", path, reason)
    for key in unknown:
        if close := fields_like(key):
            logger.warning("%s: unknown hyperparameter %r; did you mean %s?", path, key[:80], " or ".join(close))
    if others := {key: value for key, value in unknown.items() if not fields_like(key)}:
        logger.warning("%s: no part of a training recipe, and left out: %s", path, _listed(others))
    return recipe


def _known_and_unknown(document: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    names = {entry.name for entry in fields(TrainingRecipe)}
    known = {key: value for key, value in document.items() if key in names}
    return known, {key: value for key, value in document.items() if key not in names}


def _listed(unknown: dict[str, Any]) -> str:
    names = [repr(key[:40]) for key in list(unknown)[:8]]
    return ", ".join(names) + (f" and {len(unknown) - len(names)} more" if len(unknown) > len(names) else "")


def _read_arguments(path: Path) -> TrainingRecipe:
    """The recipe in an `args.yaml`, written by timm or by another tool."""
    document = read_yaml(path)
    return read_timm_args(path) if {"opt", "sched"} <= document.keys() else read_settings(path)


# The files that tell how a model was trained, the most trusted first.
_BESIDE_THE_MODEL: tuple[tuple[str, Reader], ...] = (
    (TRAINING_ARGUMENTS, read_training_args),
    ("trainer_state.json", read_trainer_state),
    ("args.yaml", _read_arguments),
    ("hparams.yaml", read_settings),
    ("config.yaml", read_settings),
    (".hydra/config.yaml", read_settings),
    ("ds_config.json", read_deepspeed_config),
    ("README.md", read_model_card),
    ("recipe.yaml", _read_recipe_beside),
    ("recipe.json", _read_recipe_beside),
)


def read_recipe(path: str | Path) -> TrainingRecipe:
    """The recipe in a file of any format that this package reads; the format is recognized by the content.

    Raises `BadInput` if it cannot be read as any of them.
    """
    path = Path(path)
    return _reader_for(path)(path)


def stated_recipe(stated: Sequence[TrainingRecipe | Path]) -> TrainingRecipe:
    """Merge recipes, and files that contain one, the most trusted first.

    Raises `BadInput` if a file cannot be read, or they contradict each other.
    """
    return merge_recipes(*(read_recipe(each) if isinstance(each, Path) else each for each in stated))


def find_recipe(
    model: str | Path,
    stated: Sequence[TrainingRecipe | Path] = (),
    inside: Sequence[TrainingRecipe] = (),
) -> TrainingRecipe:
    """What is known about how `model` (a folder, or a file in one) was trained.

    In order of trust: what the user `stated`, what the checkpoint itself tells (`inside`, of `recipes_inside`), and
    the files beside the model: `training_args.bin`, `trainer_state.json`, `args.yaml`, `hparams.yaml`, a
    `config.yaml` (also of hydra), `ds_config.json`, the card `README.md`, and a plain `recipe.yaml` or
    `recipe.json`. Of a file that was only found everything that can be used is; what cannot, and where two of them
    disagree, is told by a warning in the log.
    Raises `BadInput` if what is stated is broken or contradicts itself.
    """
    folder = Path(model)
    folder = folder if folder.is_dir() else folder.parent
    asked = stated_recipe(stated)
    found: list[TrainingRecipe] = list(inside)
    for name, read in _BESIDE_THE_MODEL:
        path = folder / name
        if not path.is_file():
            continue
        try:
            found.append(read(path))
        except BadInput as error:
            logger.warning("left out of the training recipe: %s (%s)", path, error)
    recipe = asked
    for each in found:
        _warn_of_disagreement(recipe, each, asked)
        try:
            recipe = merge_recipes(recipe, each)
        except BadInput as error:
            source = next(iter(each.sources.values()), "a file")
            logger.warning("left out of the training recipe: %s (%s)", source, error)
    return recipe


def _warn_of_disagreement(trusted: TrainingRecipe, other: TrainingRecipe, asked: TrainingRecipe) -> None:
    """Warn where two files disagree; a value that the user stated is meant to differ."""
    for name in _COMPARED:
        one, two = getattr(trusted, name), getattr(other, name)
        if one is None or two is None or getattr(asked, name) is not None or one == two:
            continue
        if isinstance(one, float) and isinstance(two, float) and math.isclose(one, two, rel_tol=1e-6):
            continue
        logger.warning(
            "the training recipe is not the same everywhere: %s is %s in %s and %s in %s; the first is used",
            name.replace("_", " "),
            one,
            trusted.sources.get(name, "one file"),
            two,
            other.sources.get(name, "another"),
        )


def _reader_for(path: Path) -> Reader:
    content = read_regular_file(path, _MOST_BYTES)
    # A pickle of protocol 2 or above starts with 0x80, which no UTF-8 text does.
    if content.startswith(b"\x80") or zipfile.is_zipfile(io.BytesIO(content)):
        return read_training_args
    if path.name == "trainer_state.json":
        return read_trainer_state
    if path.name == "hparams.yaml":
        return read_settings
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
    # Names of a script's own, such as lr and wd, and none of a recipe's: a file of settings.
    if not own and has_settings(document):
        return read_settings
    return read_recipe_file
