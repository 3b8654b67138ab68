"""Memory that there is, as the system says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch


def free_memory(
    device: torch.device, *, system: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Bytes of a device's memory that are free, of a CPU's without swapping; None where that is not known.

    Only Linux says what is free of main memory: what the machine has and what the control groups of the process, such
    as those of a container, leave to it, whichever is less.
    """
    if device.type != "cpu":
        try:
            return torch.accelerator.get_memory_info(device)[0]
        except RuntimeError:  # not every accelerator says
            return None
    kilobytes = numbers_in(system / "meminfo").get("MemAvailable:")
    machine = [] if kilobytes is None else [1024 * kilobytes]
    return min([*machine, *_left_by_groups(system, groups)], default=None)


def _left_by_groups(system: Path, groups: Path) -> Iterator[int]:
    """What each control group around the process leaves to it, of version 2 or 1; files in its caches may go."""
    try:
        lines = (system / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names, prefix = groups, ("memory.max", "memory.current"), ""
        elif "memory" in controllers.split(","):
            root, names, prefix = groups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"
        else:
            continue
        inside = root / path.lstrip("/")
        for group in (inside, *(each for each in inside.parents if each.is_relative_to(root))):
            limit, taken = (_number(group / name) for name in names)
            if limit is not None and taken is not None:
                said = numbers_in(group / "memory.stat")
                yield max(
                    0, limit - taken + sum(said.get(f"{prefix}{kind}_file", 0) for kind in ("inactive", "active"))
                )


def _number(path: Path) -> int | None:
    """The number that a file holds; None of one that cannot be read, or says that there is no limit."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def numbers_in(path: Path) -> dict[str, int]:
    """The numbers of a file of names and numbers, a line each; none of one that cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    words = (line.split() for line in lines)
    return {each[0]: int(each[1]) for each in words if len(each) > 1 and each[1].isdecimal()}
