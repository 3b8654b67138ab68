"""`compress merge` as a shell sees it: what is printed, what is written, and the exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
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


def test_networks_with_factored_parameters_keep_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for name in ("a", "b"):
        state = {key: tensor.clone() for key, tensor in nn.GRU(16, 16).state_dict().items()}
        for key in ("weight_ih_l0", "weight_hh_l0"):
            state[key] = torch.rand(48, 2) @ torch.rand(2, 16)
        save_file(state, tmp_path / f"{name}.safetensors")
        assert run([str(tmp_path / f"{name}.safetensors"), "--tolerance", "1e-4"]) == 0
    parts = [str(tmp_path / f"{name}-compressed.safetensors") for name in ("a", "b")]
    both, again = tmp_path / "both.safetensors", tmp_path / "again.safetensors"
    assert run(["merge", *parts, "-o", str(both), "--mode", "sum"]) == 0
    assert load_file(both)["weight_hh_l0.down.weight"].shape == (4, 16)
    assert run(["restore", str(both), "-o", str(again)]) == 0
    dense = [load_file(tmp_path / f"{name}.safetensors") for name in ("a", "b")]
    for key, tensor in load_file(again).items():
        torch.testing.assert_close(tensor, dense[0][key] + dense[1][key], rtol=1e-4, atol=1e-4)


def test_a_network_that_was_compressed_without_its_code_is_added_the_right_way_round(tmp_path: Path) -> None:
    code = tmp_path / "net.py"
    code.write_text(
        "import torch\nfrom torch import nn\n\n"
        "class Conv1D(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.nf, self.weight = 16, nn.Parameter(torch.zeros(16, 16))\n\n"
        "def build():\n    return nn.Sequential(Conv1D())\n"
    )
    torch.manual_seed(0)
    dense = [torch.rand(16, 2) @ torch.rand(2, 16) for _ in range(3)]
    options = [[], ["--model", f"{code}:build"], ["--model", f"{code}:build", "--form", "pivoted"]]
    for index, (weight, option) in enumerate(zip(dense, options, strict=True)):
        save_file({"0.weight": weight}, tmp_path / f"{index}.safetensors")
        small = str(tmp_path / f"small{index}.safetensors")
        assert run([str(tmp_path / f"{index}.safetensors"), "--tolerance", "1e-4", "-o", small, *option]) == 0
    for order in ([0, 1, 2], [2, 1, 0]):
        parts = [str(tmp_path / f"small{index}.safetensors") for index in order]
        both, again = str(tmp_path / "both.safetensors"), str(tmp_path / "again.safetensors")
        assert run(["merge", *parts, "-o", both, "--mode", "sum", "--overwrite"]) == 0
        assert load_file(both)["0.weight"].numel() == 0
        assert run(["restore", both, "-o", again, "--overwrite"]) == 0
        torch.testing.assert_close(load_file(again)["0.weight"], dense[0] + dense[1] + dense[2], rtol=1e-4, atol=1e-4)
