"""Jobs for workers, which import nothing beside them: a worker that imports a module of tests imports transformers."""

from __future__ import annotations

import math
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from compressor.errors import BadInput


@dataclass(frozen=True)
class Gram:
    """A seeded matrix of which the eigenvalues of the Gram matrix are asked for."""

    seed: int
    size: int = 40


def eigenvalues(asked: Gram) -> torch.Tensor:
    matrix = torch.randn(asked.size, asked.size, generator=torch.Generator().manual_seed(asked.seed))
    values: torch.Tensor = torch.linalg.eigvalsh(matrix @ matrix.T)
    return values


def root(number: float) -> float:
    if number < 0:
        raise BadInput(f"{number} has no root", option="number", remedy="give a positive one")
    return math.sqrt(number)


def own_number(_: int) -> int:
    return os.getpid()


def die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(mark: Path) -> str:
    """Kill the worker the first time."""
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return mark.name


def name_after(mark: Path) -> str:
    """The name of a mark, half a second after there is another beside it."""
    while not (mark.parent / "inside").exists():
        time.sleep(0.01)
    time.sleep(0.5)
    return mark.name


@dataclass(frozen=True)
class Lost:
    """A number, and a node on which its job never ends once it has made a mark."""

    number: int
    node: str
    mark: Path


def number_elsewhere(asked: Lost) -> int:
    import ray

    if ray.get_runtime_context().get_node_id() == asked.node:
        asked.mark.touch()
        time.sleep(600)
    return asked.number
