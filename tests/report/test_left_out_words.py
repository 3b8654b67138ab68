"""What a checkpoint held beside its weights, said wherever its size is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import compressor
from compressor.cli.run import run
from compressor.report import inspection_page
from compressor.report.html import report_page
from compressor.report.model_card import _summary
from compressor.report.wording import left_out_words


@pytest.fixture
def training_checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.randn(4, 64)).square().sum().backward()
    optimizer.step()
    document = {
        "model": model.state_dict(),
        "model_ema": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
    }
    torch.save(document, tmp_path / "run.pt")
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    return tmp_path / "run.pt"


@pytest.mark.slow
def test_weights_are_compared_with_weights(
    training_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = compressor.compress(tmp_path / "bare.pt", output=tmp_path / "a.safetensors", keep=0.5)
    result = compressor.compress(training_checkpoint, output=tmp_path / "b.safetensors", keep=0.5)
    assert result.parameters == bare.parameters
    assert result.bytes.after == pytest.approx(bare.bytes.after, rel=0.1)  # it records the optimizer
    assert result.bytes.before == pytest.approx(bare.bytes.before, rel=0.25)  # the file's own structure
    kinds = {each.kind: each.bytes for each in result.left_out}
    numbers = 4 * (64 * 48 + 48 + 48 * 10 + 10)
    assert kinds == {"EMA copy of the weights": numbers, "optimizer state": 2 * numbers + 4 * 4}
    assert result.to_dict()["left_out"] == compressor.inspect(training_checkpoint).to_dict()["left_out"] != []
    assert bare.left_out == ()
    request = [str(training_checkpoint), "--keep", "0.5", "-q", "-o", str(tmp_path / "c.safetensors")]
    assert run(request) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "left out EMA copy of the weights ('model_ema', " in words
    assert "optimizer state ('optimizer', " in words
    assert "used are the raw weights ('model'): for the average save torch.load(FILE)['model_ema']" in words
    assert run([*request, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights_at"] == "model"
    assert "Left out of the source: EMA copy of the weights (`model_ema`" in _summary(result, "base")
    assert "Left out of the source: EMA copy of the weights (&#39;model_ema&#39;" in report_page(result)
    assert "Left out" not in report_page(replace(result, left_out=()))
    console = Console(width=100, file=None)
    with console.capture() as captured:
        console.print(inspection_page(compressor.inspect(training_checkpoint)))
    assert "left out" in captured.get()


def test_the_remedy_for_the_average_works(training_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = compressor.open_checkpoint(training_checkpoint)
    words = left_out_words(checkpoint.left_out, checkpoint.weights_at)
    keys = words.partition("torch.load(FILE)")[2].partition(" to a file")[0]
    torch.save(eval(f"document{keys}", {"document": torch.load(training_checkpoint)}), tmp_path / "ema.pt")
    assert compressor.open_checkpoint(tmp_path / "ema.pt").tensors == checkpoint.tensors
