"""Tensors kept on disk while a model is calibrated: what enters each segment, and the moments of each layer."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.factorize import Metric


class Spool:
    """Tensors by key in a temporary folder that goes with the object."""

    def __init__(self) -> None:
        self._folder = TemporaryDirectory(prefix="compressor-calibration-")
        self._files: dict[Hashable, Path] = {}

    def put(self, key: Hashable, **tensors: Tensor) -> None:
        """Keep named tensors under a key, in place of what it held."""
        path = self._files.setdefault(key, Path(self._folder.name) / f"{len(self._files)}.safetensors")
        path.unlink(missing_ok=True)  # a file that is still mapped must not change under its readers
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._files

    def get(self, key: Hashable, device: torch.device) -> dict[str, Tensor]:
        """The tensors under a key, on a device. KeyError for one that was never kept."""
        tensors: dict[str, Tensor] = load_file(self._files[key], device=str(device))
        return tensors


class SpooledMetrics(Mapping[str, Metric]):
    """The metrics of layers by name, each read when it is asked for."""

    def __init__(self, spool: Spool, device: torch.device) -> None:
        self._spool, self._device = spool, device
        self._names: dict[str, Hashable] = {}

    def put(self, name: str, metric: Metric) -> None:
        key = ("metric", name)
        mean = {} if metric.mean is None else {"mean": metric.mean}
        self._spool.put(key, inputs=metric.inputs, gradients=metric.gradients, **mean)
        self._names[name] = key

    def __getitem__(self, name: str) -> Metric:
        tensors = self._spool.get(self._names[name], self._device)
        return Metric(tensors["inputs"], tensors["gradients"], tensors.get("mean"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
