"""Hyperparameters under the names that training scripts give them: arguments, configurations, `hparams.yaml`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compressor.documents import read_yaml
from compressor.errors import BadInput
from compressor.recipe.recipe import TrainingRecipe, finite_number, whole_seed

# The field of a recipe: the names under which scripts keep it, the clearest first.
_NAMES: dict[str, tuple[str, ...]] = {
    "optimizer": ("optimizer", "optim", "opt", "optimizer_name", "optimizer_type", "optim_name"),
    "learning_rate": ("learning_rate", "lr", "base_lr", "init_lr", "initial_lr", "peak_lr", "max_lr", "lr0"),
    "weight_decay": ("weight_decay", "wd", "weightdecay"),
    "momentum": ("momentum", "sgd_momentum"),
    "nesterov": ("nesterov",),
    "dampening": ("dampening",),
    "schedule": ("lr_scheduler_type", "lr_scheduler", "scheduler", "sched", "lr_schedule", "schedule"),
    "warmup_steps": ("warmup_steps", "num_warmup_steps", "warmup_iters", "warmup_updates"),
    "schedule_steps": (
        *("max_steps", "num_steps", "total_steps", "max_iters", "max_iter", "max_updates", "max_update"),
        *("num_train_steps", "train_steps", "train_iters", "training_steps", "num_iterations"),
    ),
    "epochs": ("epochs", "num_epochs", "max_epochs", "n_epochs", "num_train_epochs", "train_epochs", "max_epoch"),
    "dataset_size": ("dataset_size", "num_train_examples", "train_size", "n_train"),
    "sequence_length": ("sequence_length", "seq_length", "seq_len", "block_size", "max_seq_length", "context_length"),
}
_SECTIONS = (
    *("optimizer", "optim", "optimization", "optimizer_config", "training", "train", "trainer", "train_cfg"),
    *("lr_scheduler", "scheduler", "hparams", "hyper_parameters", "args", "data", "dataset", "common", "config"),
)
_TYPE_OF_A_SECTION = ("_target_", "type", "name", "_name", "class", "class_path")
_SEED = ("seed", "random_seed", "manual_seed", "manualseed", "seed_everything", "init_seed", "rng_seed")
_TOTAL_BATCH = ("total_batch_size", "global_batch_size", "effective_batch_size", "total_train_batch_size")
_BATCH = (
    *("batch_size", "train_batch_size", "per_device_train_batch_size", "batch_size_per_gpu", "micro_batch_size"),
    *("bs", "batch"),
)
_ACCUMULATION = (
    *("gradient_accumulation_steps", "accumulate_grad_batches", "accum_iter", "grad_accum_steps", "update_freq"),
    *("grad_accum", "gradient_accumulation"),
)
_PROCESSES = ("world_size", "num_processes", "n_gpu", "num_gpus", "ngpus", "distributed_world_size", "num_devices")
# Where these stand, training may have been shared by several processes.
_OF_SEVERAL = ("local_rank", "dist_url", "dist_backend", "rank", "devices", "gpus", "num_nodes", "nodes", "strategy")
_SCHEDULES = {
    "none": None,
    "cosinelrscheduler": "cosine",
    "cosine_annealing": "cosine",
    "steplrscheduler": "step",
    "linear_decay": "linear",
    "linearlr": None,  # between any two factors
}


def has_settings(document: Mapping[Any, Any]) -> bool:
    """Whether a mapping contains training hyperparameters under known names."""
    found = _found(document)
    return "learning_rate" in found or {"optimizer", "epochs"} <= found.keys()


def settings_recipe(document: Mapping[Any, Any], source: str) -> TrainingRecipe:
    """The recipe in the settings of a training script; values that do not fit are unknown."""
    values = _found(document)
    recipe, _ = possible_recipe(values, source)
    return recipe


def read_settings(path: str | Path) -> TrainingRecipe:
    """The recipe in a YAML or JSON file of settings, such as Lightning's `hparams.yaml`.

    Raises `BadInput` if the file is no mapping.
    """
    path = Path(path)
    return settings_recipe(read_yaml(path), path.name)


def possible_recipe(values: Mapping[str, Any], source: str) -> tuple[TrainingRecipe, tuple[str, ...]]:
    """The recipe of the values that are consistent, earlier ones first, and why the others are not."""
    kept: dict[str, Any] = {}
    why: list[str] = []
    for name, value in values.items():
        if value is None:
            continue
        try:
            TrainingRecipe.from_dict({**kept, name: value}, source=source)
        except BadInput as error:
            why.append(error.what)
        else:
            kept[name] = value
    return TrainingRecipe.from_dict(kept, source=source), tuple(why)


def _found(document: Mapping[Any, Any]) -> dict[str, Any]:
    """The recipe fields found in a document and its sections."""
    places = list(_places(document))
    values = {field: value for field, names in _NAMES.items() if (value := _first(places, names)) is not None}
    for field, sections in (("optimizer", ("optimizer", "optim")), ("schedule", ("lr_scheduler", "scheduler"))):
        section = next((s for name in sections if isinstance(s := document.get(name), Mapping)), None)
        if field not in values and section is not None:
            values[field] = _first([section], _TYPE_OF_A_SECTION)
    for field in ("optimizer", "schedule"):
        if not isinstance(values.get(field), str):
            values.pop(field, None)
        elif "." in values[field]:
            values[field] = values[field].rpartition(".")[2]  # the path of a class
    if isinstance(schedule := values.get("schedule"), str):
        values["schedule"] = _SCHEDULES.get(schedule.lower(), schedule)
        floor, peak = _number(_first(places, ("min_lr", "eta_min"))), _number(values.get("learning_rate"))
        if values["schedule"] == "cosine" and floor and peak and floor > 1e-3 * peak:
            values["schedule"] = "cosine_with_min_lr"
    if values.get("schedule_steps") in (-1, 0, "-1"):  # Lightning and transformers: as many as the epochs make
        del values["schedule_steps"]
    _warmup(values, places)
    values["batch_size"] = _batch_size(places)
    values["seed"] = whole_seed(_first(places, _SEED))
    return {name: value for name, value in values.items() if value is not None}


def _warmup(values: dict[str, Any], places: Sequence[Mapping[Any, Any]]) -> None:
    if values.get("warmup_steps") not in (None, 0):
        return
    ratio, epochs = _number(_first(places, ("warmup_ratio",))), _number(values.get("epochs"))
    warm = _number(_first(places, ("warmup_epochs",)))
    if ratio is not None and 0 <= ratio < 1:
        values["warmup_steps"] = ratio
    elif warm is not None and epochs is not None and 0 <= warm < epochs:
        values["warmup_steps"] = warm / epochs


def _batch_size(places: Sequence[Mapping[Any, Any]]) -> int | None:
    """Examples per optimizer step; None if the number of processes is unknown."""
    if (total := _count(_first(places, _TOTAL_BATCH))) is not None:
        return total
    own, accumulated = _count(_first(places, _BATCH)), _count(_first(places, _ACCUMULATION, 1))
    several = _first(places, _OF_SEVERAL) not in (None, -1, "auto", 1) and _first(places, ("distributed",)) is not False
    processes = _count(_first(places, _PROCESSES, None if several else 1))
    if own is None or accumulated is None or processes is None:
        return None
    return math.prod((own, accumulated, processes))


def _places(document: Mapping[Any, Any]) -> Iterator[Mapping[Any, Any]]:
    """The document, its sections of hyperparameters, and the sections nested in these."""
    yield document
    for name in _SECTIONS:
        if isinstance(section := document.get(name), Mapping):
            yield section
            yield from (inner for key in _SECTIONS if isinstance(inner := section.get(key), Mapping))


def _first(places: Sequence[Mapping[Any, Any]], names: Sequence[str], otherwise: Any = None) -> Any:
    """The first plain value under one of the names; a list of one value counts as that value."""
    for name in names:
        for place in places:
            value = place.get(name, place.get(name.replace("_", "-")))
            if isinstance(value, list | tuple) and len(value) == 1:
                value = value[0]
            if isinstance(value, str | int | float | bool):
                return value
    return otherwise


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _number(value: object) -> float | None:
    if isinstance(value, str):
        try:
            return finite_number(float(value))
        except ValueError:
            return None
    return finite_number(value)
