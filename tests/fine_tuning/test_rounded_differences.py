"""Fine-tunes stored in 16 bits: the change that training made comes back, and not what rounding added to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor import compress, export, merge
from compressor.cli.run import run

torch.set_num_threads(1)

SHAPES = {"small": (96, 64), "wide": (64, 256), "square": (192, 192)}
RANK = 4


def merged(dtype: torch.dtype, size: float) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Stored weights of a base, the changes of rank 4 that training made, and what was stored of the sums."""
    generator = torch.Generator().manual_seed(0)
    base, changes = {}, {}
    for name, (rows, columns) in SHAPES.items():
        weight = (0.04 * torch.randn(rows, columns, generator=generator)).to(dtype)
        change = torch.randn(rows, RANK, generator=generator) @ torch.randn(RANK, columns, generator=generator)
        base[f"{name}.weight"] = weight
        changes[f"{name}.weight"] = change.double() * (size * weight.double().norm() / change.double().norm())
    return base, changes, {name: (base[name].double() + changes[name]).to(dtype) for name in base}


def written(folder: Path, base: dict[str, Tensor], tuned: dict[str, Tensor]) -> tuple[Path, Path]:
    paths = folder / "base.safetensors", folder / "tuned.safetensors"
    for path, tensors in zip(paths, (base, tuned), strict=True):
        save_file(tensors, path)
    return paths


@pytest.mark.parametrize("budget", [{}, {"tolerance": 1e-3}, {"keep": 0.9}], ids=str)
@pytest.mark.parametrize("size", [0.01, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_merged_adapter_comes_back_with_its_rank(
    dtype: torch.dtype, size: float, budget: dict[str, float], *, tmp_path: Path
) -> None:
    base, changes, tuned = merged(dtype, size)
    start, end = written(tmp_path, base, tuned)
    report = compress(end, base=start, output=tmp_path / "pairs.safetensors", **budget)
    assert {layer.rank for layer in report.plan.layers} == {RANK}
    pairs = load_file(tmp_path / "pairs.safetensors")
    noise = total = 0.0
    for name in SHAPES:
        true, found = changes[f"{name}.weight"], tuned[f"{name}.weight"].double() - base[f"{name}.weight"].double()
        stored = pairs[f"{name}.up.weight"].double() @ pairs[f"{name}.down.weight"].double()
        left, values, right = torch.linalg.svd(found)
        best = (left[:, :RANK] * values[:RANK]) @ right[:RANK]
        # As near to the true change as the plain truncation; the factors themselves are rounded to the dtype.
        allowed = float((best - true).norm() / true.norm()) + torch.finfo(dtype).eps
        assert (stored - true).norm() <= allowed * true.norm()
        noise, total = noise + float((found - true).square().sum()), total + float(found.square().sum())
    assert report.fine_tune is not None
    assert report.fine_tune.rounding_share == pytest.approx((noise / total) ** 0.5, rel=0.05)


def test_weights_that_were_rounded_and_widened_again(tmp_path: Path) -> None:
    """A file in float32 whose numbers are those of bfloat16 holds the same rounding."""
    base, _, tuned = merged(torch.bfloat16, 0.02)
    start, end = written(tmp_path, base, {name: tensor.float() for name, tensor in tuned.items()})
    report = compress(end, base=start, output=tmp_path / "pairs.safetensors", tolerance=0.01)
    assert {layer.rank for layer in report.plan.layers} == {RANK}


def test_a_change_of_full_rank_is_kept(tmp_path: Path) -> None:
    """What stands above the rounding is no rounding, however many singular values it has."""
    base, _, _ = merged(torch.bfloat16, 0.02)
    generator = torch.Generator().manual_seed(1)
    tuned = {
        name: (weight.double() + 0.02 * torch.randn(weight.shape, generator=generator).double()).to(torch.bfloat16)
        for name, weight in base.items()
    }
    start, end = written(tmp_path, base, tuned)
    compress(end, base=start, output=tmp_path / "pairs.safetensors", tolerance=0.3)
    export(tmp_path / "pairs.safetensors", to="dense", base=start, output=tmp_path / "dense.safetensors")
    again = load_file(tmp_path / "dense.safetensors")
    for name, weight in tuned.items():
        change = weight.double() - base[name].double()
        assert (again[name].double() - weight.double()).norm() <= 0.31 * change.norm()


def test_the_share_of_rounding_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = transformers.LlamaConfig(
        **{"vocab_size": 60, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1},
        **{"num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("_proj.weight"):
                change = torch.randn(len(weight), 2) @ torch.randn(2, weight.shape[1])
                weight.copy_(weight.float() + change * (0.02 * weight.float().norm() / change.norm()))
    model.save_pretrained(tmp_path / "tuned")
    request = [str(tmp_path / "tuned"), "--base", str(tmp_path / "base"), "-o", str(tmp_path / "adapter")]
    assert run(request) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "explains 8." in shown
    assert "of the difference of the paired matrices" in shown
    assert "Rounding explains 8." in (tmp_path / "adapter" / "README.md").read_text()
    plan = json.loads((tmp_path / "adapter" / "compression.json").read_text())
    assert {layer["rank"] for layer in plan["layers"]} == {2}


def test_fine_tunes_that_share_nothing_are_found_apart(tmp_path: Path) -> None:
    """Two changes whose row spaces are orthogonal: rounding, which has no direction, is not taken for an overlap."""
    base, _, _ = merged(torch.bfloat16, 0.02)
    generator = torch.Generator().manual_seed(2)
    parts: list[dict[str, Tensor]] = [{}, {}]
    for name, weight in base.items():
        rows, _ = torch.linalg.qr(torch.randn(weight.shape[1], 4, generator=generator, dtype=torch.float64))
        for part, directions in zip(parts, (rows[:, :2], rows[:, 2:]), strict=True):
            change = torch.randn(len(weight), 2, generator=generator).double() @ directions.T
            part[name] = (weight.double() + change * (0.005 * weight.double().norm() / change.norm())).to(weight.dtype)
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "base.safetensors"]
    for path, tensors in zip(paths, (*parts, base), strict=True):
        save_file(tensors, path)
    merging = merge(paths[:2], base=paths[2], output=tmp_path / "sum.safetensors", mode="sum")
    for layer in merging.layers:
        assert layer.subspace < 0.01
        assert layer.random == pytest.approx(2 / layer.shape[1])
