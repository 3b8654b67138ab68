"""Merged adapters add the weighted sum of what each adds, exactly at full rank, and its truncated SVD below."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import compressor
from compressor.errors import BadInput
from tests.adapters.adapters_of import (
    MODULES,
    diffusers_file,
    kohya_file,
    kohya_updates,
    peft_folder,
    tensors_in,
    truncated,
)

WEIGHTS = (0.7, -1.3)


def two_files(folder: Path, dtype: torch.dtype = torch.float32) -> list[Path]:
    """Two adapters of kohya's scripts with ranks, alphas, and values of their own."""
    torch.manual_seed(0)
    first = kohya_file(folder / "a.safetensors", rank=4, alpha=3.0, dtype=dtype)
    return [first, kohya_file(folder / "b.safetensors", rank=6, alpha=None, dtype=dtype)]


def sums(files: list[Path], weights: tuple[float, ...] = WEIGHTS) -> dict[str, torch.Tensor]:
    updates = [kohya_updates(file) for file in files]
    return {name: sum(w * each[name] for w, each in zip(weights, updates, strict=True)) for name in updates[0]}


@pytest.mark.parametrize("rank", [None, 1, 3, 9, 10, 1000])
def test_it_adds_the_weighted_sum(tmp_path: Path, rank: int | None) -> None:
    files = two_files(tmp_path)
    merging = compressor.merge(files, output=tmp_path / "both.safetensors", weights=WEIGHTS, rank=rank)
    after = kohya_updates(tmp_path / "both.safetensors")
    dropped = whole = 0.0
    for name, update in sums(files).items():
        expected = update if rank is None else truncated(update, rank)
        torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-6 * float(update.norm()))
        dropped += float((after[name] - update).square().sum())
        whole += float(update.square().sum())
    assert merging.adapter is not None
    assert merging.adapter.error == pytest.approx((dropped / whole) ** 0.5, rel=1e-4, abs=1e-6)
    assert merging.bytes == (tmp_path / "both.safetensors").stat().st_size
    assert merging.weights == WEIGHTS


@pytest.mark.parametrize("budget", [{"keep": 0.3}, {"energy": 0.8}, {"max_size": 9_000}])
def test_budgets_are_held(tmp_path: Path, budget: dict[str, Any]) -> None:
    files = two_files(tmp_path)
    merging = compressor.merge(files, output=tmp_path / "both.safetensors", **budget)
    after, expected = kohya_updates(tmp_path / "both.safetensors"), sums(files, (1.0, 1.0))
    for name, update in expected.items():
        error = float((after[name] - update).square().sum() / update.square().sum())
        rank = len(tensors_in(tmp_path / "both.safetensors")[f"{name}.lora_down.weight"])
        best = truncated(update, rank)
        torch.testing.assert_close(after[name], best, rtol=0, atol=1e-6 * float(update.norm()))
        assert "energy" not in budget or error <= 0.2 * (1 + 1e-5)
    assert "keep" not in budget or merging.parameters <= 0.3 * merging.parts_parameters
    assert "max_size" not in budget or merging.bytes <= 9_000


def test_dialects_may_differ_and_the_first_counts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    kohya = kohya_file(tmp_path / "a.safetensors", rank=4, dtype=torch.float32)
    diffusers = diffusers_file(tmp_path / "b.safetensors", rank=3)
    peft = peft_folder(tmp_path / "c", rank=5)
    for at, models in enumerate(([kohya, diffusers, peft], [peft, kohya, diffusers], [diffusers, peft, kohya])):
        end = "" if models[0] == peft else ".safetensors"
        both = Path(compressor.merge(models, output=tmp_path / f"both-{at}{end}").output or "")
        back = compressor.export(both, to="kohya", output=tmp_path / f"back-{at}.safetensors").output if at else both
        parts = [kohya_updates(kohya)]
        for number, model in enumerate((diffusers, peft)):
            other = compressor.export(model, to="kohya", output=tmp_path / f"part-{at}-{number}.safetensors").output
            parts.append(kohya_updates(Path(other)))
        after = kohya_updates(Path(back))
        assert len(after) == len(MODULES)
        for name, update in after.items():
            expected = sum(part[name] for part in parts)
            torch.testing.assert_close(update, expected, rtol=0, atol=1e-6 * float(update.norm()))


def test_a_module_of_one_adapter_alone_is_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second = peft_folder(tmp_path / "a"), peft_folder(tmp_path / "b")
    alone = "down_blocks.0.resnets.1.conv1"
    tensors = tensors_in(first / "adapter_model.safetensors")
    save_file({n: t for n, t in tensors.items() if alone not in n}, first / "adapter_model.safetensors")
    both = tmp_path / "both"
    compressor.merge([first, second], output=both)
    merged, own = (tensors_in(folder / "adapter_model.safetensors") for folder in (both, second))
    for end in ("lora_A.weight", "lora_B.weight"):
        name = f"base_model.model.{alone}.{end}"
        assert torch.equal(merged[name], own[name])


def test_peft_loads_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
    models = []
    for at, (rank, alpha, target) in enumerate(((3, 5, ["0"]), (4, 2, ["0", "2"]))):
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=target)
        model = peft.get_peft_model(copy.deepcopy(base), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_()
        model.save_pretrained(tmp_path / str(at))
        models.append(model.merge_and_unload())
    compressor.merge([tmp_path / "0", tmp_path / "1"], output=tmp_path / "both", weights="0.5,2")
    both = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "both").merge_and_unload()
    for name, weight in base.state_dict().items():
        first, second = (model.state_dict()[name] - weight for model in models)
        torch.testing.assert_close(both.state_dict()[name] - weight, 0.5 * first + 2 * second, rtol=1e-4, atol=1e-5)


def test_what_does_not_add_is_refused(tmp_path: Path) -> None:
    first, second = two_files(tmp_path)
    save_file({"layer.weight": torch.randn(8, 8)}, tmp_path / "model.safetensors")
    other = {
        n: t[..., :5].contiguous() if "lora_down" in n else t for n, t in tensors_in(second).items() if "to_q" in n
    }
    save_file(other, tmp_path / "narrow.safetensors")
    dora = tensors_in(second)
    dora |= {next(iter(dora)).rpartition(".lora_")[0] + ".dora_scale": torch.ones(1, 32)}
    save_file(dora, tmp_path / "dora.safetensors")
    language, path = peft_folder(tmp_path / "language"), "base_model.model.model.layers.0.self_attn.q_proj"
    lora = {f"{path}.lora_A.weight": torch.randn(4, 24), f"{path}.lora_B.weight": torch.randn(24, 4)}
    save_file(lora, language / "adapter_model.safetensors")
    out = {"output": tmp_path / "both.safetensors"}
    for models, options, words in (
        ([first, tmp_path / "model.safetensors"], {}, "no adapter"),
        ([first, tmp_path / "narrow.safetensors"], {}, "not of one base"),
        ([first, tmp_path / "dora.safetensors"], {}, "DoRA"),
        ([language, first], {}, r"changes unet\.down_blocks.* and the first model\.layers.* not of one base"),
        ([first, language], {}, r"changes model\.layers.* and the first unet\.down_blocks.* not of one base"),
        ([first, second], {"weights": (0, 0)}, "sum of nothing"),
        ([first, second], {"mode": "concat"}, "adapters are added"),
        ([first, second], {"weights": (1.0,)}, "1 weights of 2"),
        ([first, second], {"weights": "a,b"}, "not a number"),
        ([first, second], {"rank": 2, "keep": 0.5}, "several budgets"),
        ([first, second], {"max_drop": 0.5, "data": ["x", "y"]}, "not for adapters"),
    ):
        with pytest.raises(BadInput, match=words):
            compressor.merge(models, **options, **out)
    assert not (tmp_path / "both.safetensors").exists()


def test_what_is_of_adapters_is_refused_of_networks(tmp_path: Path) -> None:
    for name in "ab":
        save_file({"layer.weight": torch.randn(8, 8)}, tmp_path / f"{name}.safetensors")
    models = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for options, words in (
        ({"weights": (1, 1)}, "about adapters"),
        ({"rank": 2}, "about adapters"),
        ({}, "how networks are merged"),
    ):
        with pytest.raises(BadInput, match=words):
            compressor.merge(models, output=tmp_path / "both.safetensors", **options)
