"""How a command runs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from compressor.engine.journal import Journal
from compressor.progress import Progress


@dataclass(frozen=True)
class Run:
    """How a command runs: its device, its random seed, its progress callback, and the journal of what it has done."""

    device: torch.device
    seed: int = 0
    progress: Progress | None = None
    journal: Journal = field(default_factory=Journal, compare=False, repr=False)

    def report(self, step: str, done: int, total: int) -> None:
        """Report how many parts of a step are done."""
        if self.progress is not None:
            self.progress(step, done, total)
