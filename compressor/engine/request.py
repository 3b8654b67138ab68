"""The engine that is asked for by name."""

from __future__ import annotations

import os

import torch

from compressor.engine.engine import Engine, InProcess
from compressor.engine.pool import ProcessPool
from compressor.engine.ray import RayEngine


def opened_engine(name: str | None, device: torch.device, *, memory: int | None = None) -> Engine:
    """The engine of a name as the option takes it: `processes`, `processes:4`, `ray`, or `ray:ADDRESS`.

    None is this process, in which a CPU decomposes as many layers at a time as PyTorch has threads: LAPACK shares the
    work on one poorly among them, and would give other digits for each number of threads. Of accelerators every worker
    has one. Jobs in this process take at most `memory` bytes together.

    Raises:
        BadInput: Ray is not installed, or there is no cluster.
    """
    kind, _, detail = (name or "").partition(":")
    accelerated = device.type != "cpu"
    if kind == "processes":
        count = torch.accelerator.device_count() if accelerated else 0
        return ProcessPool(int(detail) if detail else count or processors(), accelerators=count)
    if kind == "ray":
        return RayEngine(detail or None, accelerators=int(accelerated))
    return InProcess(1 if accelerated else torch.get_num_threads(), memory)


def processors() -> int:
    """The processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
