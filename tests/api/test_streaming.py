"""Compression of files, whose blocks are read when they run, gives what compression of the module in memory gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor import CalibrationSettings, Compression, compress
from compressor.calibration import RefinementSettings
from compressor.choices import Effort
from compressor.model import load_transformers
from tests.calibration.tiny_models import CHAINS, Block, inputs_for, odd, transformer
from tests.lowrank.architectures import ARCHITECTURES


def settings(effort: Effort) -> CalibrationSettings:
    """Those of an effort, with fewer candidates of each kind."""
    found = replace(CalibrationSettings.of(effort), kept_weights=0, refinement=RefinementSettings(passes=1, steps=4))
    return replace(found, exponents=found.exponents[::2], ridges=found.ridges[::2], uniform=effort == "fast")


def aligned(model: nn.Module) -> nn.Module:
    """The model with its weights where PyTorch puts them: kernels add up in another order at other addresses."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    assert any(name.endswith("up.weight") for name in ours)
    return ours.keys() == theirs.keys() and all(torch.equal(each, theirs[name]) for name, each in ours.items())


def chosen(made: Compression) -> tuple[float | None, float, bool]:
    found = made.plan.calibration
    assert found is not None
    return found.exponent, found.holdout_loss, found.refined


def built(name: str) -> tuple[Any, Mapping[str, Tensor]]:
    torch.manual_seed(1)
    if name == "mixtral":
        return ARCHITECTURES[name].dense(), {"input_ids": torch.randint(3, 60, (8, 7))}
    return (transformer(name), inputs_for(name, 8)) if name in CHAINS else odd(name)


@pytest.mark.slow
@pytest.mark.parametrize("effort", ["fast", "best"])
@pytest.mark.parametrize("name", ["llama", "bert", "t5", "resnet", "mixtral"])
def test_a_folder_gives_what_the_module_gives(name: str, effort: Effort, tmp_path: Path) -> None:
    model, inputs = built(name)
    model.save_pretrained(tmp_path / "dense")
    asked: Any = {
        "keep": 0.6,
        "prefer": "size",
        "bits": 16,
        "calibration": inputs,
        "calibration_settings": settings(effort),
    }
    streamed = compress(tmp_path / "dense", output=tmp_path / "small", **asked)
    whole = compress(aligned(load_transformers(tmp_path / "dense")), **asked)
    assert chosen(streamed) == chosen(whole)
    saved: Any = whole.model
    saved.save_pretrained(tmp_path / "whole")
    assert same(*(load_file(tmp_path / folder / "model.safetensors") for folder in ("small", "whole")))


def network() -> nn.Module:
    blocks = nn.Sequential(*(Block(8) for _ in range(3)))
    return nn.Sequential(nn.Linear(6, 8), blocks, nn.Linear(8, 4))


class Attention(nn.Module):
    """A block of a layer and of parameters that its own code multiplies with."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.layer = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return x + torch.relu(self.layer(x))


def attention() -> nn.Module:
    return nn.Sequential(nn.Sequential(*(Attention() for _ in range(3))), nn.Linear(8, 3))


@pytest.mark.parametrize(("build", "shape"), [(network, (9, 6)), (attention, (9, 5, 8))])
def test_a_file_gives_what_the_module_gives(
    build: Callable[[], nn.Module], shape: tuple[int, ...], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = build()
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    asked: Any = {"keep": 0.7, "prefer": "size", "bits": 16, "calibration": torch.randn(*shape)}
    asked["calibration_settings"] = settings("best")
    output = tmp_path / "small.safetensors"
    streamed = compress(tmp_path / "dense.safetensors", output=output, factory=build, **asked)
    whole = compress(model, **asked)
    assert chosen(streamed) == chosen(whole)
    assert whole.model is not None
    assert same(load_file(output), whole.model.state_dict())
