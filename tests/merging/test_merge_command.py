"""`compress merge` as a shell sees it: what is printed, what is written, and the exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from compressor.cli.run import run

ARCHITECTURE = """
from torch import nn
def build():
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
"""


@pytest.fixture
def request_of_two(saved: Any, task_files: Any, tmp_path: Path) -> list[str]:
    """Two random networks, and for each the data on which it alone is always right."""
    parts = []
    for seed in range(2):
        torch.manual_seed(seed)
        parts.append(nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)))
    inputs = torch.randn(50, 6)
    with torch.no_grad():
        data = task_files([(inputs, part(inputs).argmax(1)) for part in parts])
    (tmp_path / "architecture.py").write_text(ARCHITECTURE)
    return [
        "merge",
        *map(str, saved(parts)),
        *(word for path in data for word in ("--data", str(path))),
        *("--model", f"{tmp_path / 'architecture.py'}:build", "-o", str(tmp_path / "out.safetensors"), "-q"),
    ]


def test_what_was_measured_before_and_after_is_printed(
    request_of_two: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run([*request_of_two, "--mode", "sum"]) == 0
    printed = capsys.readouterr().out
    told = " ".join(printed.split())
    for words in ("between inputs of two tasks", "interference", "smallest", "no guarantee", "alone", "100.0 %"):
        assert words in told
    # Paths are never broken: people copy them.
    assert f"model 1  {tmp_path / 'A.safetensors'}\n" in printed
    assert f"model 2  {tmp_path / 'B.safetensors'}\n" in printed
    assert (tmp_path / "out.safetensors").exists()


def test_what_loses_too_much_is_told_and_not_written(
    request_of_two: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run([*request_of_two, "--mode", "sum", "--max-drop", "0.01", "--json"]) == 3
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["output"] is None
    assert max(task["drop"] for task in document["tasks"]) > 0.01
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out.safetensors").exists()
    assert run([*request_of_two, "--mode", "concat", "--head", "separate", "--max-drop", "0"]) == 0


def test_bad_requests_end_with_one_line(request_of_two: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for extra in ([], ["--mode", "average"], ["--mode", "sum", "--head", "separate"], ["--mode", "sum", "--base", ""]):
        assert run([*request_of_two, *extra]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_networks_with_factored_parameters_are_merged_only_dense(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    for name in ("a", "b"):
        save_file(nn.GRU(16, 16).state_dict(), tmp_path / f"{name}.safetensors")
        assert run([str(tmp_path / f"{name}.safetensors"), "--keep", "0.5"]) == 0
    parts = [str(tmp_path / f"{name}-compressed.safetensors") for name in ("a", "b")]
    capsys.readouterr()
    assert run(["merge", *parts, "-o", str(tmp_path / "both.safetensors"), "--mode", "sum"]) == 2
    said = capsys.readouterr().err
    assert "a parameter, is low-rank" in said
    assert "compress restore" in said
