"""How a model was trained: its hyperparameters, each with the place it was read from."""

from __future__ import annotations

import difflib
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import numpy as np

from compressor.errors import BadInput

KNOWN_SCHEDULES = ("constant", "linear", "cosine", "step")

# More than any training has taken.
MOST_STEPS = 10**8
# The seeds that PyTorch takes.
MOST_SEEDS = 2**64
_MOST = 10**15

_SGD = frozenset({"sgd", "sgdw"})
# fmt: off
_ADAPTIVE = frozenset({
    "adadelta", "adafactor", "adagrad", "adam", "adamax", "adamw", "ademamix", "lamb", "lars", "lion", "muon",
    "nadam", "nadamw", "radam", "rmsprop", "shampoo", "soap", "sophia",
})
# fmt: on
# Optimizers whose definition multiplies the weights by 1 - learning_rate * weight_decay.
_DECOUPLED = frozenset({"sgdw", "adamw", "nadamw", "adafactor", "lion", "muon"})
# Words in optimizer names that say how a step is computed, not which step it is.
_IMPLEMENTATIONS = frozenset(
    {"torch", "fused", "xla", "npu", "apex", "hf", "bnb", "4bit", "8bit", "32bit", "anyprecision", "paged"}
)
_SCHEDULE_NAMES = {
    "constant_with_warmup": "constant",
    "cosineannealinglr": "cosine",
    "multistep": "step",
    "multisteplr": "step",
    "steplr": "step",
}

_REALS: dict[str, tuple[Callable[[float], bool], str]] = {
    "learning_rate": (lambda value: value >= 0, "at least 0"),
    "weight_decay": (lambda value: value >= 0, "at least 0"),
    "momentum": (lambda value: 0 <= value < 1, "in [0, 1)"),
    "dampening": (lambda value: 0 <= value <= 1, "in [0, 1]"),
    "step_factor": (lambda value: value > 0, "above 0"),
    "epochs": (lambda value: value > 0, "above 0"),
}
_COUNTS = {
    "steps": MOST_STEPS,
    "schedule_steps": MOST_STEPS,
    "batch_size": _MOST,
    "dataset_size": _MOST,
    "sequence_length": _MOST,
}
_SWITCHES = ("nesterov", "decoupled_weight_decay")
# What these say is said about one optimizer, and is not true of another.
_OF_THE_OPTIMIZER = (*_SWITCHES, "momentum", "dampening")


@dataclass(frozen=True, repr=False)
class TrainingRecipe:
    """The hyperparameters of a training run; None means unknown, and never stands for a default.

    Numbers follow `torch.optim`. Two recipes that differ only in their `sources` are equal.

    Attributes:
        optimizer: The name of the optimizer, such as `sgd` or `adamw`.
        nesterov: Whether the momentum is Nesterov's.
        decoupled_weight_decay: Whether weight decay multiplies the weights instead of being part of the gradient.
        learning_rate: The peak of the schedule.
        schedule: `constant`, `linear`, `cosine` or `step`.
        warmup_steps: The length of a linear warm-up from 0; below 1, a share of the schedule, as in
            `transformers.TrainingArguments`.
        step_milestones: The steps of `torch.optim.lr_scheduler.MultiStepLR`.
        step_factor: Its `gamma`.
        weight_decay: The factor of W in the gradient (papers that add `lambda * ||W||^2` to the loss have
            lambda = weight_decay / 2).
        momentum: The momentum of SGD.
        dampening: The dampening of SGD.
        batch_size: The examples behind one optimizer step: per-device batch x accumulation x data-parallel processes.
        steps: The optimizer steps taken.
        schedule_steps: The steps that the schedule was laid out for, if training stopped before its end.
        epochs: The passes over the training data.
        dataset_size: The number of training examples.
        sequence_length: The positions per example that a linear layer is applied to; 1 for vectors.
        undecayed: Globs of the names of parameters without weight decay.
        group_weight_decay: Pairs of a glob and the weight decay of the parameters that it matches, the first match
            counting; a mapping is accepted too.
        base_model: The model whose weights training started from.
        seed: The seed of the run, which in most scripts is set before the model is built.
        sources: Where each field was read.

    Raises:
        BadInput: a number that no training run can have.

    Example:
        >>> compressor.TrainingRecipe(optimizer="adamw", learning_rate=3e-4, weight_decay=0.1).family
        'adaptive'
    """

    optimizer: str | None = None
    nesterov: bool | None = None
    decoupled_weight_decay: bool | None = None
    learning_rate: float | None = None
    schedule: str | None = None
    warmup_steps: float | None = None
    step_milestones: tuple[int, ...] | None = None
    step_factor: float | None = None
    weight_decay: float | None = None
    momentum: float | None = None
    dampening: float | None = None
    batch_size: int | None = None
    steps: int | None = None
    schedule_steps: int | None = None
    epochs: float | None = None
    dataset_size: int | None = None
    sequence_length: int | None = None
    undecayed: tuple[str, ...] | None = None
    group_weight_decay: tuple[tuple[str, float], ...] | None = None
    base_model: str | None = None
    seed: int | None = None
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __repr__(self) -> str:
        known = {each.name: getattr(self, each.name) for each in fields(self) if each.compare}
        listed = ", ".join(f"{name}={_shown(value)}" for name, value in known.items() if value is not None)
        return f"TrainingRecipe({listed})"

    def __post_init__(self) -> None:
        self._set("sources", dict(self.sources))
        for name in ("optimizer", "schedule", "base_model"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise self._bad(name, "is not a name")
        self._set("base_model", _without_folders(self.base_model))
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool | None):
                raise self._bad(name, "is neither true nor false")
        for name, (allowed, range_) in _REALS.items():
            if (value := getattr(self, name)) is not None:
                number = self._real(name, value)
                if not allowed(number):
                    raise self._bad(name, f"must be {range_}")
                self._set(name, number)
        for name, most in _COUNTS.items():
            if (value := getattr(self, name)) is not None:
                self._set(name, self._count(name, value, least=1, most=most))
        self._check_seed()
        if self.warmup_steps is not None:
            warmup = self._real("warmup_steps", self.warmup_steps)
            if not 0 < warmup < 1:
                warmup = self._count("warmup_steps", warmup, least=0, most=MOST_STEPS)
            self._set("warmup_steps", warmup)
        self._set("step_milestones", self._milestones())
        self._set("undecayed", self._globs())
        self._set("group_weight_decay", self._groups())
        self._name_optimizer()
        if self.schedule is not None:
            name = "_".join(self.schedule.lower().replace("-", " ").split())
            self._set("schedule", _SCHEDULE_NAMES.get(name, name))
        self._check_together()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _bad(self, name: str, problem: str) -> BadInput:
        return BadInput(
            f"{name} = {_shown(getattr(self, name))} {problem}",
            where=self.sources.get(name),
            remedy="correct it, or leave it out if it is unknown",
        )

    def _real(self, name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise self._bad(name, "is not a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self._bad(name, "is not finite")
        return number

    def _count(self, name: str, value: object, *, least: int, most: int) -> int:
        number = self._real(name, value)
        if number != int(number):
            raise self._bad(name, "is not a whole number")
        if not least <= number <= most:
            raise self._bad(name, f"must be from {least} to {most:.0e}")
        return int(number)

    def _check_seed(self) -> None:
        """Every digit of a seed counts, so it is never a float."""
        if self.seed is None:
            return
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise self._bad("seed", "is not a whole number")
        if not 0 <= self.seed < MOST_SEEDS:
            raise self._bad("seed", "must be from 0 to 2^64 - 1")

    def _milestones(self) -> tuple[int, ...] | None:
        given = self.step_milestones
        if given is None:
            return None
        if not isinstance(given, list | tuple):
            raise self._bad("step_milestones", "is not a list of steps")
        milestones = [self._count("step_milestones", step, least=0, most=MOST_STEPS) for step in given]
        if milestones != sorted(milestones):
            raise self._bad("step_milestones", "must ascend")
        return tuple(milestones)

    def _globs(self) -> tuple[str, ...] | None:
        given = self.undecayed
        if given is None:
            return None
        if not isinstance(given, list | tuple) or not all(isinstance(glob, str) for glob in given):
            raise self._bad("undecayed", "is not a list of names")
        return tuple(given)

    def _groups(self) -> tuple[tuple[str, float], ...] | None:
        given = self.group_weight_decay
        if given is None:
            return None
        pairs = list(given.items()) if isinstance(given, Mapping) else given
        if not isinstance(pairs, list | tuple) or not all(
            isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs
        ):
            raise self._bad("group_weight_decay", "is not a mapping of names to numbers")
        groups = tuple((glob, self._real("group_weight_decay", decay)) for glob, decay in pairs)
        if any(decay < 0 for _, decay in groups):
            raise self._bad("group_weight_decay", "must be at least 0")
        return groups

    def _name_optimizer(self) -> None:
        if self.optimizer is None:
            return
        words = self.optimizer.lower().strip().rpartition(".")[2].replace("-", "_").replace(" ", "_").split("_")
        name = "_".join(word for word in words if word not in _IMPLEMENTATIONS)
        implied: dict[str, bool] = {}
        if name == "nesterov":
            name, implied = "sgd", {"nesterov": True}
        elif name in {"heavy_ball", "heavyball"}:
            name, implied = "sgd", {"nesterov": False}
        elif name == "sgdm":
            name = "sgd"
        elif name in _DECOUPLED:
            implied = {"decoupled_weight_decay": True}
        for switch, value in implied.items():
            if getattr(self, switch) not in (None, value):
                raise self._bad(switch, f"contradicts the optimizer {self.optimizer!r}")
            self._set(switch, value)
            if "optimizer" in self.sources:
                self._set("sources", {switch: self.sources["optimizer"], **self.sources})
        self._set("optimizer", name or self.optimizer.lower().strip())

    def _check_together(self) -> None:
        total = self.total_steps
        if total is not None and total > MOST_STEPS:
            raise self._bad("epochs", f"make more than {MOST_STEPS:.0e} steps")
        if self.steps is not None and self.schedule_steps is not None and self.steps > self.schedule_steps:
            raise self._bad("steps", f"is more than the schedule's {self.schedule_steps}")
        length = self.schedule_steps or total
        if self.warmup_steps is not None and length is not None and self.warmup_steps > length:
            raise self._bad("warmup_steps", f"is longer than the training's {length} steps")
        if self.nesterov and self.dampening:
            raise self._bad("dampening", "must be 0 with Nesterov momentum")

    @property
    def family(self) -> Literal["sgd", "adaptive"] | None:
        """The kind of optimizer, "sgd" or "adaptive"; None if unknown.

        The updates of "sgd" are linear in the gradients, which the rank bound of the memory window needs.
        """
        if self.optimizer in _SGD:
            return "sgd"
        return "adaptive" if self.optimizer in _ADAPTIVE else None

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps taken: as stated, or as planned, or as many as the epochs take.

        An incomplete last batch counts as a step, as in a `DataLoader` without `drop_last`.
        """
        if self.steps is not None:
            return self.steps
        if self.schedule_steps is not None:
            return self.schedule_steps
        if self.epochs is None or self.dataset_size is None or self.batch_size is None:
            return None
        return max(1, math.ceil(self.epochs * -(-self.dataset_size // self.batch_size)))

    @property
    def total_epochs(self) -> float | None:
        """Passes over the data: as stated, or as many as the steps make."""
        if self.epochs is not None:
            return self.epochs
        if self.total_steps is None or self.dataset_size is None or self.batch_size is None:
            return None
        return self.total_steps * self.batch_size / self.dataset_size

    @property
    def unknown_in_schedule(self) -> str:
        """Why `learning_rates` is unknown, in a few words; empty if it is known."""
        if self.learning_rate is None:
            return "the learning rate is unknown"
        if self.schedule is None:
            return "the learning-rate schedule is unknown"
        if self.schedule not in KNOWN_SCHEDULES:
            return f"the schedule {self.schedule!r} is not one of {', '.join(KNOWN_SCHEDULES)}"
        if self.schedule == "step" and (self.step_milestones is None or self.step_factor is None):
            return "the milestones or the factor of the step schedule are unknown"
        if self.total_steps is None:
            return "the number of steps is unknown"
        return ""

    def learning_rates(self, start: int = 0, stop: int | None = None) -> np.ndarray[Any, np.dtype[np.float64]] | None:
        """The learning rates of steps `start` to `stop`, by default all; None if something is unknown.

        Shape (stop - start,), float64. Linear and cosine are `transformers.get_scheduler`'s, without warm-up
        also `torch.optim.lr_scheduler.LinearLR` to 0 and `CosineAnnealingLR`; step is `MultiStepLR`. A
        schedule for which no warm-up is stated has none.
        """
        total = self.total_steps
        if self.unknown_in_schedule or total is None:
            return None
        return self.learning_rates_at(np.arange(start, total if stop is None else min(stop, total), dtype=np.float64))

    def learning_rates_at(self, step: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The learning rates of a known schedule at any steps, also fractional ones."""
        assert self.learning_rate is not None
        length, warmup = self.schedule_steps or self.total_steps or 0, self.warmup_length
        annealed = np.maximum(0.0, step - warmup) / max(1, length - warmup)
        factor: np.ndarray[Any, np.dtype[Any]]
        if self.schedule == "linear":
            factor = 1.0 - annealed
        elif self.schedule == "cosine":
            factor = 0.5 * (1.0 + np.cos(np.pi * annealed))
        elif self.schedule == "step" and self.step_milestones is not None and self.step_factor is not None:
            factor = self.step_factor ** np.searchsorted(self.step_milestones, step, side="right")
        else:
            factor = np.ones_like(step)
        ramp = np.minimum(1.0, step / warmup) if warmup else 1.0
        return np.asarray(self.learning_rate * ramp * factor, dtype=np.float64)

    @property
    def warmup_length(self) -> int:
        """The steps of the warm-up."""
        warmup = self.warmup_steps or 0
        return math.ceil((self.schedule_steps or self.total_steps or 0) * warmup) if warmup < 1 else int(warmup)

    def decays(self, name: str) -> bool | None:
        """Whether the parameter called `name` gets weight decay; None if that is unknown."""
        decay = self.weight_decay_of(name)
        if decay == 0:
            return False
        return None if self.undecayed is None and not self._in_a_group(name) else True

    def weight_decay_of(self, name: str) -> float | None:
        """The weight decay of the parameter called `name`: its group's, or the global one; None if unknown."""
        if any(fnmatchcase(name.lower(), glob.lower()) for glob in self.undecayed or ()):
            return 0.0
        return self._in_a_group(name)[0] if self._in_a_group(name) else self.weight_decay

    def of_parameter(self, name: str) -> TrainingRecipe:
        """The recipe for the parameter called `name`, with its weight decay as the global one."""
        return replace(self, weight_decay=self.weight_decay_of(name), undecayed=None, group_weight_decay=None)

    def _in_a_group(self, name: str) -> list[float]:
        """The weight decays of the groups that contain a parameter; the first one counts."""
        return [decay for glob, decay in self.group_weight_decay or () if fnmatchcase(name.lower(), glob.lower())]

    def to_dict(self) -> dict[str, Any]:
        """Every field as a JSON value; unknown ones are None."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        for name in ("step_milestones", "undecayed"):
            values[name] = None if values[name] is None else list(values[name])
        if self.group_weight_decay is not None:
            values["group_weight_decay"] = dict(self.group_weight_decay)
        return {**values, "sources": dict(self.sources)}

    def known(self) -> dict[str, Any]:
        """The fields that are known, and their sources."""
        return {name: value for name, value in self.to_dict().items() if value not in (None, {})}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str | None = None) -> TrainingRecipe:
        """Read what `to_dict` returns, or a mapping with the same keys written by hand.

        `source` is recorded for every known field that has none. Text is read as what the field needs: YAML 1.1
        takes `5e-4` for text. Raises `BadInput` for a key that is not a field, naming those that resemble it.
        """
        names = [entry.name for entry in fields(cls)]
        for key in values:
            if key not in names:
                close = fields_like(str(key))
                raise BadInput(
                    f"unknown training hyperparameter {reprlib.repr(key)}",
                    where=source,
                    remedy=f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(names[:-1])}",
                )
        sources = values.get("sources") or {}
        if not isinstance(sources, Mapping) or not all(isinstance(x, str) for pair in sources.items() for x in pair):
            raise BadInput("sources is not a mapping of text to text", where=source, remedy="leave it out")
        typed: dict[str, Any] = {name: _typed(name, value) for name, value in values.items() if name != "sources"}
        if source is not None:
            known = {name: source for name, value in typed.items() if value is not None}
            sources = {**known, **sources}
        return cls(**typed, sources=sources)


def _without_folders(model: str | None) -> str | None:
    """The last part of an absolute path: recipes are written into models, where a path of this machine helps nobody."""
    return model if model is None or not Path(model).is_absolute() else Path(model).name or model


def finite_number(value: object) -> float | None:
    """The value as a finite number of plausible size; None if it is not one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _MOST:
        return None
    return float(value)


def whole_seed(value: object) -> int | None:
    """The value as a seed, whatever a file holds there; None if it is not one."""
    read = _typed("seed", value)
    return read if isinstance(read, int) and not isinstance(read, bool) and 0 <= read < MOST_SEEDS else None


def fields_like(key: str) -> list[str]:
    """The recipe fields that a key may misspell or abbreviate."""
    names = [entry.name for entry in fields(TrainingRecipe) if entry.name != "sources"]
    close = difflib.get_close_matches(key[:80], names, n=3, cutoff=0.7)
    return close or [name for name in names if key == "".join(word[0] for word in name.split("_"))]


def _shown(value: object) -> str:
    try:
        return reprlib.repr(value)  # short, whatever a file holds
    except ValueError:
        return "a number of thousands of digits"


def _typed(name: str, value: object) -> object:
    """Convert text to the type of the field; text that does not fit is returned for validation to reject."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if name in ("optimizer", "schedule"):
        return text or None
    if name == "seed":
        return int(text) if re.fullmatch(r"\d{1,20}", text) else text
    if name in _SWITCHES:
        return {"true": True, "false": False}.get(text.lower(), text)
    if name in ("step_milestones", "undecayed"):
        parts = [part.strip() for part in text.strip("[]()").split(",") if part.strip()]
        return parts if name == "undecayed" else [_typed("steps", part) for part in parts]
    if name == "group_weight_decay":
        pairs = [part.rpartition(":") for part in text.strip("{}").split(",") if part.strip()]
        return {glob.strip(): _typed("weight_decay", decay) for glob, _, decay in pairs}
    try:
        return float(text)
    except ValueError:
        return text


def merge_recipes(*recipes: TrainingRecipe) -> TrainingRecipe:
    """One recipe out of several, the most trusted first: field by field, the first that is known.

    What is said about an optimizer (momentum, dampening, Nesterov, decoupled decay) is taken only from
    recipes that name no other one. Raises `BadInput` if the result is impossible.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for recipe in recipes:
        other = recipe.optimizer is not None and values.get("optimizer") not in (None, recipe.optimizer)
        for entry in fields(recipe):
            name = entry.name
            value = getattr(recipe, name)
            if name == "sources" or value is None or name in values or (other and name in _OF_THE_OPTIMIZER):
                continue
            values[name] = value
            if name in recipe.sources:
                sources[name] = recipe.sources[name]
    return TrainingRecipe(**values, sources=sources)
