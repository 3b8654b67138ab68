"""The recipe inside a training checkpoint: its optimizer, scheduler, counters, and settings."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from compressor.recipe.optimizer_state import OptimizerState, Schedule, read_optimizer_state, read_scheduler_state
from compressor.recipe.recipe import KNOWN_SCHEDULES, MOST_STEPS, TrainingRecipe
from compressor.recipe.settings import has_settings, possible_recipe, settings_recipe

logger = logging.getLogger(__name__)

# Mappings of settings, the most deliberate first.
_SETTINGS = (
    *("hyper_parameters", "hparams", "hyperparameters", "args", "opt", "cfg", "config", "configuration", "options"),
    *("trainer_args", "train_args", "training_args", "params", "recipe"),
)
_STEPS = ("global_step", "num_updates", "iteration", "iter_num", "step", "steps", "iter", "n_iter")
_EPOCHS = ("epoch", "epochs", "epoch_number", "last_epoch")
# An optimizer that skips a step where mixed precision overflows has taken a little fewer than its scheduler.
_SAME_STEPS = 0.01


def recipes_inside(document: Mapping[Any, Any], shapes: Mapping[str, Sequence[int]], file: str) -> list[TrainingRecipe]:
    """The recipes in a training checkpoint, the most trusted first: what ran, before what was asked for.

    `document` holds the plain values of the file called `file`, `shapes` are those of the model's tensors. What is
    found and cannot be told in a recipe is logged as a warning.
    """
    optimizer = _optimizer(document, shapes, file)
    settings = _settings(document, file)
    steps = (optimizer.values.get("steps") if optimizer else None) or _counter(document, _STEPS)
    epochs = _epochs(document)
    recipes: list[TrainingRecipe] = []

    def add(values: Mapping[str, Any], where: str) -> None:
        recipe, why = possible_recipe(values, f"{file}: {where}")
        for reason in why:
            logger.warning("left out of the training recipe: %s of %s (%s)", where, file, reason)
        recipes.append(recipe)

    found = _schedule(document)
    if optimizer is not None:
        rising = found is not None and found[1].name == "cyclic"  # the optimizer knows the lowest rate alone
        add({k: v for k, v in optimizer.values.items() if not (rising and k == "learning_rate")}, "optimizer")
    if found is not None:
        key, schedule = found
        values, remark = _in_optimizer_steps(schedule, steps, epochs)
        if remark:
            logger.warning("%s: the schedule of %s is not taken: %s", file, key, remark)
        add(values, key)
    if settings is not None:
        recipes.append(settings)
    add({"steps": steps} if steps else {}, "counters")
    planned = settings.epochs if settings is not None else None
    if epochs is not None and (planned is None or not abs(planned - epochs) <= 1):
        # A file written at the end of the last epoch may count it or not.
        recipes.insert(max(len(recipes) - 2, 0), possible_recipe({"epochs": epochs or None}, f"{file}: epoch")[0])
    if optimizer is not None and optimizer.rate is not None and not optimizer.scheduled:
        stayed = settings is not None and settings.learning_rate == optimizer.rate and settings.schedule is None
        scheduled = found is not None and found[1].name != "reduce_on_plateau"
        rate = {"learning_rate": optimizer.rate} if settings is None or settings.learning_rate is None else {}
        add(rate | ({"schedule": "constant"} if stayed and not scheduled else {}), "optimizer")
    return [recipe for recipe in recipes if recipe.sources]


def _optimizer(document: Mapping[Any, Any], shapes: Mapping[str, Sequence[int]], file: str) -> OptimizerState | None:
    """The fields of the only optimizer, or those on which several agree."""
    states = [read for state in _states(document, "param_groups") if (read := read_optimizer_state(state, shapes))]
    if not states:
        return None
    first, *others = states
    for remark in dict.fromkeys(remark for state in states for remark in state.remarks):
        logger.warning("%s: the optimizer's state leaves something open: %s", file, remark)
    if not others:
        return first
    agreed = {name: value for name, value in first.values.items() if all(o.values.get(name) == value for o in others)}
    if any(state.values != agreed for state in states):
        logger.warning("%s holds %d optimizers; only what they agree on is taken", file, len(states))
    rates = {state.rate for state in states}
    return OptimizerState(agreed, first.rate if len(rates) == 1 else None, any(s.scheduled for s in states), ())


def _schedule(document: Mapping[Any, Any]) -> tuple[str, Schedule] | None:
    """The only scheduler and its key; none of several, which may belong to different optimizers."""
    states = _keyed_states(document, "last_epoch")
    found = [(key, read) for key, state in states if (read := read_scheduler_state(state))]
    return found[0] if len({schedule for _, schedule in found}) == 1 else None


def _in_optimizer_steps(schedule: Schedule, steps: int | None, epochs: float | None) -> tuple[dict[str, Any], str]:
    """The fields of a recipe that a schedule tells, and why its form is not among them.

    A scheduler steps after every step of the optimizer or after every epoch: how many steps it took tells which.
    """
    rate = {"learning_rate": schedule.rate}
    taken = schedule.taken
    if not schedule.name or not taken:
        return rate, ""
    if steps is None and epochs is not None and taken > epochs + 1:
        steps, rate = taken, rate | {"steps": taken}
    if steps is None:
        if epochs is None or abs(taken - epochs) > 1:
            return rate, "whether it counts optimizer steps or epochs is not told"
        return _in_epochs(schedule, taken, rate)
    unit = 1.0 if abs(steps - taken) <= max(1, _SAME_STEPS * taken) else steps / taken
    if unit < 1:
        return rate, f"it took {taken} steps, and the optimizer {steps}"
    whole = None if schedule.length is None else round(schedule.length * unit)
    if whole is not None and whole < steps and schedule.name != "constant":
        return rate, f"training went on after its end at {whole} steps"
    # Without a name the recipe of what else is known is worth more than none.
    values: dict[str, Any] = rate | {"schedule": schedule.name}
    if schedule.name in KNOWN_SCHEDULES:  # others may begin with a warm-up of their own
        values["warmup_steps"] = round(schedule.warmup * unit)
    if whole is not None and steps <= whole <= MOST_STEPS:
        values["schedule_steps"] = whole
    if schedule.milestones is not None:
        values["step_milestones"] = [round(each * unit) for each in schedule.milestones]
        values["step_factor"] = schedule.factor
    return values, ""


def _in_epochs(schedule: Schedule, taken: int, rate: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """A schedule that stepped after epochs of unknown length: in steps it is the same if it ran to its end."""
    values = rate | {"epochs": taken}
    if schedule.name == "step":
        return values | {"schedule": "step", "step_factor": schedule.factor}, ""
    if schedule.length not in (None, taken):
        return values, "it counts epochs of unknown length, and training stopped before its end"
    warmup = {"warmup_steps": schedule.warmup / taken} if schedule.warmup < taken else {}
    return values | {"schedule": schedule.name} | warmup, ""


def _settings(document: Mapping[Any, Any], file: str) -> TrainingRecipe | None:
    """The settings of the script, from the first mapping that contains any."""
    for key in _SETTINGS:
        section = document.get(key)
        if isinstance(section, Mapping) and "param_groups" not in section and has_settings(section):
            return settings_recipe(section, f"{file}: {key}")
    return None


def _counter(document: Mapping[Any, Any], names: Sequence[str]) -> int | None:
    counts = (document.get(name) for name in names)
    return next((n for n in counts if isinstance(n, int) and not isinstance(n, bool) and 0 < n <= MOST_STEPS), None)


def _epochs(document: Mapping[Any, Any]) -> int | None:
    """Completed epochs: as Lightning's loop counts them, or as the file states."""
    progress: Any = document.get("loops")
    for key in ("fit_loop", "epoch_progress", "total", "completed"):
        progress = progress.get(key) if isinstance(progress, Mapping) else None
    if isinstance(progress, int) and progress > 0:
        return progress
    epoch = _counter(document, _EPOCHS)
    lightning = any(key in document for key in ("pytorch-lightning_version", "lightning_version"))
    return epoch + 1 if lightning and epoch is not None else epoch


def _states(document: Mapping[Any, Any], key: str) -> Iterator[Mapping[Any, Any]]:
    return (state for _, state in _keyed_states(document, key))


def _keyed_states(document: Mapping[Any, Any], key: str) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """The mappings with a key: the document, its values, and those in its lists and mappings of several."""
    if key in document and key != "last_epoch":
        yield "optimizer", document
        return
    if key == "last_epoch" and key in document and ("base_lrs" in document or "_schedulers" in document):
        yield "scheduler", document
        return
    for name, value in document.items():
        inner = [value] if isinstance(value, Mapping) else value if isinstance(value, list) else []
        for each in inner:
            if isinstance(each, Mapping) and key in each:
                yield str(name), each
            elif isinstance(each, Mapping):
                yield from (
                    (str(name), state) for state in each.values() if isinstance(state, Mapping) and key in state
                )
