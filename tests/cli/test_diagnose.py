"""`compress diagnose` as a shell sees it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from compressor.cli.run import run
from compressor.measure import EPSILON

pytestmark = pytest.mark.slow

CARDS = Path(__file__).parents[2] / "model_cards"
DIGITS = [
    str(CARDS / "digits-mlp" / "model.safetensors"),
    "--model",
    f"{CARDS / 'digits-mlp' / 'train.py'}:build_model",
    "--device",
    "cpu",
]

Captured = pytest.CaptureFixture[str]


def test_inspect_tells_the_epsilon_of_its_windows(capsys: Captured) -> None:
    for asked, epsilon in (([], EPSILON), (["--epsilon", "0.02"], 0.02)):
        assert run(["inspect", DIGITS[0], "-q", *asked]) == 0
        words = " ".join(capsys.readouterr().out.split())
        assert f"eps {epsilon:g}" in words
        assert f"at epsilon {epsilon:g}: the steps in which all but {epsilon:g} of the matrix" in words


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Checkpoints of a run, here the model mixed with noise less and less."""
    weights = load_file(DIGITS[0])
    folder = tmp_path / "run"
    generator = torch.Generator().manual_seed(0)
    for step in range(0, 1000, 100):
        noise = 1 - step / 900
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        mixed = {
            name: tensor + noise * tensor.std() * torch.randn(tensor.shape, generator=generator)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in weights.items()
        }
        save_file(mixed, checkpoint / "model.safetensors")
    return folder


def test_reference_model_as_text(capsys: Captured) -> None:
    assert run(["diagnose", *DIGITS, "--data", "builtin:digits", "-q"]) == 0
    text = capsys.readouterr().out
    assert all(len(line) <= 80 for line in text.splitlines())
    words = " ".join(text.split())
    assert "builtin:digits, train split: 1,078 predictions, accuracy 99.7 %" in words
    assert f"of the memory window at epsilon {EPSILON:g}" in words
    assert f"At epsilon {EPSILON:g} the hyperparameters bound the rank of 2 of 3 layers" in words
    for part in ("Memory and ranks", "Weights beside the gradient", "Findings", "stationary point", "norm balance"):
        assert part in words


def test_reference_model_as_json(capsys: Captured) -> None:
    assert run(["diagnose", *DIGITS, "--data", "builtin:digits", "--data-samples", "200", "--json", "-q"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema_version"] == 1
    assert document["predictions"]["count"] == 200
    assert [layer["scaling_degree"] for layer in document["layers"]] == [1, 1, 1]
    for layer in document["layers"]:
        assert 0 < layer["stationarity"]["cosine"] < 1
    assert {finding["subject"] for finding in document["findings"]} >= {"ranks", "memory window", "initialization"}
    assert all(finding["message"] and finding["advice"] for finding in document["findings"])


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_series_is_drawn_and_its_table_fits(suffix: str, run_folder: Path, tmp_path: Path, *, capsys: Captured) -> None:
    drawn = [tmp_path / f"{name}{suffix}" for name in ("first", "second")][: 2 if suffix == ".svg" else 1]
    for figure in drawn:
        assert run(["diagnose", *DIGITS, "--series", str(run_folder), "-o", str(figure), "-q"]) == 0
    text = capsys.readouterr().out
    table = text[text.index("Entropy rank over") : text.index("Findings")]
    assert all(len(line) <= 80 for line in table.splitlines())
    assert "10 checkpoints" in table
    assert str(drawn[0]) in text
    assert drawn[0].read_bytes() == drawn[-1].read_bytes()
    if suffix == ".png":
        with Image.open(drawn[0]) as image:
            image.verify()
    else:
        words = " ".join(ElementTree.parse(drawn[0]).getroot().itertext())
        assert all(word in words for word in ("entropy rank", "Frobenius rank", "step"))


def test_bad_requests_end_in_one_line(run_folder: Path, tmp_path: Path, capsys: Captured) -> None:
    bare, figure = DIGITS[0], tmp_path / "ranks.svg"
    figure.touch()
    series = ["--series", str(run_folder)]
    requests = {
        "architecture": [bare, "--data", "builtin:digits"],
        "no built-in data": [*DIGITS, "--data", "builtin:nothing"],
        "no such file": ["missing.safetensors"],
        "is no folder": [bare, "--series", bare],
        "--output is for the figure": [bare, "-o", str(tmp_path / "new.svg")],
        "already exists": [bare, *series, "-o", str(figure)],
        ".svg or .png": [bare, *series, "-o", str(tmp_path / "ranks.pdf")],
        "matches no layer": [bare, "--include", "nothing"],
        "learning_rate": [bare, "--lr", "-1"],
    }
    for message, request in requests.items():
        assert run(["diagnose", *request, "-q"]) == 2, request
        captured = capsys.readouterr()
        assert captured.out == ""
        assert message in captured.err
        assert captured.err.count("\n") == 1
    assert figure.read_bytes() == b""


def test_figure_needs_matplotlib(run_folder: Path, tmp_path: Path, monkeypatch: Any, *, capsys: Captured) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    request = ["diagnose", DIGITS[0], "--series", str(run_folder), "-o", str(tmp_path / "ranks.svg"), "-q"]
    assert run(request) == 2
    assert "compressor[report]" in capsys.readouterr().err
