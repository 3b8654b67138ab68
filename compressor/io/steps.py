"""The steps of the checkpoints of a training run, by their names or by what a trainer left beside them."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

from compressor.errors import BadInput
from compressor.recipe.trainer import read_trainer_state

logger = logging.getLogger(__name__)

Unit = Literal["step", "epoch"]

_WORDS: dict[str, str] = {
    "step": r"(?:global[-_ ]?)?steps?|iterations?|iters?|it|updates?",
    "epoch": r"epochs?|ep",
    "checkpoint": r"checkpoints?|ckpts?",
}
_NUMBER = r"(\d+)([km]?)(?![a-z\d]|\.\d)"
# "step=100" before "100 steps": in "epoch=3-step=100" the step is not 3.
_NAMED = {
    word: (
        re.compile(rf"(?<![a-z])(?:{spelled})[-_=:. ]*{_NUMBER}"),
        re.compile(rf"(?<![\d.])(\d+)([km]?)[-_ ]?(?:{spelled})(?![a-z])"),
    )
    for word, spelled in _WORDS.items()
}
_MULTIPLE = {"": 1, "k": 10**3, "m": 10**6}
# Numbers that are not steps: decimals, values of a metric, and versions such as Lightning's "-v1".
_NO_STEP = re.compile(
    r"\d+\.\d[\d.]*(?:e[-+]?\d+)?|(?:loss|acc|accuracy|auc|f1|map|psnr|wer|ppl|perplexity|score|seed)[-_=:. ]*\d+"
    r"|(?<![a-z])v\d+"
)
_WHOLE_NUMBER = re.compile(rf"(?<![\d.]){_NUMBER}")
_RENAME = "rename them, as in checkpoint-500 or epoch-3"


def steps_in_order(checkpoints: Sequence[Path]) -> tuple[Unit, list[tuple[int, Path]]]:
    """Checkpoints of one run in the order of their steps, by the `trainer_state.json` in their folders or their names.

    Raises `BadInput` for one without a step, for two of the same, and for ambiguous names.
    """
    told = {path: _told(path) for path in checkpoints}
    known = {path: step for path, step in told.items() if step is not None}
    unit: Unit = "step"
    if len(known) < len(told):
        unit, known = named_steps(Path(checkpoints[0]).parent, list(told))
    for path in told:
        if path not in known:
            raise BadInput("no step is known of it", where=path, remedy=_RENAME)
    found: dict[int, Path] = {}
    for path, number in known.items():
        require_other_step(found, number, path, unit=unit)
        found[number] = path
    return unit, sorted(found.items())


def _told(path: Path) -> int | None:
    """The step that a trainer's state says."""
    state = path / "trainer_state.json"
    return read_trainer_state(state).steps if state.is_file() else None


def require_other_step(found: Mapping[int, Path], step: int, path: Path, *, unit: Unit) -> None:
    """Raise `BadInput` where a checkpoint of the same step was found before."""
    if step in found:
        raise BadInput(
            f"{found[step].name} and {path.name} are both of {unit} {step}",
            where=path.parent,
            remedy="keep one of them, or rename them if they are not",
        )


def named_steps(folder: Path, checkpoints: list[Path]) -> tuple[Unit, dict[Path, int]]:
    """The unit of the checkpoints' numbers, and the number of each; those without a number are left out."""
    named = {path: _named_numbers(path) for path in checkpoints}
    steps = {path: numbers["step"] for path, numbers in named.items() if "step" in numbers}
    epochs = {path: numbers["epoch"] for path, numbers in named.items() if "epoch" in numbers}
    # "checkpoint-500" and "model_500" are numbered by steps, unless the epoch stands beside.
    loose = {path: numbers["checkpoint"] for path, numbers in named.items() if numbers.keys() == {"checkpoint"}}
    lone = _lone_numbers(folder, [path for path, numbers in named.items() if not numbers])
    if lone:
        logger.warning(
            "the number in %s is taken as its step; if it counts epochs, rename it to epoch=%d, and the others too",
            *((first := min(lone)).name, lone[first]),
        )
    loose |= lone
    only_epochs = sorted(epochs.keys() - steps.keys())
    if not only_epochs:
        by_epoch = sorted(epochs, key=lambda path: (epochs[path], steps[path]))
        if any(steps[later] < steps[earlier] for earlier, later in pairwise(by_epoch)):
            raise BadInput(
                "restarts the steps in every epoch: which checkpoint came last?", where=folder, remedy=_RENAME
            )
        return "step", steps | loose
    if others := sorted((steps.keys() | loose.keys()) - epochs.keys()):
        raise BadInput(
            f"{only_epochs[0].name} has an epoch and {others[0].name} does not, so their order is unclear",
            where=folder,
            remedy=f"{_RENAME}, or move those of other runs",
        )
    return "epoch", epochs


def _named_numbers(path: Path) -> dict[str, int]:
    """The numbers in a name that follow or precede a word for what they count."""
    text = _text(path)
    found = {}
    for word, patterns in _NAMED.items():
        match = next((match for pattern in patterns if (match := pattern.search(text))), None)
        if match is not None:
            found[word] = int(match[1]) * _MULTIPLE[match[2]]
    return found


def _lone_numbers(folder: Path, paths: list[Path]) -> dict[Path, int]:
    """The number in each name that does not say what it counts: the only whole one, or the only one that differs.

    Decimals are never a step, nor is a number after the name of a metric.
    """
    alike: dict[str, dict[Path, list[int]]] = defaultdict(dict)
    for path in paths:
        text = _NO_STEP.sub("", _text(path))
        if numbers := [int(number) * _MULTIPLE[multiple] for number, multiple in _WHOLE_NUMBER.findall(text)]:
            alike[_WHOLE_NUMBER.sub("#", text)][path] = numbers
    steps: dict[Path, int] = {}
    for group in alike.values():
        columns = list(zip(*group.values(), strict=True))
        places = [place for place, column in enumerate(columns) if len(set(column)) > 1] or list(range(len(columns)))
        if len(places) > 1:
            raise BadInput(f"it is unclear which number in {min(group).name} is the step", where=folder, remedy=_RENAME)
        steps |= {path: numbers[places[0]] for path, numbers in group.items()}
    return steps


def _text(path: Path) -> str:
    return (path.name if path.is_dir() else path.stem).lower()
