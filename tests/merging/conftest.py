from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

torch.set_num_threads(1)

Saved = Callable[..., list[Path]]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """Writes networks to weight files, named A, B, C."""

    def save(networks: Sequence[nn.Module]) -> list[Path]:
        paths = [tmp_path / f"{name}.safetensors" for name, _ in zip("ABC", networks, strict=False)]
        for path, network in zip(paths, networks, strict=True):
            save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path)
        return paths

    return save


@pytest.fixture
def task_files(tmp_path: Path) -> Callable[[Sequence[tuple[Tensor, Tensor]]], list[Path]]:
    """Writes each task's inputs and labels to a file of arrays."""

    def save(tasks: Sequence[tuple[Tensor, Tensor]]) -> list[Path]:
        paths = [tmp_path / f"data-{number}.safetensors" for number, _ in enumerate(tasks)]
        for path, (inputs, labels) in zip(paths, tasks, strict=True):
            save_file({"inputs": inputs.contiguous(), "labels": labels.contiguous()}, path)
        return paths

    return save
