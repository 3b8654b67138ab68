"""Experts of one rank run in batched products, and compute what each of them does by itself."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor import BadInput, Compression, compress, evaluate, export, restore
from compressor.lowrank.batched_experts import BatchedExperts, separate_batched
from compressor.network import SeparateExperts
from tests.lowrank.architectures import ARCHITECTURES
from tests.lowrank.test_fused_experts import FUSED, TOKENS, logits


def dense(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose experts matter."""
    model = ARCHITECTURES[name].dense()
    with torch.no_grad():
        for own, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in own:
                parameter.mul_(5)
    return model.to(dtype)


def compressed(name: str, root: Path, dtype: torch.dtype = torch.float32) -> Compression:
    dense(name, dtype).save_pretrained(root / "dense")
    return compress(
        root / "dense",
        output=root / "small",
        keep=0.5,
        prefer="speed",
        bits=16,
        calibration="none",
        include=["*expert*"],
    )


def batched(model: nn.Module) -> dict[str, BatchedExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BatchedExperts)}


@pytest.mark.parametrize("name", FUSED)
def test_for_speed_the_experts_of_a_block_have_one_rank_and_one_tensor(name: str, tmp_path: Path) -> None:
    report = compressed(name, tmp_path)
    plans = [plan for plan in report.plan.layers if ".experts." in plan.name]
    roles: dict[str, set[int | None]] = {}
    for plan in plans:
        block, _, rest = plan.name.partition(".experts.")
        roles.setdefault(f"{block}.experts.batched.{rest.partition('.')[2]}", set()).add(plan.rank)
    assert all(len(ranks) == 1 for ranks in roles.values())
    assert any(rank is not None for ranks in roles.values() for rank in ranks)
    assert report.plan.eligible_after <= 0.5 * sum(math.prod(plan.shape) for plan in report.plan.layers)
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    for role, [rank] in roles.items():
        d_out, d_in = (32, 48) if role.endswith("down_proj") else (48, 32)
        if rank is None:
            assert tensors[f"{role}.weight"].shape == (4, d_out, d_in)
        else:
            assert tensors[f"{role}.down.weight"].shape == (4, rank, d_in)
            assert tensors[f"{role}.up.weight"].shape == (4, d_out, rank)
    assert not any(".experts.0." in key for key in tensors)
    expected = sum(plan.parameters for plan in report.plan.layers)
    assert report.plan.eligible_after == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUSED)
def test_it_computes_what_the_experts_do_by_themselves(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    compressed(name, tmp_path, dtype)
    small, loading = ARCHITECTURES[name].load(tmp_path / "small", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert len(batched(small)) == 2
    found = logits(small)
    assert small.generate(TOKENS, max_new_tokens=3, do_sample=False).shape == (4, 12)
    small.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(ARCHITECTURES[name].load(tmp_path / "again")), found)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    apart = separate_batched(ARCHITECTURES[name].load(tmp_path / "small"))
    assert sum(isinstance(module, SeparateExperts) for module in apart.modules()) == 2
    assert not batched(apart)
    torch.testing.assert_close(logits(apart), found, **close)
    for folder in ("small", "again"):
        restore(tmp_path / folder, output=tmp_path / f"{folder}-restored")
        torch.testing.assert_close(logits(ARCHITECTURES[name].load(tmp_path / f"{folder}-restored")), found, **close)
    before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("dense", "small-restored"))
    assert {key: (each.shape, each.dtype) for key, each in before.items()} == {
        key: (each.shape, each.dtype) for key, each in after.items()
    }
    dequantized = ARCHITECTURES[name].load(tmp_path / "small").dequantize()
    torch.testing.assert_close(logits(dequantized), found, **close)
    assert dequantized.state_dict().keys() == ARCHITECTURES[name].dense().state_dict().keys()


@pytest.mark.parametrize("name", FUSED)
def test_in_memory_it_is_what_the_folder_loads_as(name: str, tmp_path: Path) -> None:
    compressed(name, tmp_path)
    loaded = ARCHITECTURES[name].load(tmp_path / "small")
    asked: dict[str, Any] = {"keep": 0.5, "prefer": "speed", "bits": 16, "calibration": "none", "include": ["*expert*"]}
    in_memory: Any = compress(dense(name), **asked).model
    ours, theirs = loaded.state_dict(), in_memory.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


@pytest.mark.parametrize("name", FUSED)
def test_gradients_are_those_of_the_experts_by_themselves(name: str, tmp_path: Path) -> None:
    compressed(name, tmp_path)
    together, apart = (ARCHITECTURES[name].load(tmp_path / "small") for _ in range(2))
    separate_batched(apart)
    for model in (together, apart):
        model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    compared = 0
    for place, experts in batched(together).items():
        for own, parameter in experts.named_parameters():
            layer, _, of = own.removeprefix("batched.").rpartition(".")
            each = [apart.get_submodule(f"{place}.{number}.{layer}") for number in range(4)]
            gradients: list[Tensor | None] = [getattr(module, of).grad for module in each]
            shape = parameter.shape[1:]
            expected = torch.stack([torch.zeros(shape) if grad is None else grad for grad in gradients])
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-6)
            compared += 1
    assert compared >= 6


def test_its_arithmetic_and_quality_are_measured(tmp_path: Path) -> None:
    compressed("gpt-oss", tmp_path)
    data = [{"input_ids": TOKENS[i : i + 1]} for i in range(4)]
    found = evaluate(tmp_path / "small", data=data, baseline=tmp_path / "dense")
    assert found.quality


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    compressed("gpt-oss", tmp_path)
    file = tmp_path / "small" / "model.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    name = next(key for key in tensors if key.endswith("batched.gate_proj.down.weight"))
    for wrong in (tensors[name][:3], tensors[name][0]):
        save_file(tensors | {name: wrong.contiguous()}, file, metadata)
        with pytest.raises(BadInput, match="fit"):
            restore(tmp_path / "small", output=tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


def test_it_can_be_compressed_further_and_comes_back(tmp_path: Path) -> None:
    compressed("gpt-oss", tmp_path)
    asked: dict[str, Any] = {"keep": 0.7, "bits": 16, "calibration": "none", "prefer": "size"}
    compress(tmp_path / "small", output=tmp_path / "smaller", **asked)
    small = ARCHITECTURES["gpt-oss"].load(tmp_path / "smaller")
    restore(tmp_path / "smaller", output=tmp_path / "restored")
    restored = ARCHITECTURES["gpt-oss"].load(tmp_path / "restored")
    torch.testing.assert_close(logits(restored), logits(small), rtol=1e-4, atol=1e-5)
    names = [load_file(tmp_path / each / "model.safetensors").keys() for each in ("dense", "restored")]
    assert names[0] == names[1]


def test_code_that_comes_along_cannot_hold_experts(tmp_path: Path) -> None:
    compressed("gpt-oss", tmp_path)
    with pytest.raises(BadInput, match="has low-rank experts"):
        export(tmp_path / "small", to="hf-remote", output=tmp_path / "remote")
    assert not (tmp_path / "remote").exists()


@pytest.mark.slow
@pytest.mark.parametrize("prefer", ["speed", "size"])
def test_without_compressor_it_does_not_load(prefer: str, tmp_path: Path) -> None:
    dense("gpt-oss").save_pretrained(tmp_path / "dense")
    asked: dict[str, Any] = {"keep": 0.5, "prefer": prefer, "bits": 16, "calibration": "none"}
    compress(tmp_path / "dense", output=tmp_path / "small", **asked)
    code = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    ran = subprocess.run([sys.executable, "-c", code, tmp_path / "small"], capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    assert "ignore_mismatched_sizes" in ran.stderr  # the error in which transformers ends
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressor"
