"""The arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial, wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from compressor.arguments import as_number
from compressor.errors import BadInput

if TYPE_CHECKING:
    from compressor.recipe import TrainingRecipe


def given(what: str, kind: Callable[[str], Any] = Path) -> Callable[[str], Any]:
    """A parser for the name of a file or folder that refuses the empty one, which would mean the folder one is in."""

    def parse(text: str) -> Any:
        if not text:
            raise BadInput(f"{what} is empty", remedy="name a file or folder")
        return kind(text)

    return parse


def share(option: str) -> Callable[[str], float | None]:
    """A parser for a fraction such as 0.6 or 60%."""
    return partial(as_number, option=option, percent=True)


def input_shape(text: str) -> list[int]:
    """The numbers of a shape such as 3x224x224."""
    sides = text.lower().split("x")
    if not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise BadInput(f"--input-shape {text!r} is no shape", remedy="write it without the batch, such as 3x224x224")
    return [int(side) for side in sides]


BUDGET, CALIBRATION, TRAINING = "Budget, one of", "Calibration", "Training recipe"
LAYERS, RUN = "Layers", "Running"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        parser=given("MODEL", str),
        help="A .safetensors, index, .bin or .pt file, a Hugging Face folder, or org/name on the Hugging Face hub.",
        show_default=False,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(metavar="REVISION", help="Branch, tag or commit of a model of the hub.", show_default=False),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="PATH",
        parser=given("--output"),
        help="File or folder to write. Default: a name beside MODEL.",
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="ORIGINAL",
        parser=given("--base", str),
        help="The model that MODEL was fine-tuned from: what was added to it is meant, not the weights.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace outputs that exist: files, and model folders that hold nothing else."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; only warnings and the result.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=RUN)]
ShardSize = Annotated[str, typer.Option(help="Largest weight file of an output.", rich_help_panel=RUN)]
Factory = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODULE:NAME",
        help="Code that builds an architecture that is not in transformers: package.module:factory or file.py:factory.",
        show_default=False,
    ),
]

DataSamples = Annotated[
    int | None,
    typer.Option(
        min=1, help="Examples, or windows of text, to measure on, evenly spaced. Default: all.", show_default=False
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="DATA",
        help="Choose and factorize by what the loss notices, measured on this: the same kinds of data as --data, "
        "the training split of builtin ones. Wants the model's architecture.",
        rich_help_panel=CALIBRATION,
    ),
]
CalibrationSamples = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Examples, or windows of text, to use of it.",
        rich_help_panel=CALIBRATION,
        show_default="128",
    ),
]
Refine = Annotated[
    bool,
    typer.Option(
        "--refine/--no-refine",
        help="Last, fit the factors, a block at a time, to what the dense model makes of the calibration data: kept "
        "only where the holdout examples agree. Changes no rank; without it is faster.",
        rich_help_panel=CALIBRATION,
    ),
]
Seed = Annotated[int, typer.Option(help="Of the targets that calibration draws.", rich_help_panel=CALIBRATION)]
Keep = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        parser=share("keep"),
        help="Fraction of the eligible layers' parameters to keep, such as 0.6 or 60%.",
        rich_help_panel=BUDGET,
    ),
]
MaxSize = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Size of the weight files, such as 40MB.", rich_help_panel=BUDGET),
]
MaxDrop = Annotated[
    float | None,
    typer.Option(
        help="The smallest model that is at most this much worse on --data: accuracy as a fraction "
        "(0.01 is one point), or increase in perplexity.",
        rich_help_panel=BUDGET,
    ),
]
AllowMiss = Annotated[
    bool,
    typer.Option(
        "--allow-miss",
        help="Write the model, with a warning, even where the reported data show a larger drop than --max-drop.",
        rich_help_panel=BUDGET,
    ),
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        parser=share("tolerance"),
        help="Relative error per layer, such as 0.05 or 5%.",
        rich_help_panel=BUDGET,
    ),
]

Include = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Only these layers: globs, or re:EXPRESSION.", rich_help_panel=LAYERS),
]
Exclude = Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="Not these layers.", rich_help_panel=LAYERS)]
Embeddings = Annotated[
    bool,
    typer.Option(
        "--embeddings",
        help="Embeddings too, each with the output head that is tied to it.",
        rich_help_panel=LAYERS,
    ),
]
Form = Annotated[
    Literal["auto", "plain", "pivoted"],
    typer.Option(help="How pairs are stored: pivoted is smaller, plain is faster.", rich_help_panel=LAYERS),
]

RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        metavar="FILE",
        parser=given("--recipe"),
        help="Hyperparameters in YAML or JSON, a card, or a trainer's file. Default: files beside MODEL.",
        rich_help_panel=TRAINING,
    ),
]
# Field of the recipe: what the flag takes, the flag, its help.
TRAINING_FLAGS: dict[str, tuple[type, str, str]] = {
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
    "sequence_length": (
        int,
        "--sequence-length",
        "Tokens per example; 1 for vectors. With --calibration: of the windows that its text is cut into.",
    ),
}


def with_training_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Put the training flags in the place of a command's parameter `recipe`, which gets the recipe that they make."""
    # The recipe's class is imported when a command runs, not before.
    hints = get_type_hints(command, localns={"TrainingRecipe": object}, include_extras=True)
    parameters: list[Parameter] = []
    for parameter in signature(command).parameters.values():
        if parameter.name == "recipe":
            parameters += [_flag_parameter(name) for name in TRAINING_FLAGS]
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))

    @wraps(command)
    def with_flags(**given: Any) -> None:
        command(recipe=_recipe({name: given.pop(name) for name in TRAINING_FLAGS}), **given)

    with_flags.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    with_flags.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_flags


def training_and_windows(
    recipe: TrainingRecipe | None, calibration: str | None
) -> tuple[TrainingRecipe | None, int | None]:
    """What the flags say about the training, and the length of the windows of calibration.

    With calibration `--sequence-length` is the latter, so that a record of the training says nothing it does not know.
    """
    if recipe is None or calibration is None or recipe.sequence_length is None:
        return recipe, None
    sources = {name: source for name, source in recipe.sources.items() if name != "sequence_length"}
    others = replace(recipe, sequence_length=None, sources=sources) if sources else None
    return others, recipe.sequence_length


def _flag_parameter(name: str) -> Parameter:
    kind, flag, description = TRAINING_FLAGS[name]
    option = typer.Option(flag, help=description, rich_help_panel=TRAINING, show_default=False)
    annotation: Any = Annotated[kind | None, option]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _recipe(given: Mapping[str, object]) -> TrainingRecipe | None:
    """What the flags say about the training, each field with its flag as source; None when they say nothing."""
    from compressor.recipe import TrainingRecipe

    known = {name: value for name, value in given.items() if value is not None}
    if not known:
        return None
    return TrainingRecipe.from_dict({**known, "sources": {name: f"flag {TRAINING_FLAGS[name][1]}" for name in known}})
