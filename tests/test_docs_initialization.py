"""The page on the initialization: its recipe for plain PyTorch gives what it says, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import compressor

PAGE = (Path(__file__).parents[1] / "docs" / "initialization.md").read_text(encoding="utf-8")


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 48))


def lines(*beginnings: str) -> list[str]:
    """The lines of the page's Python that begin so."""
    return [line for line in PAGE.splitlines() if line.startswith(beginnings)]


def trained(model: nn.Module) -> None:
    """A few steps of SGD towards a map of rank one."""
    inputs = torch.randn(64, 48)
    targets = inputs[:, :1] @ torch.ones(1, 48)
    for _ in range(5):
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight.sub_(weight.grad, alpha=0.05)
                weight.grad = None


@pytest.mark.parametrize("way", ["seed", "state"])
def test_the_lines_for_plain_pytorch_store_what_training_wrote(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    known: dict[str, Any] = {"torch": torch, "Net": Net}
    with torch.random.fork_rng(devices=()):
        exec("\n".join(lines("torch.manual_seed(", "model = Net()")), known)
        exec(re.findall(r"`(torch\.save\(model.*?\))`", PAGE)[0], known)
        trained(known["model"])
    torch.save(known["model"].state_dict(), "run/model.pt")
    initial = 0 if way == "seed" else "run/initial.pt"
    asked = {"keep": 0.1, "factory": Net, "output": "small.safetensors"}
    result = compressor.compress("run/model.pt", initial=initial, **asked)
    assert result.initial is not None
    assert len(result.initial.layers) == 2
    given = {} if way == "seed" else {"initial": initial}
    small = compressor.load_model("small.safetensors", Net, **given)
    compressor.compress("run/model.pt", **asked, overwrite=True)
    plain = compressor.load_model("small.safetensors", Net)
    inputs = torch.randn(32, 48, generator=torch.Generator().manual_seed(2))
    expected = known["model"](inputs)
    # Of the numbers that are kept, none is spent on the random start.
    assert (small(inputs) - expected).norm() < 0.1 * (plain(inputs) - expected).norm()
