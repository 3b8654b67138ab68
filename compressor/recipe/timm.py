"""The `args.yaml` that timm's training script leaves beside its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compressor.documents import read_yaml
from compressor.recipe.recipe import TrainingRecipe, whole_seed
from compressor.recipe.trainer import product

# timm's names for stochastic gradient descent; its "sgd" is Nesterov's (timm.optim, optimizer registry).
_SGD = {
    "sgd": ("sgd", True),
    "nesterov": ("sgd", True),
    "momentum": ("sgd", False),
    "sgdw": ("sgdw", True),
}
# Below this share of the peak, the floor of a cosine changes the total forgetting by less than a thousandth.
_NEGLIGIBLE_FLOOR = 1e-3

_MOST = 1e15


def read_timm_args(path: str | Path) -> TrainingRecipe:
    """The recipe in a timm `args.yaml`.

    Its batch size is one process's, so the global one is known only if the number of processes is recorded.
    timm sets the learning rate once per epoch, or once per step where asked to; here it is taken per step.
    Raises `BadInput` if the file is no YAML mapping.
    """
    path = Path(path)
    arguments = read_yaml(path)
    values: dict[str, Any] = {
        "optimizer": arguments.get("opt"),
        "learning_rate": arguments.get("lr"),
        "weight_decay": arguments.get("weight_decay"),
        "schedule": arguments.get("sched"),
        "epochs": arguments.get("epochs"),
        "batch_size": _global_batch(arguments),
        "seed": whole_seed(arguments.get("seed")),
    }
    if isinstance(values["optimizer"], str) and values["optimizer"].lower() in _SGD:
        values["optimizer"], values["nesterov"] = _SGD[values["optimizer"].lower()]
        values["momentum"] = arguments.get("momentum")
    epochs, warmup = _number(arguments.get("epochs")), _number(arguments.get("warmup_epochs"))
    if epochs is not None and warmup is not None and epochs > 0 and 0 <= warmup < epochs:
        values["warmup_steps"] = warmup / epochs
    peak, floor = _number(arguments.get("lr")), _number(arguments.get("min_lr"))
    if values["schedule"] == "cosine" and peak and floor and floor > _NEGLIGIBLE_FLOOR * peak:
        values["schedule"] = "cosine_with_min_lr"
    return TrainingRecipe.from_dict(values, source=path.name)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < _MOST else None


def _global_batch(arguments: dict[str, Any]) -> int | None:
    processes = 1 if arguments.get("distributed") is False else arguments.get("world_size")
    accumulation = arguments.get("grad_accum_steps", 1)
    return product(arguments.get("batch_size"), accumulation, processes)
