"""What is asked of `compress`: whether the options go together, and what they come to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from compressor.arguments import as_count, as_number, as_patterns, one_of, require_kind
from compressor.calibration.drop import require_possible_drop
from compressor.data import EvaluationData, has_splits, open_data_for, open_search_data, require_apart
from compressor.errors import BadInput
from compressor.io import parse_size
from compressor.model import LayerSelection, Model
from compressor.planning import Budget, FormRequest, Plan, requested_budget
from compressor.recipe import TrainingRecipe

# What applies where nothing else is asked.
SHARD_SIZE = "5GB"


def requested(
    keep: float | str | None,
    max_size: int | str | None,
    max_drop: float | None,
    tolerance: float | str | None,
    plan: Plan | str | Path | None,
    form: FormRequest,
) -> Budget | None:
    """The budget that is asked for by the options, None where nothing is; BadInput where they contradict each other."""
    budget = requested_budget(
        keep=as_number(keep, "keep", percent=True),
        max_size=None if max_size is None else as_size(max_size, "max_size"),
        max_drop=as_number(max_drop, "max_drop"),
        tolerance=as_number(tolerance, "tolerance", percent=True),
    )
    if plan is None:
        return budget
    if form != "auto":
        raise BadInput(f"`plan` and `form='{form}'` contradict each other", remedy="state the forms in the plan")
    if budget is not None:
        raise BadInput(f"`plan` and `{budget.option}` are two budgets", remedy="ask for one of them")
    return Budget("plan")


def require_known_kinds(
    output: object, data: object, recipe_file: object, plan: object, calibration: object, form: object
) -> None:
    """Raise `BadInput` for objects that are not of the kind that an option takes."""
    a_path = "give the path of a file or folder"
    for option, value in (("output", output), ("data", data), ("recipe_file", recipe_file)):
        require_kind(value, option, (str, Path), remedy=a_path)
    one_of(form, "form", get_args(FormRequest))
    require_kind(plan, "plan", (Plan, str, Path), remedy="give a plan, or the path of one")
    require_kind(calibration, "calibration", (str, Path, Iterable), remedy=f"{a_path}, or batches")


def require_what_is_needed(
    budget: Budget | None,
    data: str | Path | None,
    calibration: str | Path | Iterable[Any] | None,
    *,
    refine: bool,
    allow_miss: bool,
) -> None:
    """Raise `BadInput` where an option lacks another without which it means nothing."""
    if not refine and calibration is None:
        raise BadInput(
            "`refine=False` is about calibration data, and none were given",
            remedy="pass `calibration=DATA`, or leave it out",
        )
    if budget is not None and budget.kind == "max-drop" and data is None:
        raise BadInput("`max_drop` is measured on data, and none was given", remedy="pass `data=DATA`")
    if allow_miss and (budget is None or budget.kind != "max-drop"):
        raise BadInput(
            "`allow_miss` is about `max_drop`, and none was given", remedy="pass `max_drop`, or leave it out"
        )
    if calibration is not None and (budget is None or budget.kind == "tolerance"):
        raise BadInput(
            "calibration shares a size among the layers, and none was asked for",
            remedy="ask for one with `keep` or `max_size`, for a `max_drop`, or give a `plan`",
        )


def require_fine_tune(
    budget: Budget | None,
    calibration: str | Path | Iterable[Any] | None,
    calibration_samples: int | None,
    calibration_sequence_length: int | None,
    form: FormRequest,
    push_to: str | None,
    max_shard_size: int | str,
    seed: int,
    *,
    refine: bool,
    embeddings: bool,
) -> None:
    """Raise `BadInput` for what is not done to differences to a base."""
    for given, what in (
        (budget is not None and budget.kind == "max-drop", "`max_drop`"),
        (not refine, "`refine=False`"),
        (calibration is not None, "`calibration`"),
        (calibration_samples is not None, "`calibration_samples`"),
        (calibration_sequence_length is not None, "the length of calibration's windows"),
        (seed != 0, "`seed`"),
        (form == "pivoted", "`form='pivoted'`"),
        (embeddings, "`embeddings`"),
        (push_to is not None, "`push_to`"),
        (max_shard_size != SHARD_SIZE, "`max_shard_size`"),
    ):
        if given:
            raise BadInput(f"{what} is not for differences to a base", remedy=f"leave out {what}, or `base`")


def data_to_measure_on(
    data: str | Path | None,
    limit: int | None,
    subject: Model,
    max_drop: float | None,
    calibration: str | Path | Iterable[Any] | None,
) -> tuple[EvaluationData | None, EvaluationData | None]:
    """Data that decide about the size, where a drop does, and data for the report."""
    if data is None:
        return None, None
    if isinstance(calibration, str | Path):
        require_apart(calibration, data)
    if max_drop is None:
        return None, open_data_for(data, subject.preprocessing, limit=limit)
    deciding, reported = open_search_data(data, subject.preprocessing, limit)
    require_possible_drop(max_drop, deciding)
    return deciding, reported


def training_options(
    known: TrainingRecipe, recipe: TrainingRecipe | str | Path | None, recipe_file: str | Path | None
) -> dict[str, object]:
    """The options of a command that say of the training what was said here."""
    file = recipe if isinstance(recipe, str | Path) else recipe_file
    flags = {
        source.removeprefix("flag --"): getattr(known, name)
        for name, source in known.sources.items()
        if source.startswith("flag --")
    }
    return {"recipe": None if file is None else Path(file), **flags}


def named_data(data: object) -> object:
    """Data that lie in a file as its path, and others as they were given."""
    return Path(data) if isinstance(data, str) and not has_splits(data) else data


def as_size(size: int | str, option: str) -> int:
    """A size as a number of bytes."""
    return parse_size(size) if isinstance(size, str) else as_count(size, option, least=1)


def stated(
    recipe: TrainingRecipe | str | Path | None, recipe_file: str | Path | None
) -> tuple[TrainingRecipe | Path, ...]:
    given = [Path(each) if isinstance(each, str) else each for each in (recipe, recipe_file)]
    return tuple(each for each in given if each is not None)


def selection(
    include: str | Sequence[str], exclude: str | Sequence[str], *, embeddings: bool = False
) -> LayerSelection:
    return LayerSelection(as_patterns(include, "include"), as_patterns(exclude, "exclude"), embeddings)
