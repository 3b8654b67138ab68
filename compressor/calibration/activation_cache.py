"""Tensors kept on disk during calibration: activations, gradients, and each layer's metric and decomposition in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.calibration.examples import Part
from compressor.engine import Journal
from compressor.factorize import Decomposition, Metric, TiedMetric


@dataclass(frozen=True)
class _Folder:
    """Named tensors of a journal, read on a device."""

    _journal: Journal
    _device: torch.device

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors, in place of those of that name."""
        self._journal.write(name, tensors)

    def read(self, name: str) -> dict[str, Tensor]:
        """The tensors of a name, on the device. KeyError for one that was never written."""
        # safetensors knows some devices by name, PyTorch all of them
        return {key: tensor.to(self._device) for key, tensor in self._journal.read(name).items()}

    def holds(self, name: str) -> bool:
        """Whether there are tensors of a name."""
        return self._journal.holds(name)


@dataclass(frozen=True)
class CachedBatches:
    """For each batch some tensors in order, of one kind."""

    _folder: _Folder
    _kind: str

    def write(self, batch: int, tensors: Sequence[Tensor]) -> None:
        """Keep the tensors of a batch, in place of those before."""
        self._folder.write(f"{self._kind}-{batch}", {str(place): each for place, each in enumerate(tensors)})

    def holds(self, batch: int) -> bool:
        """Whether there are tensors of a batch."""
        return self._folder.holds(f"{self._kind}-{batch}")

    def read(self, batch: int) -> tuple[Tensor, ...]:
        """The tensors of a batch, on the device. KeyError where there are none."""
        tensors = self._folder.read(f"{self._kind}-{batch}")
        return tuple(tensors[str(place)] for place in range(len(tensors)))


class ActivationCache:
    """What the walks through a model leave for each other, in a journal: by default on disk until the object goes."""

    def __init__(self, device: torch.device, journal: Journal | None = None) -> None:
        self._folder = _Folder(Journal() if journal is None else journal, device)

    def dense(self, part: Part, segment: int) -> CachedBatches:
        """New outputs of a segment of the dense model."""
        return CachedBatches(self._folder, f"dense-{part}-{segment}")

    def compressed(self, part: Part) -> CachedBatches:
        """Inputs of the segment of the compressed model that a walk is at."""
        return CachedBatches(self._folder, f"compressed-{part}")

    def gradients(self) -> CachedBatches:
        """Gradients of the loss at the inputs of the segment that the backward pass is at, of the fit batches."""
        return CachedBatches(self._folder, "gradients")

    def write_boundary(self, segment: int, moments: Sequence[Tensor]) -> None:
        """Keep the second moments of the gradients at the new outputs of a segment."""
        CachedBatches(self._folder, "boundary").write(segment, moments)

    def boundary(self, segment: int) -> tuple[Tensor, ...]:
        """The second moments of the gradients at the new outputs of a segment."""
        return CachedBatches(self._folder, "boundary").read(segment)

    def metrics(self) -> CachedMetrics:
        """Metrics by layer, of which there are none yet."""
        return CachedMetrics(self._folder)

    def decompositions(self) -> CachedDecompositions:
        """Decompositions by layer, of which there are none yet."""
        return CachedDecompositions(self._folder)


class CachedMetrics(Mapping[str, Metric | TiedMetric]):
    """The metrics of layers by name, each read when it is asked for."""

    def __init__(self, folder: _Folder) -> None:
        self._folder = folder
        self._files: dict[str, str] = {}

    def put(self, name: str, metric: Metric | TiedMetric) -> None:
        """Keep the metric of a layer, in place of the one before."""
        parts = {"": metric} if isinstance(metric, Metric) else {"lookup.": metric.lookup, "head.": metric.head}
        file = self._files.setdefault(name, f"metric-{len(self._files)}")
        self._folder.write(file, {prefix + key: each for prefix, part in parts.items() for key, each in _tensors(part)})

    def __getitem__(self, name: str) -> Metric | TiedMetric:
        tensors = self._folder.read(self._files[name])
        if "lookup.inputs" in tensors:
            return TiedMetric(_metric(tensors, "lookup."), _metric(tensors, "head."))
        return _metric(tensors, "")

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class CachedDecompositions(Mapping[str, Decomposition]):
    """The decompositions of layers in their metrics by name, each read when it is asked for."""

    def __init__(self, folder: _Folder) -> None:
        self._folder = folder
        self._files: dict[str, str] = {}

    def put(self, name: str, found: Decomposition) -> None:
        """Keep the decomposition of a layer, in place of the one before."""
        file = self._files.setdefault(name, f"decomposition-{len(self._files)}")
        self._folder.write(file, {"values": torch.from_numpy(found.values.copy()), "basis": found.basis})

    def __getitem__(self, name: str) -> Decomposition:
        tensors = self._folder.read(self._files[name])
        return Decomposition(tensors["values"].cpu().numpy(), tensors["basis"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _tensors(metric: Metric) -> list[tuple[str, Tensor]]:
    tensors = [("inputs", metric.inputs), ("gradients", metric.gradients)]
    return tensors if metric.mean is None else [*tensors, ("mean", metric.mean)]


def _metric(tensors: Mapping[str, Tensor], prefix: str) -> Metric:
    return Metric(tensors[prefix + "inputs"], tensors[prefix + "gradients"], tensors.get(prefix + "mean"))
