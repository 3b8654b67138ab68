"""Tensors kept on disk while a model is calibrated: what enters each segment, and the moments of each layer."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import gettempdir

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.factorize import Metric, TiedMetric
from compressor.io import temporary_workspace
from compressor.system_errors import temporary_space


class ActivationCache:
    """Tensors by key in a temporary folder that goes with the object."""

    def __init__(self) -> None:
        self._temporary = Path(gettempdir())
        with temporary_space(self._temporary):
            workspace = temporary_workspace(self._temporary)
            self._folder = workspace.new("tensors")
            self._folder.mkdir()
        weakref.finalize(self, workspace.remove)
        self._files: dict[Hashable, Path] = {}

    def put(self, key: Hashable, **tensors: Tensor) -> None:
        """Keep named tensors under a key, in place of what it held."""
        path = self._files.setdefault(key, self._folder / f"{len(self._files)}.safetensors")
        with temporary_space(self._temporary):
            path.unlink(missing_ok=True)  # a file that is still mapped must not change under its readers
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)

    def put_row(self, key: Hashable, row: Sequence[Tensor]) -> None:
        """Keep tensors in order under a key, in place of what it held."""
        self.put(key, **{str(number): tensor for number, tensor in enumerate(row)})

    def row(self, key: Hashable, device: torch.device) -> tuple[Tensor, ...]:
        """The tensors in order under a key, on a device. KeyError for one that was never kept."""
        tensors = self.get(key, device)
        return tuple(tensors[str(number)] for number in range(len(tensors)))

    def __contains__(self, key: Hashable) -> bool:
        return key in self._files

    def get(self, key: Hashable, device: torch.device) -> dict[str, Tensor]:
        """The tensors under a key, on a device. KeyError for one that was never kept."""
        path = self._files[key]
        with temporary_space(self._temporary):
            tensors: dict[str, Tensor] = load_file(path, device=str(device))
        return tensors


class CachedMetrics(Mapping[str, Metric | TiedMetric]):
    """The metrics of layers by name, each read when it is asked for."""

    def __init__(self, cache: ActivationCache, device: torch.device) -> None:
        self._cache, self._device = cache, device
        self._names: dict[str, Hashable] = {}

    def put(self, name: str, metric: Metric | TiedMetric) -> None:
        key = ("metric", name)
        parts = {"": metric} if isinstance(metric, Metric) else {"lookup.": metric.lookup, "head.": metric.head}
        self._cache.put(key, **{prefix + what: t for prefix, part in parts.items() for what, t in _tensors(part)})
        self._names[name] = key

    def __getitem__(self, name: str) -> Metric | TiedMetric:
        tensors = self._cache.get(self._names[name], self._device)
        if "lookup.inputs" in tensors:
            return TiedMetric(_metric(tensors, "lookup."), _metric(tensors, "head."))
        return _metric(tensors, "")

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _tensors(metric: Metric) -> list[tuple[str, Tensor]]:
    found = [("inputs", metric.inputs), ("gradients", metric.gradients)]
    return found if metric.mean is None else [*found, ("mean", metric.mean)]


def _metric(tensors: Mapping[str, Tensor], prefix: str) -> Metric:
    return Metric(tensors[prefix + "inputs"], tensors[prefix + "gradients"], tensors.get(prefix + "mean"))
