"""The kinds of options: what Python callers may pass, what is read at a shell, and how both are checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from compressor.api.option import Kind
from compressor.arguments import (
    Percent,
    as_count,
    as_counts,
    as_drop,
    as_number,
    as_numbers,
    as_patterns,
    as_ratio,
    as_size,
    as_widths,
    one_of,
    require_kind,
    require_model,
)
from compressor.choices import BuiltinData, NoData
from compressor.errors import BadInput

if TYPE_CHECKING:
    from compressor.recipe import TrainingRecipe

# Fields of the recipe that have a flag: what the flag takes, the flag, its help.
TRAINING_FLAGS: Mapping[str, tuple[type, str, str]] = {
    "optimizer": (str, "--optimizer", "sgd, adamw, ..."),
    "learning_rate": (float, "--lr", "Peak learning rate."),
    "weight_decay": (float, "--weight-decay", "Weight decay as PyTorch takes it."),
    "momentum": (float, "--momentum", "Momentum of SGD."),
    "nesterov": (bool, "--nesterov", "Nesterov momentum."),
    "batch_size": (int, "--batch-size", "Examples per optimizer step."),
    "schedule": (str, "--schedule", "constant, linear, cosine or step."),
    "warmup_steps": (float, "--warmup-steps", "Steps, or a share below 1."),
    "steps": (int, "--steps", "Optimizer steps."),
    "epochs": (float, "--epochs", "Passes over the training data."),
    "dataset_size": (int, "--dataset-size", "Training examples."),
    "sequence_length": (int, "--sequence-length", "Tokens per training example; 1 for vectors."),
}


def _path(value: Any, name: str) -> Path:
    require_kind(value, name, (str, Path), remedy="give the path of a file or folder")
    if not str(value):  # which would mean the folder one is in
        raise BadInput(f"`{name}` is empty", option=name, remedy="name a file or folder")
    return Path(value)


def _model(value: Any, name: str) -> Any:
    if value == "":
        raise BadInput(f"`{name}` is empty", option=name, remedy="name a file or folder")
    if not isinstance(value, str):  # which needs no torch
        require_model(value, name)
    return value


def _named_model(value: Any) -> str | None:
    """A model of the hub by its name there, and another by the last part of its path."""
    if not isinstance(value, str | Path):
        return None
    from compressor.io.hub import may_be_of_the_hub

    of_the_hub = isinstance(value, str) and may_be_of_the_hub(value)
    return str(value) if of_the_hub else Path(value).name or str(value)


def _saved_model(value: Any, name: str) -> Any:
    require_kind(value, name, (str, Path), remedy="give the path of a file or folder, or org/name of the hub")
    return _model(value, name)


def _data(value: Any, name: str) -> Any:
    """A path, the name of built-in data, or an object, of which more is said where it is opened."""
    if not isinstance(value, str | Path) or str(value).startswith("builtin:"):
        return value
    return _path(value, name)


def _calibration(value: Any, name: str) -> Any:
    """Data, or a word for none of them: examples that the model makes itself, or no calibration."""
    return value if isinstance(value, str) and value in get_args(NoData) else _data(value, name)


def _called(value: Any, name: str) -> Any:
    if not callable(value):
        what = f"`{name}` is of type {type(value).__name__}, which cannot be called"
        raise BadInput(what, option=name, remedy=f"give one that is called as those of transformers: {_CALLS[name]}")
    return value


_CALLS = {"tokenizer": "`tokenizer(text)`", "processor": "`processor(images=images)`"}


def _metric(value: Any, name: str) -> Any:
    if not callable(value):
        what = f"`{name}` is of type {type(value).__name__}, which cannot be called"
        raise BadInput(what, option=name, remedy="give a function of a model and batches that returns a number")
    return value


def _named_data(value: Any) -> str | None:
    return value.name if isinstance(value, Path) else value if isinstance(value, str) else None


def _text(value: Any, name: str) -> str:
    require_kind(value, name, (str,), remedy="give a name")
    if not value:
        raise BadInput(f"`{name}` is empty", option=name, remedy="give a name, or leave it out")
    return str(value)


def _switch(value: Any, name: str) -> bool:
    require_kind(value, name, (bool,), remedy="give True or False")
    return bool(value)


def _factory(value: Any, name: str) -> Any:
    require_kind(value, name, (str, Callable), remedy="give a function that builds the model, or its name")
    return value


def _plain_factory(value: Any) -> str | None:
    return Path(value).name if isinstance(value, str) else None


def _plain_size(value: int) -> str | int:
    """A size in the largest unit of which it is a whole number."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if value % size == 0:
            return f"{value // size}{unit}"
    return value


def _plain_drop(value: float) -> float | str:
    return f"{100 * value:.10g}%" if isinstance(value, Percent) else value


def _plan(value: Any, name: str) -> Any:
    if isinstance(value, str | Path):
        return _path(value, name)
    from compressor.planning import Plan

    require_kind(value, name, (Plan,), remedy="give a plan, or the path of one")
    return value


def _recipe(value: Any, name: str) -> tuple[TrainingRecipe | Path, ...]:
    """What is said of the training, the most trusted first."""
    from compressor.recipe import TrainingRecipe

    said: list[TrainingRecipe | Path] = []
    for each in value if isinstance(value, list | tuple) else (value,):
        if isinstance(each, Mapping):
            said.append(TrainingRecipe.from_dict(each, source="the options"))
        elif isinstance(each, TrainingRecipe):
            said.append(each)
        else:
            require_kind(each, name, (str, Path), remedy="give a TrainingRecipe, or the path of a file with one")
            said.append(_path(each, name))
    return tuple(said)


def _recipe_flags(said: Sequence[TrainingRecipe | Path]) -> list[str]:
    words = []
    for each in said:
        if isinstance(each, Path):
            words += ["--recipe", each.name]
            continue
        for name, (kind, flag, _) in TRAINING_FLAGS.items():
            value = getattr(each, name)
            if kind is bool and value:
                words.append(flag)
            elif kind is not bool and value is not None:
                words += [flag, f"{value:.10g}" if isinstance(value, int | float) else value]
    return words


def _plain_recipe(said: Sequence[TrainingRecipe | Path]) -> list[Any]:
    return [each.name if isinstance(each, Path) else _known(each) for each in said]


def _known(recipe: TrainingRecipe) -> dict[str, Any]:
    return {name: value for name, value in recipe.to_dict().items() if value not in (None, {}) and name != "sources"}


def _input_shape(value: Any, name: str) -> tuple[int, ...]:
    sides = value.lower().split("x") if isinstance(value, str) else value
    require_kind(sides, name, (list, tuple), remedy="give the sides of one example, such as (3, 224, 224)")
    if not sides or not all(str(side).isdecimal() and int(side) > 0 for side in sides):
        remedy = "write it without the batch, such as 3x224x224"
        raise BadInput(f"`{name}` {str(value)[:40]!r} is no shape", option=name, remedy=remedy)
    return tuple(int(side) for side in sides)


def _several_data(value: Any, name: str) -> tuple[Any, ...]:
    require_kind(value, name, (list, tuple), remedy="give a list, one for each network")
    return tuple(_data(each, name) for each in value)


def _target_device(value: Any, name: str) -> Any:
    # Told by name, because importing the class would load torch.
    if any(each.__name__ == "DeviceProfile" for each in type(value).__mro__):
        return value
    require_kind(value, name, (str,), remedy="give the name of a device, or a compressor.DeviceProfile")
    return _text(value, name)


def _named_device(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _joined(value: Sequence[float]) -> str:
    return ",".join(map(str, value))


def _plain_widths(value: Sequence[int]) -> str:
    return _joined(value) or "auto"


def _progress(value: Any, name: str) -> Any:
    require_kind(value, name, (Callable,), remedy="give a function of a step, how many parts are done, and of how many")
    return value


def _engine(value: Any, name: str) -> str:
    """The name of an engine, with the number of its processes or the address of its cluster."""
    text = _text(value, name)
    kind, colon, detail = text.partition(":")
    known = {"processes": detail.isdecimal() and int(detail) > 0, "ray": bool(detail)}
    if kind not in known or (colon and not known[kind]):
        remedy = "give 'processes', 'processes:4', 'ray', or 'ray:HOST:PORT'"
        raise BadInput(f"`{name}` {text[:40]!r} is unknown", option=name, remedy=remedy)
    return text


def _initial(value: Any, name: str) -> Any:
    """A seed, the word for a search, a checkpoint, or an object, of which more is said where it is opened."""
    if isinstance(value, str) and value.strip().lstrip("+-").isdecimal():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return as_count(value, name, least=0, most=2**64 - 1)
    if isinstance(value, str | Path):
        return value if value == "auto" else _model(value, name)
    if isinstance(value, Mapping) or callable(value) or type(value).__name__ == "InitialWeights":
        return value
    what = f"`{name}` is of type {type(value).__name__}"
    remedy = "give a seed, a checkpoint, the untrained module, its state dict, or a function that returns this"
    raise BadInput(what, option=name, remedy=remedy)


def _initial_source(value: Any, name: str) -> Any:
    """Initial weights that are there: those of a seed are drawn by what a compressed model records."""
    source = _initial(value, name)
    if isinstance(source, int) or source == "auto":
        what = f"`{name}={source!r}` names no weights: a model that was compressed with a seed has the draws itself"
        raise BadInput(what, option=name, remedy="leave it out, or give the checkpoint that the model names")
    return source


def _plain_initial(value: Any) -> int | str | None:
    return value if isinstance(value, int) else _named_model(value)


def _explored(value: Any, name: str) -> Any:
    from compressor.recipe import TrainingRecipe

    remedy = "give a TrainingRecipe, or the path of a file or model"
    require_kind(value, name, (TrainingRecipe, str, Path), remedy=remedy)
    return value


def settings(name: str) -> Kind:
    def read(value: Any, option: str) -> Any:
        if type(value).__name__ != name:  # told by name, because importing the class would load torch
            what = f"`{option}` is of type {type(value).__name__}"
            raise BadInput(what, option=option, remedy=f"give a compressor.{name}")
        return value

    return Kind(name, read)


def choice(literal: Any) -> Kind:
    def read(value: Any, name: str) -> Any:
        one_of(value, name, get_args(literal))
        return value

    words = ", ".join(f'"{each}"' for each in get_args(literal))
    return Kind(f"Literal[{words}]", read, metavar="|".join(get_args(literal)), words=get_args(literal))


def count(least: int, most: int = 2**63 - 1) -> Kind:
    return Kind("int", partial(as_count, least=least, most=most), metavar="N", shell=int)


_BUILT_IN = get_args(BuiltinData)

SWITCH = Kind("bool", _switch, shell=bool, switch=True)
NUMBER = Kind("float", as_number, metavar="X")
NUMBERS = Kind("float | str | Sequence[float]", as_numbers, metavar="X,X", plain=_joined)
SHARE = Kind("float | str", partial(as_number, percent=True), metavar="SHARE")
DROP = Kind("float | str", as_drop, metavar="X", plain=_plain_drop)
RATIO = Kind("float | str", as_ratio, metavar="RATIO")
COUNTS = Kind("int | str | Sequence[int]", partial(as_counts, least=1), metavar="N,N", plain=_joined)
WIDTHS = Kind("int | str | Sequence[int]", as_widths, metavar="auto|N,N", plain=_plain_widths, words=("auto",))
SIZE = Kind("int | str", as_size, metavar="SIZE", plain=_plain_size)
TEXT = Kind("str", _text, metavar="NAME")
PATH = Kind("str | Path", _path, metavar="PATH")
PATTERNS = Kind("str | Sequence[str]", as_patterns, metavar="PATTERN", repeated=True)
MODEL = Kind("ModelLike", _model, metavar="MODEL", plain=_named_model)
SAVED_MODEL = Kind("str | Path", _saved_model, metavar="ORIGINAL", plain=_named_model)
DATA = Kind("DataLike", _data, metavar="DATA", plain=_named_data, words=_BUILT_IN)
CALIBRATION_DATA = Kind(
    "DataLike", _calibration, metavar="DATA|self|none", plain=_named_data, words=(*get_args(NoData), *_BUILT_IN)
)
CALLED = Kind("Callable[..., Any]", _called)
METRIC = Kind("Callable[[nn.Module, Iterable[Any]], float]", _metric)
SEVERAL_DATA = Kind("Sequence[DataLike]", _several_data, metavar="DATA", repeated=True, words=_BUILT_IN)
FACTORY = Kind("Factory", _factory, metavar="MODULE:NAME", plain=_plain_factory)
PLAN = Kind("Plan | str | Path", _plan, metavar="FILE")
RECIPE = Kind("RecipeLike", _recipe, metavar="FILE", flags=_recipe_flags, plain=_plain_recipe)
DEVICE_PROFILE = Kind("DeviceProfile | str", _target_device, metavar="NAME", plain=_named_device)
SHAPE = Kind("str | Sequence[int]", _input_shape, metavar="3x224x224")
DEVICE = Kind("str", _text, metavar="DEVICE", words=("auto", "cpu", "cuda"))
ENGINE = Kind("str", _engine, metavar="processes[:N]|ray[:ADDRESS]", words=("processes", "ray"))
PROGRESS = Kind("Progress", _progress)
INITIAL = Kind("InitialLike", _initial, metavar="SEED|FILE|auto", plain=_plain_initial, words=("auto",))
INITIAL_SOURCE = Kind("InitialSource", _initial_source, metavar="ORIGINAL", plain=_plain_initial)
EXPLORED = Kind("TrainingRecipe | str | Path", _explored)
