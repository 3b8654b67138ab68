"""Experts that a file holds in one tensor for all of a block: each matrix a layer, and together again when restored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor import BadInput, compress, evaluate, inspect, restore
from tests.lowrank.architectures import ARCHITECTURES, Fused

TOKENS = torch.randint(3, 60, (4, 9), generator=torch.Generator().manual_seed(0))
FUSED = [name for name, each in ARCHITECTURES.items() if each.fused is not None]
RANKS = [2, 3, 4, 6]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model.eval()(input_ids=TOKENS).logits
    return result


def fused(name: str) -> Fused:
    found = ARCHITECTURES[name].fused
    assert found is not None
    return found


@torch.no_grad()
def dense(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose experts matter; those of each block have the `RANKS`, one after the other, and biases."""
    model = ARCHITECTURES[name].dense()
    for own, parameter in model.named_parameters():
        if "experts." in own and parameter.dim() == 3:
            for part, view in fused(name).parts(_as_in_file(own), parameter).items():
                rank = RANKS[int(part.split("experts.")[1].split(".")[0])]
                view.copy_(torch.randn(len(view), rank) @ torch.randn(rank, view.shape[1]) * 0.1)
        elif "experts." in own and own.endswith("bias"):
            parameter.normal_(0, 0.1)
        elif parameter.dim() > 1:
            parameter.mul_(5)
    return model.to(dtype)


def _as_in_file(name: str) -> str:
    renamed = {"block_sparse_moe.experts.gate_up_proj": "input_linear.weight"}
    renamed |= {"block_sparse_moe.experts.down_proj": "output_linear.weight"}
    for own, stored in renamed.items():
        name = name.replace(own, f"block_sparse_moe.{stored}")
    return name


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUSED)
def test_each_matrix_is_a_layer_of_its_own_rank(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    original = dense(name, dtype)
    original.save_pretrained(tmp_path / "dense")
    close: dict[str, float] = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    tolerance = 1e-3 if dtype == torch.float32 else 0.02
    report = compress(
        tmp_path / "dense", output=tmp_path / "small", tolerance=tolerance, include=["*.experts.*"], prefer="size"
    )
    plans = {plan.name: plan for plan in report.plan.layers}
    assert len(plans) == 2 * 4 * 3
    for layer, plan in plans.items():
        assert plan.rank == RANKS[int(layer.split(".experts.")[1].split(".")[0])], layer
    small, loading = ARCHITECTURES[name].load(tmp_path / "small", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(small), logits(original), **close)
    assert small.generate(TOKENS, max_new_tokens=3, do_sample=False).shape == (4, 12)

    restore(tmp_path / "small", output=tmp_path / "restored")
    before, after = stored(tmp_path / "dense"), stored(tmp_path / "restored")
    assert {key: (each.shape, each.dtype) for key, each in before.items()} == {
        key: (each.shape, each.dtype) for key, each in after.items()
    }
    torch.testing.assert_close(logits(ARCHITECTURES[name].load(tmp_path / "restored")), logits(original), **close)


@pytest.mark.parametrize("name", FUSED)
def test_experts_that_stay_dense_are_stored_as_they_were(name: str, tmp_path: Path) -> None:
    dense(name).save_pretrained(tmp_path / "dense")
    asked: dict[str, Any] = {"keep": 0.6, "calibration": "none", "exclude": ["*.experts.*"], "prefer": "size"}
    compress(tmp_path / "dense", output=tmp_path / "small", **asked)
    before, after = stored(tmp_path / "dense"), stored(tmp_path / "small")
    experts = {key: tensor for key, tensor in before.items() if fused(name).parts(key, tensor)}
    assert len(experts) >= 4
    assert all(torch.equal(after[key], tensor) for key, tensor in experts.items())
    with safe_open(tmp_path / "small" / "model.safetensors", "pt") as file:
        assert "stacks" not in json.loads(file.metadata()["compressor"])


@pytest.mark.parametrize("name", FUSED)
def test_one_low_rank_expert_among_dense_ones(name: str, tmp_path: Path) -> None:
    """Nothing of the others is lost, in a folder or in memory, and all of it comes back."""
    original = dense(name)
    original.save_pretrained(tmp_path / "dense")
    layer = ARCHITECTURES[name].a_layer
    asked: dict[str, Any] = {"tolerance": 1e-3, "include": [layer], "prefer": "size"}
    compress(tmp_path / "dense", output=tmp_path / "small", **asked)
    in_memory: Any = compress(original, **asked).model
    in_memory.save_pretrained(tmp_path / "from-memory")
    apart = ARCHITECTURES[name].apart(stored(tmp_path / "dense"))
    for folder in ("small", "from-memory"):
        after = stored(tmp_path / folder)
        moved = {f"{layer}.weight"}
        if f"{layer}.bias" in apart:
            moved |= {f"{layer}.bias"}
        assert apart.keys() - moved <= after.keys()
        assert all(torch.equal(after[key], tensor) for key, tensor in apart.items() if key not in moved)
        model = ARCHITECTURES[name].load(tmp_path / folder)
        torch.testing.assert_close(logits(model), logits(original), rtol=1e-4, atol=1e-4)
        restore(tmp_path / folder, output=tmp_path / f"{folder}-restored")
        back, before = stored(tmp_path / f"{folder}-restored"), stored(tmp_path / "dense")
        restored = ARCHITECTURES[name].apart(back) if folder == "small" else None
        if restored is not None:
            assert back.keys() == before.keys()
            for key, tensor in apart.items():
                torch.testing.assert_close(restored[key], tensor, rtol=0, atol=1e-5 if key in moved else 0)
        torch.testing.assert_close(
            logits(ARCHITECTURES[name].load(tmp_path / f"{folder}-restored")), logits(original), rtol=1e-4, atol=1e-4
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FUSED, "deepseek-v3"])
def test_with_calibration_experts_lose_less(name: str) -> None:
    original = ARCHITECTURES[name].dense()
    with torch.no_grad():
        for own, parameter in original.named_parameters():
            if parameter.dim() > 1 and "embed" not in own:
                parameter.mul_(8)
    *examples, held_out = torch.randint(3, 20, (7, 6, 9))
    only: dict[str, Any] = {"keep": 0.5, "include": ["*.experts.*"], "prefer": "size", "bits": 16}
    data = [{"input_ids": part} for part in examples]
    calibrated = compress(original, **only, calibration=data, effort="balanced").model
    truncated = compress(original, **only, calibration="none").model

    @torch.no_grad()
    def divergence(model: Any) -> float:
        p, q = (each.eval()(input_ids=held_out).logits.log_softmax(-1) for each in (original, model))
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert divergence(calibrated) < 0.7 * divergence(truncated)


def test_a_folder_calibrates_a_block_at_a_time(tmp_path: Path) -> None:
    dense("gpt-oss").save_pretrained(tmp_path / "dense")
    data = [{"input_ids": TOKENS[i % 4 : i % 4 + 1]} for i in range(8)]
    report = compress(
        tmp_path / "dense", output=tmp_path / "small", keep=0.4, include=["*.experts.*"], calibration=data, bits=16,
        prefer="size",
    )  # fmt: skip
    assert report.plan.calibration is not None
    found = evaluate(tmp_path / "small", data=data, baseline=tmp_path / "dense")
    assert found.quality


@pytest.mark.parametrize("name", FUSED)
def test_inspect_names_gate_up_and_down(name: str, tmp_path: Path) -> None:
    ARCHITECTURES[name].dense().save_pretrained(tmp_path)
    found = {each.layer.name: each.layer for each in inspect(tmp_path).layers if ".experts." in each.layer.name}
    assert {layer.rpartition(".")[2] for layer in found} == {"gate_proj", "up_proj", "down_proj"}
    assert len(found) == 2 * 4 * 3
    for layer in found.values():
        assert layer.eligible
        assert layer.shape == ((32, 48) if layer.name.endswith("down_proj") else (48, 32))


def test_a_configuration_of_other_experts_is_refused(tmp_path: Path) -> None:
    ARCHITECTURES["gpt-oss"].dense().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change in ({"num_local_experts": 3}, {"num_local_experts": 5}, {"intermediate_size": 40}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(BadInput, match=r"config.json does not belong to these weights"):
            inspect(tmp_path)


def test_missing_experts_are_not_restored_as_others(tmp_path: Path) -> None:
    dense("gpt-oss").save_pretrained(tmp_path / "dense")
    layer = ARCHITECTURES["gpt-oss"].a_layer
    compress(tmp_path / "dense", output=tmp_path / "small", tolerance=1e-3, include=[layer], prefer="size")
    file = tmp_path / "small" / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.experts.1.down_proj.weight"]
    save_file(tensors, file, metadata)
    with pytest.raises(BadInput, match="do not fit together"):
        restore(tmp_path / "small", output=tmp_path / "restored")
    assert not (tmp_path / "restored").exists()
