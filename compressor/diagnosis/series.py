"""How the effective ranks and the norms of a model's matrices evolved over the checkpoints of one training run."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compressor.errors import BadInput
from compressor.factorize import grouped_values
from compressor.io import open_checkpoint, require_finite
from compressor.io.checkpoint import WEIGHT_SUFFIXES
from compressor.io.steps import Unit, named_steps, require_other_step
from compressor.lowrank import as_matrix
from compressor.measure import EffectiveRanks, effective_ranks
from compressor.model import Model
from compressor.progress import Progress
from compressor.recipe.training_files import is_training_state

_SHARD = re.compile(r"-\d+-of-\d+$")


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
    unit, found = checkpoints_of(Path(folder))
    layers = [layer for layer in subject.layers if layer.eligible]
    ranks: dict[str, list[EffectiveRanks]] = {layer.name: [] for layer in layers}
    norms: dict[str, list[float]] = {layer.name: [] for layer in layers}
    for before, (_, path) in enumerate(found):
        checkpoint = open_checkpoint(path)
        for done, layer in enumerate(layers, start=before * len(layers) + 1):
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
            values = grouped_values(as_matrix(layer, weight.to(device)), layer.groups)
            ranks[layer.name].append(effective_ranks(values))
            norms[layer.name].append(math.hypot(*values))
            if progress:
                progress("series", done, len(found) * len(layers))
    measured = tuple(SeriesLayer(layer.name, tuple(ranks[layer.name]), tuple(norms[layer.name])) for layer in layers)
    return RankSeries(
        str(folder), tuple(path.name for _, path in found), tuple(step for step, _ in found), measured, unit
    )


def checkpoints_of(folder: Path) -> tuple[Unit, list[tuple[int, Path]]]:
    """What the checkpoints of one run are numbered by, and each with its number, in their order."""
    if not folder.is_dir():
        raise BadInput("is no folder", where=folder, remedy="give the folder that holds the checkpoints of one run")
    unit, numbers = named_steps(folder, [path for path in sorted(folder.iterdir()) if _has_weights(path)])
    found: dict[int, Path] = {}
    for path, number in numbers.items():
        require_other_step(found, number, path, unit=unit)
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
