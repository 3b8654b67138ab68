"""How a command runs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from compressor.engine.engine import Engine, InProcess
from compressor.engine.journal import Journal
from compressor.progress import Progress


@dataclass(frozen=True)
class Run:
    """How a command runs: its device, random seed, progress callback, journal of what is done, and engine of jobs.

    `calibrated` is a journal of its own for what calibration finds whatever the size; None where it is the other one.
    """

    device: torch.device
    seed: int = 0
    progress: Progress | None = None
    journal: Journal = field(default_factory=Journal, compare=False, repr=False)
    engine: Engine = field(default_factory=InProcess, compare=False, repr=False)
    calibrated: Journal | None = field(default=None, compare=False, repr=False)

    def report(self, step: str, done: int, total: int) -> None:
        """Report how many parts of a step are done."""
        if self.progress is not None:
            self.progress(step, done, total)

    @property
    def job_device(self) -> torch.device:
        """The device of a job: in another process the current one of its kind, of which each worker has its own."""
        return self.device if isinstance(self.engine, InProcess) else torch.device(self.device.type)
