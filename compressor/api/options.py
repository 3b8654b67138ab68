"""What can be asked of each verb: every option once, with its help, its default and how it is read.

The flags and the help of the command line, the signatures and docstrings of the Python functions, the command that
repeats a run and the reference page come from these dataclasses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from compressor.api.option import Kind, Options, option, options
from compressor.arguments import as_count, as_number, as_patterns, as_size, one_of, require_kind, require_model
from compressor.choices import ExportTarget, FormRequest, Head, MergeMode, Split
from compressor.errors import BadInput

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import Dataset

    from compressor.calibration import CalibrationSettings
    from compressor.data import CustomMetric
    from compressor.evaluation import TimingSettings
    from compressor.model import Factory, ModelLike
    from compressor.planning import Plan, PlanningSettings
    from compressor.progress import Progress
    from compressor.recipe import TrainingRecipe

    # Tensors, arrays, pairs, mappings, loaders and texts are all iterable.
    DataLike = str | Path | Iterable[Any] | Dataset[Any]
    RecipeLike = TrainingRecipe | str | Path | Mapping[str, Any] | Sequence[TrainingRecipe | str | Path]

# The panels of the help.
BUDGET, CALIBRATION, TRAINING, LAYERS, RUNNING = (
    "Budget, one of",
    "Calibration",
    "Training recipe",
    "Layers",
    "Running",
)

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


def _saved_model(value: Any, name: str) -> Any:
    require_kind(value, name, (str, Path), remedy="give the path of a file or folder, or org/name of the hub")
    return _model(value, name)


def _data(value: Any, name: str) -> Any:
    """A path, the name of built-in data, or an object, of which more is said where it is opened."""
    if not isinstance(value, str | Path) or str(value).startswith("builtin:"):
        return value
    return _path(value, name)


def _called(value: Any, name: str) -> Any:
    if not callable(value):
        what = f"`{name}` is a {type(value).__name__}, which cannot be called"
        raise BadInput(what, option=name, remedy=f"give one that is called as those of transformers: {_CALLS[name]}")
    return value


_CALLS = {"tokenizer": "`tokenizer(text)`", "processor": "`processor(images=images)`"}


def _metric(value: Any, name: str) -> Any:
    if not callable(value):
        what = f"`{name}` is a {type(value).__name__}, which cannot be called"
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
            said.append(TrainingRecipe.from_dict(each))
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


def _as_is(value: Any, name: str) -> Any:
    return value


def _settings(name: str) -> Kind:
    def read(value: Any, option: str) -> Any:
        if type(value).__name__ != name:  # told by name, because importing the class would load torch
            what = f"`{option}` is a {type(value).__name__}"
            raise BadInput(what, option=option, remedy=f"give a compressor.{name}")
        return value

    return Kind(name, read)


def _choice(literal: Any) -> Kind:
    def read(value: Any, name: str) -> Any:
        one_of(value, name, get_args(literal))
        return value

    words = ", ".join(f'"{each}"' for each in get_args(literal))
    return Kind(f"Literal[{words}]", read, shell=literal)


def _count(least: int, most: int = 2**63 - 1) -> Kind:
    return Kind("int", partial(as_count, least=least, most=most), shell=int)


SWITCH = Kind("bool", _switch, shell=bool, switch=True)
NUMBER = Kind("float", as_number, shell=float)
SHARE = Kind("float | str", partial(as_number, percent=True), metavar="SHARE")
SIZE = Kind("int | str", as_size, metavar="SIZE", plain=_plain_size)
TEXT = Kind("str", _text)
PATH = Kind("str | Path", _path, metavar="PATH")
PATTERNS = Kind("str | Sequence[str]", as_patterns, metavar="PATTERN", repeated=True)
MODEL = Kind("ModelLike", _model, metavar="MODEL")
SAVED_MODEL = Kind("str | Path", _saved_model, metavar="ORIGINAL")
DATA = Kind("DataLike", _data, metavar="DATA", plain=_named_data)
CALLED = Kind("Callable[..., Any]", _called)
METRIC = Kind("Callable[[nn.Module, Iterable[Any]], float]", _metric)
SEVERAL_DATA = Kind("Sequence[DataLike]", _several_data, metavar="DATA", repeated=True)
FACTORY = Kind("Factory", _factory, metavar="MODULE:NAME", plain=_plain_factory)
PLAN = Kind("Plan | str | Path", _plan, metavar="FILE")
RECIPE = Kind("RecipeLike", _recipe, metavar="FILE", flags=_recipe_flags, plain=_plain_recipe)
SHAPE = Kind("str | Sequence[int]", _input_shape, metavar="3x224x224")
OBJECT = Kind("object", _as_is)

KINDS_OF_DATA = "text, jsonl, csv, npz or safetensors file, image folder, builtin:digits, builtin:stdlib"


@options
class HubOptions(Options):
    """Which version of a model of the hub is meant."""

    revision: str | None = option("Branch, tag or commit of a model of the hub.", TEXT, metavar="REVISION")


@options
class ArchitectureOptions(Options):
    """Who builds an architecture that transformers does not know."""

    factory: Factory | None = option(
        "Code that builds an architecture that is not in transformers: package.module:function, file.py:function, or "
        "in Python the function itself.",
        FACTORY,
        flag="--model",
    )


@options
class TrainingOptions(Options):
    """How the model was trained."""

    recipe: tuple[TrainingRecipe | Path, ...] = option(
        "How the model was trained: hyperparameters in YAML or JSON, a model card, or a trainer's file.",
        RECIPE,
        (),
        panel=TRAINING,
        default_text="files beside the model",
    )


@options
class LayerOptions(Options):
    """Which layers are compressed."""

    include: tuple[str, ...] = option("Only these layers: globs, or re:EXPRESSION.", PATTERNS, (), panel=LAYERS)
    exclude: tuple[str, ...] = option("Not these layers.", PATTERNS, (), panel=LAYERS)


@options
class EmbeddingOptions(LayerOptions):
    """Whether embeddings are among these layers."""

    embeddings: bool = option("Embeddings too, each with the output head tied to it.", SWITCH, False, panel=LAYERS)


@options
class FormOptions(EmbeddingOptions):
    """How pairs are stored."""

    form: FormRequest = option(
        "How pairs are stored: pivoted is smaller, plain is faster.", _choice(FormRequest), "auto", panel=LAYERS
    )


@options
class DataOptions(Options):
    """What the model is measured on."""

    data: DataLike | None = option(f"Measure the cost on this: {KINDS_OF_DATA}.", DATA)
    data_samples: int | None = option(
        "Examples, or windows of text, to measure on, evenly spaced.", _count(1), default_text="all"
    )
    tokenizer: Callable[..., Any] | None = option(
        "What makes tokens of texts, for a loaded module or instead of the folder's own: called as those of "
        "transformers.",
        CALLED,
        only_python=True,
        repeatable=False,
    )
    processor: Callable[..., Any] | None = option(
        "What makes inputs of images, for a loaded module or instead of the folder's own: an image processor of "
        "transformers, or a processor that has one and a tokenizer.",
        CALLED,
        only_python=True,
        repeatable=False,
    )


@options
class MetricOptions(DataOptions):
    """What the model is measured on, and by what."""

    metric: Callable[[nn.Module, Iterable[Any]], float] | None = option(
        "Measure the model by this instead of accuracy or perplexity: a function of a model and an iterable of batches "
        "that returns a number. The batches are as the loader makes them, on the model's device; `max_drop` is then in "
        "its unit.",
        METRIC,
        only_python=True,
        repeatable=False,
    )
    higher_is_better: bool = option(
        "Whether a higher value of `metric` is better.", SWITCH, True, only_python=True, repeatable=False
    )

    @property
    def custom_metric(self) -> CustomMetric | None:
        """The metric with its direction, where one was given."""
        if self.metric is None:
            return None
        from compressor.data import CustomMetric

        return CustomMetric(self.metric, self.higher_is_better)

    def check_metric(self) -> None:
        """Raise `BadInput` for a metric without data, or a direction without a metric."""
        if self.metric is not None and self.data is None:
            what = "`metric` is measured on data, and none was given"
            raise BadInput(what, option="metric", remedy="pass `data=DATA`")
        if self.metric is None and "higher_is_better" in self.given:
            what = "`higher_is_better` is about `metric`, and none was given"
            raise BadInput(what, option="higher_is_better", remedy="pass `metric`, or leave it out")


@options
class ProgressOptions(Options):
    """Who is told how far the work is."""

    progress: Progress | None = option(
        "Called with the name of a step, how many of its parts are done, and how many there are.",
        Kind("Progress", _as_is),
        only_python=True,
        repeatable=False,
    )


@options
class RunOptions(ProgressOptions):
    """Where the work is done, and who is told how far it is."""

    device: str = option("auto, cpu, cuda or cuda:N.", TEXT, "auto", panel=RUNNING, repeatable=False)


@options
class OverwriteOptions(Options):
    """Whether outputs are replaced."""

    overwrite: bool = option(
        "Replace outputs that exist: files, and model folders that hold nothing else.", SWITCH, False, repeatable=False
    )


@options
class OutputOptions(OverwriteOptions):
    """Where the model is written."""

    output: Path | None = option(
        "File or folder to write.", PATH, short="-o", default_text="a name beside the model", repeatable=False
    )
    max_shard_size: int = option("Largest weight file of an output.", SIZE, "5GB", panel=RUNNING, default_text="5GB")


@options
class BudgetOptions(Options):
    """How much is removed: at most one of them."""

    keep: float | None = option(
        "Fraction of the eligible layers' parameters to keep, such as 0.6 or 60%.", SHARE, panel=BUDGET
    )
    max_size: int | None = option("Size of the weight files, such as 40MB.", SIZE, panel=BUDGET)
    max_drop: float | None = option(
        "The smallest model that is at most this much worse on `data`: accuracy as a fraction (0.01 is one point), or "
        "increase in perplexity. One standard error is added to a measured drop.",
        NUMBER,
        panel=BUDGET,
    )
    tolerance: float | None = option("Relative error per layer, such as 0.05 or 5%.", SHARE, panel=BUDGET)
    plan: Plan | Path | None = option("The ranks of an edited 'compress plan' file.", PLAN, panel=BUDGET)


@options
class CalibrationOptions(Options):
    """Data by which ranks and factors are chosen so that the loss changes least."""

    calibration: DataLike | None = option(
        "Choose ranks and factors by what the loss notices on this: the same kinds of data as `data`, the training "
        "split of builtin ones. Needs the model's architecture.",
        DATA,
        panel=CALIBRATION,
    )
    calibration_samples: int | None = option(
        "Examples, or windows of text, to use of it.", _count(2), panel=CALIBRATION, default_text="128"
    )
    calibration_length: int | None = option(
        "Tokens per window that its text is cut into.", _count(1), panel=CALIBRATION, default_text="the model's own"
    )
    refine: bool = option(
        "Last, fit the factors to the dense model's outputs on the calibration data, a block at a time; kept only "
        "where holdout examples agree. Changes no rank; faster without.",
        SWITCH,
        True,
        flag="--refine/--no-refine",
        panel=CALIBRATION,
    )
    seed: int = option(
        "Random seed of the targets sampled during calibration.", _count(0, 2**64 - 1), 0, panel=CALIBRATION
    )
    calibration_settings: CalibrationSettings | None = option(
        "Every knob of calibration and of the search over plans; `refine` goes before its `refine`.",
        _settings("CalibrationSettings"),
        only_python=True,
    )


@options
class ThresholdOptions(Options):
    """By which thresholds ranks are chosen."""

    planning_settings: PlanningSettings | None = option(
        "The thresholds by which ranks are chosen.", _settings("PlanningSettings"), only_python=True
    )


@options
class TimingOptions(Options):
    """How often forwards are timed."""

    timing_settings: TimingSettings | None = option(
        "How often forwards are timed.", _settings("TimingSettings"), only_python=True
    )


@options
class BaseOptions(Options):
    """The model that a fine-tune started from."""

    base: ModelLike | None = option(
        "The model that MODEL was fine-tuned from: compress the difference, not the weights.",
        MODEL,
        metavar="ORIGINAL",
    )


@options
class PlanOptions(
    RunOptions,
    FormOptions,
    ArchitectureOptions,
    CalibrationOptions,
    ThresholdOptions,
    MetricOptions,
    TrainingOptions,
    BudgetOptions,
    BaseOptions,
    HubOptions,
):
    """What can be asked of `plan`."""

    verb = "plan"

    def check(self) -> None:
        budgets = [name for name in ("keep", "max_size", "max_drop", "tolerance", "plan") if name in self.given]
        if len(budgets) > 1:
            names = " and ".join(f"`{name}`" for name in budgets)
            raise BadInput(f"{names} are two budgets", option=budgets[0], remedy="ask for one of them")
        if self.plan is not None and "form" in self.given:
            what = f"`plan` and `form='{self.form}'` contradict each other"
            raise BadInput(what, option="plan", remedy="state the forms in the plan")
        if self.base is not None:
            self._check_base()
        self._check_needs()
        self.check_metric()

    def _check_needs(self) -> None:
        if self.calibration is None:
            for name in ("refine", "calibration_samples", "calibration_length", "seed", "calibration_settings"):
                if name in self.given and (name != "refine" or not self.refine):
                    shown = "refine=False" if name == "refine" else name
                    what = f"`{shown}` is about calibration data, and none were given"
                    raise BadInput(what, option=name, remedy="pass `calibration=DATA`, or leave it out")
        if self.max_drop is not None and self.data is None:
            what = "`max_drop` is measured on data, and none was given"
            raise BadInput(what, option="max_drop", remedy="pass `data=DATA`")
        if self.data_samples is not None and self.data is None:
            what = "`data_samples` is about data, and none were given"
            raise BadInput(what, option="data_samples", remedy="pass `data=DATA`, or leave it out")
        if self.calibration is not None and not {"keep", "max_size", "max_drop", "plan"} & self.given:
            raise BadInput(
                "calibration shares a size among the layers, and none was asked for",
                option="calibration",
                remedy="ask for one with `keep` or `max_size`, for a `max_drop`, or give a `plan`",
            )

    def _check_base(self) -> None:
        """What does not apply to differences to a base."""
        for name in _NOT_FOR_DIFFERENCES:
            if name in self.given and not (name == "form" and self.form != "pivoted"):
                shown = f"`{name}={getattr(self, name)!r}`" if name in ("form", "refine") else f"`{name}`"
                what = f"{shown} is not for differences to a base"
                raise BadInput(what, option=name, remedy=f"leave out {shown}, or `base`")


_NOT_FOR_DIFFERENCES = (
    *("max_drop", "calibration", "calibration_samples", "calibration_length", "refine", "seed", "calibration_settings"),
    *("planning_settings", "form", "embeddings", "push_to", "max_shard_size"),
)


@options
class CompressOptions(OutputOptions, TimingOptions, PlanOptions):
    """What can be asked of `compress`."""

    verb = "compress"

    allow_miss: bool = option(
        "Write the model, with a warning, even where the reported data show a larger drop than `max_drop`.",
        SWITCH,
        False,
        panel=BUDGET,
    )
    push_to: str | None = option(
        "Send the written folder to the Hugging Face hub; a repository made for it is private, and weights of one are "
        "replaced only with `overwrite`.",
        TEXT,
        metavar="ORG/NAME",
        repeatable=False,
    )
    dry_run: bool = option("Say what would be done; write no model.", SWITCH, False, repeatable=False)

    def check(self) -> None:
        super().check()
        if self.allow_miss and self.max_drop is None:
            what = "`allow_miss` is about `max_drop`, and none was given"
            raise BadInput(what, option="allow_miss", remedy="pass `max_drop`, or leave it out")
        if self.push_to is not None and self.dry_run:
            what = "`push_to` and `dry_run` contradict each other"
            raise BadInput(what, option="push_to", remedy="leave one of them out")


@options
class InspectOptions(RunOptions, EmbeddingOptions, ArchitectureOptions, ThresholdOptions, TrainingOptions, HubOptions):
    """What can be asked of `inspect`."""

    verb = "inspect"

    epsilon: float = option("Relative residual at which the memory window ends.", NUMBER, 0.1)

    def check(self) -> None:
        if not 0 < self.epsilon < 1:
            what = f"`epsilon` {self.epsilon:g} is out of range"
            raise BadInput(what, option="epsilon", remedy="give a number between 0 and 1")


@options
class EvaluateOptions(RunOptions, TimingOptions, ArchitectureOptions, MetricOptions):
    """What can be asked of `evaluate`."""

    verb = "evaluate"

    data: DataLike = option(f"What to measure on: {KINDS_OF_DATA}.", DATA, MISSING)
    baseline: ModelLike | None = option("The model to compare with.", MODEL, metavar="ORIGINAL")
    split: Split = option("Which part of builtin data.", _choice(Split), "test")

    def check(self) -> None:
        self.check_metric()


@options
class RestoreOptions(ProgressOptions, OutputOptions, ArchitectureOptions):
    """What can be asked of `restore`."""

    verb = "restore"


@options
class ExportOptions(ProgressOptions, OutputOptions, ArchitectureOptions):
    """What can be asked of `export`."""

    verb = "export"

    to: ExportTarget = option(
        "dense: any engine. hf-remote: transformers with trust_remote_code. onnx: any onnxruntime. lora: a PEFT "
        "adapter of the difference to `base`.",
        _choice(ExportTarget),
        MISSING,
    )
    base: str | Path | None = option(
        "The model that a fine-tune, stored as what it adds to it, started from.", SAVED_MODEL
    )
    input_shape: tuple[int, ...] | None = option("With onnx and `factory`, the shape of one example.", SHAPE)


@options
class DiagnoseOptions(RunOptions, LayerOptions, ArchitectureOptions, TrainingOptions, DataOptions):
    """What can be asked of `diagnose`."""

    verb = "diagnose"

    data: DataLike | None = option(
        f"What the model was trained on, to compare weights with the gradient of the loss: {KINDS_OF_DATA}.", DATA
    )
    series: Path | None = option(
        "Checkpoints of the same run, files or folders whose names tell their step: how ranks evolved.",
        PATH,
        metavar="DIR",
    )


@options
class ExploreOptions(ProgressOptions, OverwriteOptions):
    """What can be asked of `explore`."""

    verb = "explore"

    output: Path = option("The page to write.", PATH, "explorer.html", short="-o", metavar="FILE.html", positional=True)
    recipe: Any = option(
        "Open it on these hyperparameters, or on a model's and its layers.",
        Kind("TrainingRecipe | str | Path", _as_is),
        metavar="FILE|MODEL",
    )


@options
class MergeOptions(RunOptions, OutputOptions, ArchitectureOptions):
    """What can be asked of `merge`."""

    verb = "merge"

    output: Path = option("File or folder to write.", PATH, MISSING, short="-o", repeatable=False)
    mode: MergeMode = option(
        "sum: add the weights, for weight decay and nearly orthogonal inputs. concat: side by side, safe.",
        _choice(MergeMode),
        MISSING,
    )
    head: Head = option(
        "With concat, whether the outputs are added or put one after the other.", _choice(Head), "shared"
    )
    base: str | Path | None = option(
        "With sum, the model that all were fine-tuned from: what each changed in it is added.", SAVED_MODEL
    )
    data: tuple[DataLike, ...] = option(
        "Each network's data, once for each and in their order: measure interference and quality on it.",
        SEVERAL_DATA,
        (),
    )
    data_samples: int | None = option(
        "Examples, or windows of text, to measure on, evenly spaced.", _count(1), default_text="all"
    )
    max_drop: float | None = option(
        "Write nothing if a task loses more: a fraction of accuracy, or an increase in perplexity.", NUMBER
    )

    def check(self) -> None:
        if self.mode == "sum" and self.head == "separate":
            what, remedy = "a sum has one head", "leave out `head`, or merge with `mode='concat'`"
            raise BadInput(what, option="head", remedy=remedy)
        if self.mode == "concat" and self.base is not None:
            what = "`base` and `mode='concat'` contradict each other"
            raise BadInput(what, option="base", remedy="merge fine-tunes with `mode='sum'`")
        if self.max_drop is not None and not self.data:
            remedy = "give `data` once for each network, in order"
            raise BadInput("`max_drop` needs to measure", option="max_drop", remedy=remedy)
        if self.max_drop is not None and not self.max_drop >= 0:
            what = f"`max_drop` {self.max_drop:g} is out of range"
            raise BadInput(what, option="max_drop", remedy="give a number from 0 on, such as 0.01")


VERBS: tuple[type[Options], ...] = (
    CompressOptions,
    InspectOptions,
    PlanOptions,
    EvaluateOptions,
    RestoreOptions,
    ExportOptions,
    DiagnoseOptions,
    MergeOptions,
    ExploreOptions,
)
