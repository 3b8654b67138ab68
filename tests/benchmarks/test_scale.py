"""What the benchmark of real sizes compares with, and how its cells are kept."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from compressor.model import load_transformers

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import baselines
import scale

TINY = scale.Shape("tiny", 2, 32, 48, 4, 2, 64, windows=4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    scale.make_model(TINY, tmp_path / "model")
    return tmp_path / "model"


def test_the_steps_at_float32_are_those_of_the_paper(folder: Path, tmp_path: Path) -> None:
    scale.svd_llm_steps(folder, tmp_path / "small.safetensors")
    found = load_file(tmp_path / "small.safetensors")
    model = load_transformers(folder).eval()
    layers = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear) and name != "lm_head"}
    windows = torch.from_numpy(np.load(folder / "windows.npz")["input_ids"])
    moments, _ = baselines.input_statistics(model, layers, [{"input_ids": windows}])
    ranks = {name: found[f"{name}.down.weight"].shape[0] for name in layers}
    expected = baselines.svd_llm(baselines.matrices(layers), ranks, moments)
    for name in layers:
        product = found[f"{name}.up.weight"] @ found[f"{name}.down.weight"]
        torch.testing.assert_close(product.double(), expected[name], rtol=0, atol=1e-5)
    kept = sum(each.numel() for each in found.values()) / sum(each.weight.numel() for each in layers.values())
    assert scale.KEEP - 0.05 < kept <= scale.KEEP


def test_cells_are_kept_one_by_one_and_told_apart_by_their_shapes(tmp_path: Path) -> None:
    path = tmp_path / "scale.json"
    row = {"part": "135M", "method": "fast", "shape": asdict(TINY), "cpu_seconds": 1.0}
    scale.put(row, path)
    scale.put({**row, "shape": asdict(replace(TINY, blocks=3))}, path)
    scale.put({**row, "cpu_seconds": 2.0}, path)
    rows = scale.read(path)["rows"]
    assert sorted(each["cpu_seconds"] for each in rows) == [1.0, 2.0]
    assert scale.Cell("135M", TINY, "fast").key in {scale.key_of(each) for each in rows}


def test_every_cell_has_a_key_of_its_own() -> None:
    for quick in (False, True):
        keys = [cell.key for cell in scale.cells(quick=quick)]
        assert len(keys) == len(set(keys))
