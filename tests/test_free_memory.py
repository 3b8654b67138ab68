"""Memory that is free: what the machine has, and what its control groups leave to the process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from compressor.free_memory import free_memory


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="only Linux says how much memory is free")
def test_free_memory_is_some_and_no_more_than_there_is() -> None:
    found = free_memory(torch.device("cpu"))
    assert found is not None
    assert 0 < found <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


CPU = torch.device("cpu")
GROUPS = {
    "version 2": ("0::/user/shell", "user/shell/memory.max", "user/shell/memory.current", "inactive_file"),
    "version 2, of a group around it": ("0::/user/shell", "user/memory.max", "user/memory.current", "active_file"),
    "version 2, of a container": ("0::/", "memory.max", "memory.current", "inactive_file"),
    "version 1": (
        "5:memory:/job",
        "memory/job/memory.limit_in_bytes",
        "memory/job/memory.usage_in_bytes",
        "total_inactive_file",
    ),
    "version 1, under another name outside": (
        "5:cpu,memory:/docker/1",
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "total_active_file",
    ),
}


def _system(folder: Path, cgroup: str) -> Path:
    (folder / "proc" / "self").mkdir(parents=True)
    (folder / "proc" / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 5000 kB\n")
    (folder / "proc" / "self" / "cgroup").write_text(f"{cgroup}\n")
    return folder / "proc"


@pytest.mark.parametrize("kind", GROUPS)
def test_free_memory_is_what_a_control_group_leaves(kind: str, tmp_path: Path) -> None:
    cgroup, limit, taken, cached = GROUPS[kind]
    system, groups = _system(tmp_path, cgroup), tmp_path / "cgroup"
    (groups / limit).parent.mkdir(parents=True)
    (groups / limit).write_text("3000000\n")
    (groups / taken).write_text("1000000\n")
    assert free_memory(CPU, system=system, groups=groups) == 2_000_000
    (groups / limit).with_name("memory.stat").write_text(f"anon 5\n{cached} 400000\n")
    assert free_memory(CPU, system=system, groups=groups) == 2_400_000
    (groups / limit).write_text("max\n")
    assert free_memory(CPU, system=system, groups=groups) == 5_120_000


def test_a_group_that_leaves_more_than_the_machine_has_is_no_limit(tmp_path: Path) -> None:
    system, groups = _system(tmp_path, "0::/"), tmp_path / "cgroup"
    groups.mkdir()
    (groups / "memory.max").write_text("9000000000\n")
    (groups / "memory.current").write_text("1\n")
    assert free_memory(CPU, system=system, groups=groups) == 5_120_000
    assert free_memory(CPU, system=tmp_path / "none", groups=groups) is None
