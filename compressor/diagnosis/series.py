"""How the effective ranks and the norms of a model's matrices evolved over the checkpoints of one training run."""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch

from compressor.errors import BadInput
from compressor.io import open_checkpoint, require_finite
from compressor.io.checkpoint import WEIGHT_SUFFIXES
from compressor.lowrank import as_matrix
from compressor.measure import EffectiveRanks, effective_ranks, singular_values
from compressor.model import Model
from compressor.progress import Progress
from compressor.recipe.training_files import is_training_state

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
_SHARD = re.compile(r"-\d+-of-\d+$")
_RENAME = "rename them, as in checkpoint-500 or epoch-3"


@dataclass(frozen=True)
class SeriesLayer:
    """One matrix over the checkpoints: its effective ranks and its Frobenius norm at each."""

    name: str
    ranks: tuple[EffectiveRanks, ...]
    norms: tuple[float, ...]


@dataclass(frozen=True)
class RankSeries:
    """The checkpoints of one run in the order of their `steps`, with every layer's ranks and norms at each.

    `unit` is what `steps` count: optimizer steps or epochs.
    """

    folder: str
    checkpoints: tuple[str, ...]
    steps: tuple[int, ...]
    layers: tuple[SeriesLayer, ...]
    unit: Unit = "step"

    def to_dict(self) -> dict[str, Any]:
        """The series, in the types of JSON."""
        return {
            "folder": self.folder,
            "checkpoints": list(self.checkpoints),
            "steps": list(self.steps),
            "unit": self.unit,
            "layers": [
                {"name": each.name, "ranks": [ranks.to_dict() for ranks in each.ranks], "norms": list(each.norms)}
                for each in self.layers
            ],
        }

    def norm_before(self, layer: str, step: float, *, steps_per_epoch: float | None = None) -> float | None:
        """The norm of a layer at the last checkpoint that is not later than optimizer step `step`.

        None if there is no such checkpoint, or if the checkpoints are numbered by epochs of unknown length.
        """
        length = 1.0 if self.unit == "step" else steps_per_epoch
        if length is None:
            return None
        earlier = [index for index, each in enumerate(self.steps) if each * length <= step]
        norms = next((each.norms for each in self.layers if each.name == layer), ())
        return norms[earlier[-1]] if earlier and norms else None


def measure_series(
    folder: str | Path, subject: Model, device: torch.device, *, progress: Progress | None = None
) -> RankSeries:
    """Measure the eligible layers of a model in every checkpoint in `folder`, its files or folders with a step number.

    Raises `BadInput` for a folder with fewer than two checkpoints, for two of the same step, for ambiguous names, and
    for a checkpoint that lacks a layer of the model or has it in another shape.
    """
    unit, found = _checkpoints(Path(folder))
    layers = [layer for layer in subject.layers if layer.eligible]
    ranks: dict[str, list[EffectiveRanks]] = {layer.name: [] for layer in layers}
    norms: dict[str, list[float]] = {layer.name: [] for layer in layers}
    for done, (_, path) in enumerate(found, start=1):
        checkpoint = open_checkpoint(path)
        for layer in layers:
            info = checkpoint.tensors.get(layer.tensor)
            if info is None or tuple(info.shape) != layer.tensor_shape:
                how = "lacks" if info is None else "has another shape of"
                raise BadInput(
                    f"{how} the layer {layer.name} of {subject.name}",
                    where=path,
                    remedy="give the folder of the checkpoints of one run of this model",
                )
            weight = checkpoint.read(layer.tensor)
            require_finite(layer.tensor, weight, path)
            values = singular_values(as_matrix(layer, weight.to(device)))
            ranks[layer.name].append(effective_ranks(values))
            norms[layer.name].append(math.hypot(*values))
        if progress:
            progress("series", done, len(found))
    measured = tuple(SeriesLayer(layer.name, tuple(ranks[layer.name]), tuple(norms[layer.name])) for layer in layers)
    return RankSeries(
        str(folder), tuple(path.name for _, path in found), tuple(step for step, _ in found), measured, unit
    )


def _checkpoints(folder: Path) -> tuple[Unit, list[tuple[int, Path]]]:
    if not folder.is_dir():
        raise BadInput("is no folder", where=folder, remedy="give the folder that holds the checkpoints of one run")
    unit, numbers = _steps(folder, [path for path in sorted(folder.iterdir()) if _has_weights(path)])
    found: dict[int, Path] = {}
    for path, number in numbers.items():
        if number in found:
            raise BadInput(
                f"{found[number].name} and {path.name} are both of {unit} {number}",
                where=folder,
                remedy="keep one of them, or rename them if they are not",
            )
        found[number] = path
    if len(found) < 2:
        raise BadInput(
            f"holds {len(found)} checkpoints with a step in their names",
            where=folder,
            remedy="give at least two, such as checkpoint-500 and checkpoint-1000",
        )
    return unit, sorted(found.items())


def _has_weights(path: Path) -> bool:
    """Whether a path is named as a checkpoint, and not as part of one or as the state of an optimizer."""
    if path.is_dir():
        return any(inner.name.endswith((*WEIGHT_SUFFIXES, ".index.json")) for inner in path.iterdir())
    return path.suffix.lower() in WEIGHT_SUFFIXES and not _SHARD.search(path.stem) and not is_training_state(path)


def _steps(folder: Path, checkpoints: list[Path]) -> tuple[Unit, dict[Path, int]]:
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
