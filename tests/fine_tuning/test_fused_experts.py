"""A fine-tune of experts that files hold in one tensor: whatever changed is in the difference, and comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compressor import BadInput, compress, restore
from tests.lowrank.architectures import ARCHITECTURES
from tests.lowrank.test_fused_experts import FUSED, logits


@torch.no_grad()
def folders(name: str, root: Path) -> None:
    """A base, and a fine-tune that only changed experts: all of one block but the last, by a change of rank 2."""
    model = ARCHITECTURES[name].dense()
    model.save_pretrained(root / "base")
    for own, parameter in model.named_parameters():
        if "layers.1." in own and ".experts." in own and parameter.dim() == 3:
            for matrix in parameter[:-1]:
                matrix.add_(torch.randn(matrix.shape[0], 2) @ torch.randn(2, matrix.shape[1]) * 0.1)
    model.save_pretrained(root / "tuned")


@pytest.mark.parametrize("name", [*FUSED, "mixtral"])
def test_as_many_experts_change_as_did(name: str, tmp_path: Path) -> None:
    folders(name, tmp_path)
    base, tuned = (
        ARCHITECTURES[name].apart(load_file(tmp_path / each / "model.safetensors")) for each in ("base", "tuned")
    )
    changed = {key for key, tensor in tuned.items() if not torch.equal(tensor, base[key])}
    assert len(changed) >= 9
    asked: dict[str, Any] = {"base": tmp_path / "base", "output": tmp_path / "difference.safetensors"}
    report = compress(tmp_path / "tuned", tolerance=1e-3, **asked)
    assert {f"{plan.name}.weight" for plan in report.plan.layers} == changed
    assert report.fine_tune is not None
    assert report.fine_tune.unchanged == len(tuned) - len(changed)

    restore(tmp_path / "difference.safetensors", base=tmp_path / "base", output=tmp_path / "back")
    files = [load_file(tmp_path / each / "model.safetensors") for each in ("tuned", "back")]
    assert {key: tensor.shape for key, tensor in files[0].items()} == {
        key: tensor.shape for key, tensor in files[1].items()
    }
    back = ARCHITECTURES[name].apart(files[1])
    assert {key for key, tensor in back.items() if not torch.equal(tensor, base[key])} == changed
    for key, tensor in tuned.items():
        torch.testing.assert_close(back[key], tensor, rtol=1e-3, atol=1e-4 if key in changed else 0)
    models = [ARCHITECTURES[name].load(tmp_path / each) for each in ("back", "tuned", "base")]
    torch.testing.assert_close(logits(models[0]), logits(models[1]), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(logits(models[1]), logits(models[2]), atol=1e-3)


@pytest.mark.parametrize("name", FUSED)
def test_an_adapter_of_them_is_refused(name: str, tmp_path: Path) -> None:
    folders(name, tmp_path)
    with pytest.raises(BadInput, match=r"experts in .* have changed.*write factor pairs with -o NAME.safetensors"):
        compress(tmp_path / "tuned", base=tmp_path / "base", output=tmp_path / "adapter", keep=0.5)
    assert not (tmp_path / "adapter").exists()
