"""A step of the walk is timed and has to end as expected; the table has a row for each."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "benchmarks" / "first_steps.py"
SPEC = importlib.util.spec_from_file_location("first_steps", SOURCE)
assert SPEC is not None
assert SPEC.loader is not None
steps = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(steps)


def test_a_step_that_ends_otherwise_than_expected_is_an_error(tmp_path: Path) -> None:
    failing = [sys.executable, "-c", "import sys; sys.exit('error: no')"]
    with pytest.raises(RuntimeError, match="a step ended with 1"):
        steps.step("a step", failing, tmp_path)
    found = steps.step("a step", failing, tmp_path, expected=1)
    assert found["status"] == 1
    assert found["said"] == ["error: no"]
    assert found["cpu_seconds"] <= found["seconds"] + 1


def test_the_table_has_a_row_for_each_step_and_their_sum() -> None:
    rows = [
        {
            "step": f"step {number}",
            "status": 0,
            "cpu_seconds": 10.0 * number,
            "seconds": 20.0,
            "said": ["done", "", "more"],
        }
        for number in (1, 2)
    ]
    lines = steps.table({"rows": rows}).splitlines()
    assert lines[2:] == [
        "| step 1 | 0 | 10 s | 20 s | done |",
        "| step 2 | 0 | 20 s | 20 s | done |",
        "| all | | 30 s | 40 s | |",
        "| without the demo | | 30 s | 40 s | |",
    ]


def test_the_sample_is_the_verdict_and_what_is_compared() -> None:
    compared = [
        "              before  after  compared",
        "parameters         9      4    44.4 %",
        "accuracy           1      1    +0",
    ]
    said = ["75 % smaller", "", "model  one", "", *compared, "", "beside  int8", "", "took  1 s"]
    assert steps.demo({"rows": [{"said": said}]}).splitlines() == [
        "```text", "75 % smaller", "", compared[0], compared[2], "", "beside  int8", "```"
    ]  # fmt: skip
