"""DeepSpeed's configuration, `ds_config.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compressor.documents import read_json
from compressor.recipe.recipe import TrainingRecipe

_SCHEDULES = {"warmuplr": "constant", "warmupdecaylr": "linear", "warmupcosinelr": "cosine"}


def read_deepspeed_config(path: str | Path) -> TrainingRecipe:
    """The recipe in a `ds_config.json`, where "auto" is unknown.

    DeepSpeed's "Adam" decays as AdamW does unless `adam_w_mode` is off (`runtime/engine.py`). Its warm-up,
    logarithmic by default, is taken as linear. Raises `BadInput` if the file is no JSON object.
    """
    path = Path(path)
    config = read_json(path)
    optimizer, of_optimizer = _typed_section(config, "optimizer")
    scheduler, of_scheduler = _typed_section(config, "scheduler")
    adam = isinstance(optimizer, str) and optimizer.lower() == "adam"
    peak = of_scheduler.get("warmup_max_lr")
    values = {
        "optimizer": optimizer,
        "decoupled_weight_decay": of_optimizer.get("adam_w_mode", True) if adam else None,
        "nesterov": of_optimizer.get("nesterov"),
        "momentum": of_optimizer.get("momentum"),
        "dampening": of_optimizer.get("dampening"),
        "learning_rate": of_optimizer.get("lr") if peak in (None, "auto") else peak,
        "weight_decay": of_optimizer.get("weight_decay"),
        "schedule": _SCHEDULES.get(scheduler.lower(), scheduler) if isinstance(scheduler, str) else scheduler,
        "warmup_steps": of_scheduler.get("warmup_num_steps"),
        "schedule_steps": of_scheduler.get("total_num_steps"),
        "batch_size": config.get("train_batch_size"),
    }
    known = {name: value for name, value in values.items() if value != "auto"}
    return TrainingRecipe.from_dict(known, source=path.name)


def _typed_section(config: dict[str, Any], name: str) -> tuple[object, dict[str, Any]]:
    section = config.get(name)
    if not isinstance(section, dict):
        return None, {}
    parameters = section.get("params")
    return section.get("type"), parameters if isinstance(parameters, dict) else {}
