"""Runs that are killed at random moments end with the bytes of one that nobody interrupted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "interruptions.py"


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bytes_and_leave_nothing(tmp_path: Path) -> None:
    # A process of its own, because one that has run threads cannot be copied for every start.
    result = tmp_path / "result.json"
    command = [sys.executable, str(SCRIPT), "--kills", "5", "--seed", "3", "--output", str(result)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    cases = json.loads(result.read_text())["cases"]
    assert [each["case"] for each in cases] == ["data-free", "calibrated"]
    for each in cases:
        assert each["kills"] == 5
        assert each["completed"] > 0
        assert each["different"] == 0
        assert each["left_behind"] == []
