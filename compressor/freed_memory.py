"""Memory that was freed, given back to the operating system.

glibc finds no room for an aligned block, such as those of PyTorch, in a hole of just its size. So its heap grows with
each forward of a model whose activations come and go, for hours on end, with nothing alive in it. It gives back the
pages of such holes when it is asked to; the next forward has to ask for them again, so it is asked only where much
was added since.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass
class FreedMemory:
    """Keeps the memory of a process near to what is alive in it.

    Attributes:
        resident: Tells the bytes that the process has.
        give: Gives back what is free of them; None where the C library cannot.
        slack: Bytes that may come to be free before they are given back.
    """

    resident: Callable[[], int]
    give: Callable[[], object] | None
    slack: int = 2**27
    _least: int = 0

    def give_back(self) -> None:
        """Give back what is free, where the process has grown by more than the slack since the last time."""
        if self.give is None:
            return
        now = self.resident()
        self._least = min(self._least, now)
        if now - self._least > self.slack:
            self.give()
            self._least = self.resident()


@cache
def freed_memory() -> FreedMemory:
    """That of this process."""
    return FreedMemory(_resident, _trim())


def _resident(pages: Path = Path("/proc/self/statm")) -> int:
    return int(pages.read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _trim() -> Callable[[], object] | None:
    """What gives back all pages of the heap that are free; None of another system or C library than Linux's glibc."""
    if not Path("/proc/self/statm").is_file():
        return None
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
    return lambda: trim(ctypes.c_size_t(0))
