"""PEFT loads what is written: outputs are those of the base and the truncated updates."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compressor
from tests.adapters.adapters_of import truncated

peft = pytest.importorskip("peft")


class Tiny(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.first = nn.Linear(16, 24)
        self.conv = nn.Conv1d(24, 20, 3, padding=1)
        self.head = nn.Linear(20, 10)
        self.config = {"model_type": "tiny"}

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.first(self.embed(tokens)).transpose(1, 2)
        output: Tensor = self.head(self.conv(hidden).transpose(1, 2))
        return output


TOKENS = torch.arange(30).reshape(2, 15)
PATTERNS = {"rank_pattern": {"first": 5, "^conv": 12}, "alpha_pattern": {"fi.st": 7.5, "^conv": 3}}


def trained(folder: Path, **config: Any) -> tuple[nn.Module, nn.Module]:
    """A base, and it with an adapter as if trained, which is saved."""
    torch.manual_seed(0)
    base = Tiny().eval()
    wanted = {"r": 8, "lora_alpha": 6, "target_modules": ["first", "conv", "embed"]} | config
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**wanted))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return base, model.eval()


def merged(base: nn.Module, folder: Path) -> nn.Module:
    """The base with the adapter in a folder added to its weights."""
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
    return model.merge_and_unload().eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        PATTERNS,
        PATTERNS | {"use_rslora": True},
        {"modules_to_save": ["head"]},
        {"lora_alpha": 7, "r": 9},
        {"target_modules": "first|conv"},
    ],
    ids=str,
)
def test_peft_adds_the_truncated_updates(tmp_path: Path, config: dict[str, Any]) -> None:
    base, model = trained(tmp_path / "lora", **config)
    compressor.compress(tmp_path / "lora", output=tmp_path / "small", rank=3)
    full, small = merged(base, tmp_path / "lora"), merged(base, tmp_path / "small")
    torch.testing.assert_close(full(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)
    ranks = {name: module for name, module in base.named_modules() if hasattr(module, "weight")}
    for name, module in ranks.items():
        update = full.get_submodule(name).weight - module.weight
        ours = small.get_submodule(name).weight - module.weight
        if name == "head":
            assert torch.equal(ours, update)
            continue
        expected = truncated(update.detach().flatten(1), 3).reshape(update.shape).float()
        torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6 * (1 + float(update.detach().norm())))


@pytest.mark.parametrize(
    "config", [{}, PATTERNS, {"use_rslora": True}, {"use_dora": True, "target_modules": ["first"]}]
)
def test_at_full_rank_the_outputs_are_equal(tmp_path: Path, config: dict[str, Any]) -> None:
    base, _ = trained(tmp_path / "lora", **config)
    compressor.compress(tmp_path / "lora", output=tmp_path / "same", rank=16)
    full, same = (peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name) for name in ("lora", "same"))
    torch.testing.assert_close(same(TOKENS), full(TOKENS), rtol=1e-6, atol=1e-6)


def test_biases_beside_the_pairs_and_magnitudes_go_along(tmp_path: Path) -> None:
    base, _ = trained(tmp_path / "lora", lora_bias=True, target_modules=["first", "conv"])
    compressor.compress(tmp_path / "lora", output=tmp_path / "small", rank=3)
    full, small = (
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name).base_model.model
        for name in ("lora", "small")
    )
    biases = [model.first.lora_B["default"].bias * model.first.scaling["default"] for model in (full, small)]
    torch.testing.assert_close(biases[0], biases[1], rtol=1e-6, atol=0)


def test_dora_is_said(tmp_path: Path) -> None:
    trained(tmp_path / "lora", use_dora=True, target_modules=["first"])
    small = compressor.compress(tmp_path / "lora", output=tmp_path / "small", rank=3)
    assert any("DoRA" in words for words in small.warnings)
