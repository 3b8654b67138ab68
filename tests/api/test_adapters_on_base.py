"""Adapters resized on their base: what is lost is what base and adapter together lose, by PEFT's own account."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor import BadInput, compress
from compressor.cli.run import run
from tests.adapters.adapters_of import kohya_file

peft = pytest.importorskip("peft")
torch.set_num_threads(1)

RANK = 16
VOCABULARY = 60
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tokens(count: int, *, seed: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (count, 16), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose inputs lie in few directions, an adapter that adds as much in all, and data."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, **SPECIAL))
    with torch.no_grad():
        weight = base.model.embed_tokens.weight
        weight.copy_(torch.randn(VOCABULARY, 4) @ torch.randn(4, 64) + 0.05 * torch.randn(VOCABULARY, 64))
        for name, other in base.named_parameters():
            if other.dim() > 1 and "embed" not in name:
                other.mul_(5)
    base.save_pretrained(folder / "base")
    write_adapter(base, folder / "lora")
    np.savez(folder / "calibration.npz", input_ids=tokens(48, seed=1).numpy())
    np.savez(folder / "data.npz", input_ids=tokens(32, seed=2).numpy())
    return folder


def write_adapter(base: Any, path: Path, **config: Any) -> None:
    stated = {
        "r": RANK,
        "lora_alpha": 24,
        "task_type": "CAUSAL_LM",
        "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    }
    model = peft.get_peft_model(base, peft.LoraConfig(**stated | config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(0.15 * torch.randn(parameter.shape))
    model.save_pretrained(path, save_embedding_layers=False)
    model.unload()


@torch.no_grad()
def logits(folder: Path, adapter: Path | None) -> Tensor:
    """What PEFT makes of the base and an adapter, on text that nothing was chosen by."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    found: Tensor = model.eval()(input_ids=tokens(64, seed=3)).logits
    return found


def divergence(folder: Path, adapter: Path) -> float:
    whole, small = (logits(folder, each).log_softmax(-1) for each in (folder / "lora", adapter))
    return float((whole.exp() * (whole - small)).sum(-1).mean())


def weights(path: Path) -> dict[str, Tensor]:
    return load_file(path / "adapter_model.safetensors")


def ranks(path: Path) -> list[int]:
    return [len(each) for name, each in weights(path).items() if "lora_A" in name]


def numbers(path: Path) -> int:
    return sum(each.numel() for each in weights(path).values())


@pytest.mark.parametrize("keep", [0.5, 0.25])
def test_at_one_size_calibration_loses_less(folder: Path, tmp_path: Path, keep: float) -> None:
    compress(folder / "lora", output=tmp_path / "alone", keep=keep)
    small = compress(
        folder / "lora",
        base=folder / "base",
        output=tmp_path / "small",
        keep=keep,
        calibration=folder / "calibration.npz",
        effort="balanced",
    )
    assert numbers(tmp_path / "small") <= keep * numbers(folder / "lora")
    assert small.parameters.before == numbers(folder / "lora")
    assert small.parameters.after == numbers(tmp_path / "small")
    assert small.bytes.before == (folder / "lora" / "adapter_model.safetensors").stat().st_size
    assert small.plan.eligible_after == numbers(tmp_path / "small")
    assert max(ranks(tmp_path / "small")) <= RANK
    assert divergence(folder, tmp_path / "small") < 0.5 * divergence(folder, tmp_path / "alone")
    assert small.fine_tune is not None
    assert small.fine_tune.verified_with == peft.__version__
    assert small.fine_tune.in_full == ()


def test_whole_it_adds_the_same(folder: Path, tmp_path: Path) -> None:
    compress(
        folder / "lora",
        base=folder / "base",
        output=tmp_path / "same",
        keep=1,
        calibration=folder / "calibration.npz",
        effort="fast",
    )
    assert ranks(tmp_path / "same") == [RANK] * len(ranks(folder / "lora"))
    whole = logits(folder, folder / "lora")
    torch.testing.assert_close(logits(folder, tmp_path / "same"), whole, rtol=1e-4, atol=1e-4)
    assert float((whole - logits(folder, None)).abs().max()) > 0.1


def test_a_file_size_and_a_drop_are_kept(folder: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"base": folder / "base", "calibration": folder / "calibration.npz", "effort": "fast"}
    compress(folder / "lora", output=tmp_path / "small", max_size=60_000, **asked)
    assert (tmp_path / "small" / "adapter_model.safetensors").stat().st_size <= 60_000
    dropped = compress(folder / "lora", output=tmp_path / "drop", max_drop=1.0, data=folder / "data.npz", **asked)
    assert dropped.evaluation is not None
    assert dropped.evaluation.drop is not None
    assert dropped.evaluation.drop <= 1.0
    assert max(ranks(tmp_path / "drop")) <= RANK
    assert numbers(tmp_path / "drop") < numbers(folder / "lora")


def test_narrow_numbers_stay_narrow_and_the_base_keeps_its_name(folder: Path, tmp_path: Path) -> None:
    narrow = tmp_path / "lora"
    narrow.mkdir()
    config = json.loads((folder / "lora" / "adapter_config.json").read_text())
    (narrow / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/base"}))
    halves = {name: each.to(torch.bfloat16) for name, each in weights(folder / "lora").items()}
    save_file(halves, narrow / "adapter_model.safetensors", {"format": "pt"})
    asked: dict[str, Any] = {"base": folder / "base", "calibration": folder / "calibration.npz", "effort": "fast"}
    compress(narrow, output=tmp_path / "small", keep=0.5, **asked)
    assert {each.dtype for each in weights(tmp_path / "small").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "small" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    assert divergence(folder, tmp_path / "small") < divergence_alone(folder, narrow, tmp_path / "alone")


def divergence_alone(folder: Path, adapter: Path, output: Path) -> float:
    compress(adapter, output=output, keep=0.5)
    return divergence(folder, output)


def test_of_layers_with_biases_a_drop_chooses_ranks(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 32, "vocab_size": VOCABULARY}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **ends)).to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    config = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_rslora": True}
    write_adapter(base, tmp_path / "lora", r=8, lora_alpha=16, **config)
    on_base: dict[str, Any] = {"base": tmp_path / "base", "output": tmp_path / "drop"}
    with pytest.raises(BadInput, match="has a bias that calibration would move"):
        compress(tmp_path / "lora", **on_base, keep=0.5, calibration=folder / "calibration.npz")
    compress(
        tmp_path / "lora",
        base=tmp_path / "base",
        output=tmp_path / "drop",
        data=folder / "data.npz",
        max_drop=0.5,
        allow_miss=True,
    )
    assert not any("bias" in name for name in weights(tmp_path / "drop"))
    assert max(ranks(tmp_path / "drop")) <= 8


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 4}, "calibration shares a size"),
        ({"energy": 0.9, "calibration": None}, "`energy` is not for adapters on a base"),
        ({"keep": 0.5, "calibration": None}, "without data its base says nothing"),
        ({"keep": 0.5, "base": None}, "measured on its base"),
        ({"keep": 0.5, "bits": 4}, "`bits` is not for adapters on a base"),
        ({"keep": 0.5, "output": "small.safetensors"}, "written as a folder"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(folder: Path, tmp_path: Path, *, options: dict[str, Any], words: str) -> None:
    asked = {"base": folder / "base", "calibration": folder / "calibration.npz", "output": "small"} | options
    asked["output"] = tmp_path / asked["output"]
    given = {name: each for name, each in asked.items() if each is not None}
    with pytest.raises(BadInput, match=words):
        compress(folder / "lora", **given)
    assert not any(tmp_path.iterdir())


def test_other_adapters_and_other_bases_are_refused(folder: Path, tmp_path: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    write_adapter(base, tmp_path / "dora", use_dora=True)
    write_adapter(base, tmp_path / "whole", modules_to_save=["lm_head"])
    write_adapter(base, tmp_path / "embedding", target_modules=["embed_tokens"])
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE | {"hidden_size": 32}, **SPECIAL)).save_pretrained(
        tmp_path / "other"
    )
    kohya_file(tmp_path / "lora.safetensors")
    for adapter, of, words in (
        (tmp_path / "dora", folder / "base", "beside its factors"),
        (tmp_path / "whole", folder / "base", "beside its factors"),
        (tmp_path / "embedding", folder / "base", "gets no pair on a base"),
        (folder / "lora", tmp_path / "other", "give the model that it was trained on"),
        (tmp_path / "lora.safetensors", folder / "base", "export ADAPTER --to peft"),
    ):
        with pytest.raises(BadInput, match=words):
            compress(adapter, base=of, output=tmp_path / "small", keep=0.5, calibration=folder / "calibration.npz")
    assert not (tmp_path / "small").exists()


def test_at_a_shell(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [str(folder / "lora"), "--base", str(folder / "base"), "--keep", "0.5", "-o", str(tmp_path / "small")]
    assert run([*asked, "--calibration", str(folder / "calibration.npz"), "--effort", "fast"]) == 0
    assert "LoRA adapter" in capsys.readouterr().out
    assert run([*asked[:-2], "--calibration", str(folder / "calibration.npz"), "--rank", "4"]) == 2
