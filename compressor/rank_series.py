"""How the effective ranks and the norms of a model's matrices evolved over the checkpoints of one training run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compressor.checkpoint import open_checkpoint, require_finite
from compressor.errors import BadInput
from compressor.inspection import Progress
from compressor.measure import EffectiveRanks, effective_ranks, singular_values
from compressor.opened_model import OpenedModel
from compressor.rewrite import as_matrix

_WEIGHT_FILES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".th"})
# The last number in a name is its step, unless the name is that of a part of a sharded file.
_STEP = re.compile(r"(\d+)\D*$")
_SHARD = re.compile(r"-\d+-of-\d+$")


@dataclass(frozen=True)
class SeriesLayer:
    """One matrix over the checkpoints: its effective ranks and its Frobenius norm at each."""

    name: str
    ranks: tuple[EffectiveRanks, ...]
    norms: tuple[float, ...]


@dataclass(frozen=True)
class RankSeries:
    """The checkpoints of one run in the order of their `steps`, with every layer's ranks and norms at each."""

    folder: str
    checkpoints: tuple[str, ...]
    steps: tuple[int, ...]
    layers: tuple[SeriesLayer, ...]

    def to_dict(self) -> dict[str, Any]:
        """The series, in the types of JSON."""
        return {
            "folder": self.folder,
            "checkpoints": list(self.checkpoints),
            "steps": list(self.steps),
            "layers": [
                {"name": each.name, "ranks": [ranks.to_dict() for ranks in each.ranks], "norms": list(each.norms)}
                for each in self.layers
            ],
        }

    def norm_before(self, layer: str, step: int) -> float | None:
        """The norm of a layer at the last checkpoint that is not later than `step`; None if there is none."""
        earlier = [index for index, each in enumerate(self.steps) if each <= step]
        norms = next((each.norms for each in self.layers if each.name == layer), ())
        return norms[earlier[-1]] if earlier and norms else None


def measure_series(
    folder: str | Path, subject: OpenedModel, device: torch.device, progress: Progress | None = None
) -> RankSeries:
    """Measure the eligible layers of a model in every checkpoint of `folder`: its files or folders with a step number.

    Raises `BadInput` for a folder without two checkpoints, two of the same step, and for a checkpoint that lacks a
    layer of the model or has it in another shape.
    """
    found = _checkpoints(Path(folder))
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
            norms[layer.name].append(float((values**2).sum() ** 0.5))
        if progress:
            progress("series", done, len(found))
    measured = tuple(SeriesLayer(layer.name, tuple(ranks[layer.name]), tuple(norms[layer.name])) for layer in layers)
    return RankSeries(str(folder), tuple(path.name for _, path in found), tuple(step for step, _ in found), measured)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        raise BadInput("is no folder", where=folder, remedy="give the folder that holds the checkpoints of one run")
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        name = path.name if path.is_dir() else path.stem
        step = _STEP.search(name)
        if step is None or _SHARD.search(name) or not (path.is_dir() or path.suffix.lower() in _WEIGHT_FILES):
            continue
        if (number := int(step[1])) in found:
            raise BadInput(
                f"{found[number].name} and {path.name} are both of step {number}",
                where=folder,
                remedy="keep one of them",
            )
        found[number] = path
    if len(found) < 2:
        raise BadInput(
            f"holds {len(found)} checkpoints whose names end in a step number",
            where=folder,
            remedy="give two at least, such as checkpoint-500 and checkpoint-1000",
        )
    return sorted(found.items())
