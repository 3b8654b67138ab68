"""The error of a layer: one number, one name, and that of the file that was written."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from compressor import compress, restore
from compressor.calibration import calibrate, split_examples
from compressor.data import Sample, open_data
from compressor.engine import Run
from compressor.io import open_checkpoint
from compressor.model import load_model
from compressor.network import find_layers, module_architecture
from compressor.report import compression_page
from compressor.report.html import report_page
from compressor.report.wording import above_one_words, error_words
from compressor.results import Compression
from tests.calibration.tiny_models import CPU, TOKENS, TWO_PASSES, transformer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer, and texts for it in `texts.npz` beside it."""
    place = tmp_path_factory.mktemp("model")
    transformer("llama").save_pretrained(place / "llama")
    torch.manual_seed(0)
    np.savez(place / "texts.npz", input_ids=torch.randint(3, TOKENS, (16, 8)).numpy())
    return place / "llama"


def surfaces(result: Compression) -> dict[str, dict[str, str]]:
    """The error of every layer as each surface words it, with four decimals where it can."""
    assert result.output is not None
    shown = {}
    for name, layers in (
        ("to_dict", result.to_dict()["layers"]),
        ("compression.json", json.loads((Path(result.output) / "compression.json").read_text())["layers"]),
    ):
        shown[name] = {layer["name"]: error_words(layer["error"], 4) for layer in layers}
    card = (Path(result.output) / "README.md").read_text()
    shown["card"] = dict(re.findall(r"^\| `([^`]+)` \|(?: [^|]+ \|){4} ([^ |]+) \|", card, re.MULTILINE))
    rows = re.findall(r'<tr class="layer".*?<th[^>]*>(.*?)</th>(.*?)</tr>', report_page(result))
    cells = {name.replace("<wbr>", ""): re.findall(r">([^<>]*)</td>", row) for name, row in rows}
    shown["report"] = {name: row[-3] for name, row in cells.items()}
    return shown


def terminal(result: Compression) -> str:
    console = Console(width=200, file=None)
    with console.capture() as capture:
        console.print(compression_page(result))
    return capture.get()


def written_matrices(result: Compression, tmp_path: Path) -> dict[str, Tensor]:
    """What the stored factors give, multiplied out by `restore`."""
    assert result.output is not None
    dense = restore(result.output, output=tmp_path / "dense").output
    return {name: each.double() for name, each in load_file(Path(dense) / "model.safetensors").items()}


@pytest.mark.parametrize(
    "options",
    [{"effort": "balanced"}, {"calibration_settings": TWO_PASSES}, None],
    ids=["compensated", "refined", "weights alone"],
)
def test_every_surface_shows_the_error_of_the_file_under_its_name(
    folder: Path, tmp_path: Path, options: dict[str, Any] | None
) -> None:
    texts = folder.parent / "texts.npz"
    data = {"calibration": "none"} if options is None else {"calibration": texts, "calibration_samples": 16, **options}
    result = compress(folder, output=tmp_path / "small", keep=0.3, prefer="size", bits=16, **data)
    name = "relative Frobenius error" if options is None else "relative loss error"
    metrics: Any = {}
    if options is not None:
        assert result.plan.calibration is not None
        model = load_model(folder)
        layers = [each for each in find_layers(open_checkpoint(folder), module_architecture(model)) if each.eligible]
        examples = split_examples(open_data(texts, sample=Sample(limit=16)))
        metrics = calibrate(model, layers, examples, run=Run(CPU)).metrics
    before = load_file(folder / "model.safetensors")
    after = written_matrices(result, tmp_path)
    for layer in result.plan.layers:
        if layer.rank is None:
            assert layer.error == 0
            continue
        weight = before[f"{layer.name}.weight"].double()
        change, expected = weight - after[f"{layer.name}.weight"], 1.0
        if options is None:
            expected = float(change.norm() / weight.norm())
        else:
            metric = metrics[layer.name]
            sizes = [
                float(torch.trace(metric.gradients.double() @ each @ metric.inputs.double() @ each.T))
                for each in (change, weight)
            ]
            expected = math.sqrt(sizes[0] / sizes[1])
        assert layer.error == pytest.approx(expected, rel=1e-4)
    expected_words = {layer.name: error_words(layer.error, 4) for layer in result.plan.layers}
    assert {surface: shown for surface, shown in surfaces(result).items() if shown != expected_words} == {}
    said = terminal(result)
    for layer in result.plan.layers:
        assert re.search(rf"{re.escape(layer.name)} .* {re.escape(error_words(layer.error, 3))}", said)
    assert result.to_dict()["error_name"] == name
    assert result.output is not None
    assert json.loads((Path(result.output) / "compression.json").read_text())["error_name"] == name
    assert f" {name} |" in (Path(result.output) / "README.md").read_text()
    assert f">{name}</th>" in report_page(result)
    lines = said.splitlines()
    header = next(number for number, line in enumerate(lines) if line.startswith("layer "))
    assert all(word in " ".join(lines[header - 2 : header + 1]) for word in name.split())


def test_an_error_above_one_is_explained() -> None:
    torch.manual_seed(0)
    result = compress(nn.Linear(24, 16), keep=0.5, prefer="size")
    [layer] = result.plan.layers
    assert above_one_words(result.plan.layers) is None
    result = replace(result, plan=replace(result.plan, layers=(replace(layer, name="head", error=1.02),)))
    words = above_one_words(result.plan.layers)
    assert words is not None
    assert words.startswith("the error of head is above 1")
    assert words in " ".join(terminal(result).split())
    assert words in report_page(result)
