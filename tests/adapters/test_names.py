"""Names without dots get theirs back, and those of the original UNet are those of diffusers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import compressor
from compressor.adapters import AdapterModule, read_adapter, resized_artifact
from compressor.adapters.names import from_original, to_original, with_dots
from compressor.choices import AdapterDialect
from compressor.errors import BadInput
from compressor.io import open_checkpoint
from tests.adapters.adapters_of import kohya_file, peft_folder, tensors_in

PAIRS = {
    "input_blocks.4.1.transformer_blocks.0.attn1.to_q": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "input_blocks.2.0.in_layers.2": "down_blocks.0.resnets.1.conv1",
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "middle_block.1.proj_in": "mid_block.attentions.0.proj_in",
    "middle_block.2.out_layers.3": "mid_block.resnets.1.conv2",
    "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.5.0.skip_connection": "up_blocks.1.resnets.2.conv_shortcut",
    "output_blocks.4.1.proj_out": "up_blocks.1.attentions.1.proj_out",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
}


@pytest.mark.parametrize(("original", "ours"), PAIRS.items())
def test_names_of_the_original_unet_and_back(original: str, ours: str) -> None:
    assert from_original(original) == ours
    assert to_original(ours, {"up_blocks.0", "up_blocks.1"}) == original


@pytest.mark.parametrize(
    "path",
    [
        *PAIRS,
        *PAIRS.values(),
        "text_model.encoder.layers.11.self_attn.out_proj",
        "text_model.encoder.layers.3.mlp.fc1",
        "single_transformer_blocks.20.proj_mlp",
        "transformer_blocks.3.ff_context.net.0.proj",
        "double_blocks.7.img_attn.qkv",
        "encoder.block.3.layer.1.DenseReluDense.wi_0",
    ],
)
def test_dots_come_back(path: str) -> None:
    assert with_dots(path.replace(".", "_")) == path


def test_a_word_that_is_not_known_is_not_guessed(tmp_path: Path) -> None:
    assert with_dots("blocks_3_strange_attn_q") is None
    tensors = {"lora_unet_blocks_3_strange_attn_q.lora_down.weight": torch.randn(2, 8)}
    tensors["lora_unet_blocks_3_strange_attn_q.lora_up.weight"] = torch.randn(8, 2)
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file)
    for to in ("peft", "diffusers"):
        with pytest.raises(BadInput, match=r"leave it in the names"):
            compressor.export(file, to=to)
    assert tensors_in(Path(compressor.compress(file, rank=1).output or "")).keys() == tensors.keys()


@pytest.mark.parametrize("way", [("peft",), ("diffusers",), ("peft", "diffusers"), ("diffusers", "peft")])
def test_the_way_there_and_back_is_exact(tmp_path: Path, way: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    at = kohya_file(tmp_path / "lora.safetensors", alpha=3.0)
    before = tensors_in(at)
    for step, to in enumerate((*way, "kohya")):
        end = "" if to == "peft" else ".safetensors"
        at = Path(compressor.export(at, to=to, output=tmp_path / f"{step}{end}").output)
    after = tensors_in(at)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(before[name].dtype == after[name].dtype for name in before)


@pytest.mark.parametrize(
    ("to", "rank", "alpha"), [("kohya", 49, 1), ("kohya", 98, 2), ("diffusers", 49, 1), ("diffusers", 35, 0.7)]
)
def test_alpha_comes_back_as_it_was_stated(tmp_path: Path, *, to: str, rank: int, alpha: float) -> None:
    assert alpha / rank * rank != alpha  # what it is rounded to where the scale alone is kept
    folder = peft_folder(tmp_path / "lora", {"lora_alpha": alpha}, rank=rank)
    other = compressor.export(folder, to=to, output=tmp_path / "other.safetensors").output
    back = Path(compressor.export(other, to="peft", output=tmp_path / "back").output)
    config = json.loads((back / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["alpha_pattern"]) == (rank, alpha, {})


def test_what_peft_alone_can_hold_is_refused(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "lora")
    tensors = tensors_in(folder / "adapter_model.safetensors")
    for name, words in (
        ("base_model.model.head.weight", "beside the factors"),
        ("base_model.model.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.lora_B.bias", "biases"),
        ("base_model.model.up_blocks.1.attentions.2.proj_in.lora_magnitude_vector", "DoRA"),
    ):
        save_file(tensors | {name: torch.ones(3)}, folder / "adapter_model.safetensors")
        for to in ("kohya", "diffusers"):
            with pytest.raises(BadInput, match=words):
                compressor.export(folder, to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_models_are_no_adapters_and_adapters_no_models(tmp_path: Path) -> None:
    save_file({"layer.weight": torch.randn(8, 8)}, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match="is no LoRA adapter"):
        compressor.export(tmp_path / "model.safetensors", to="kohya")
    file = kohya_file(tmp_path / "lora.safetensors")
    for to in ("dense", "onnx", "lora"):
        with pytest.raises(BadInput, match="is a LoRA adapter"):
            compressor.export(file, to=to)
    with pytest.raises(BadInput, match="is a LoRA file of kohya's scripts, not a model"):
        compressor.restore(file, output=tmp_path / "dense.safetensors")


class Passes(tuple[AdapterModule, ...]):
    """Modules that count how often all of them are gone through."""

    passes: int

    def __iter__(self) -> Iterator[AdapterModule]:
        self.passes += 1
        return super().__iter__()


@pytest.mark.parametrize("dialect", ["kohya", "peft"])
def test_what_all_names_tell_is_found_once(tmp_path: Path, dialect: AdapterDialect) -> None:
    """Thousands of modules take no longer than their number."""
    tensors = {}
    for number in range(100):
        place = f"unet.down_blocks.{number}.attentions.0.transformer_blocks.1.ff.net.2"
        tensors |= {f"{place}.lora_A.weight": torch.randn(2, 8), f"{place}.lora_B.weight": torch.randn(8, 2)}
    save_file(tensors, tmp_path / "lora.safetensors")
    adapter = read_adapter(open_checkpoint(tmp_path / "lora.safetensors"))
    modules = Passes(adapter.modules)
    modules.passes = 0
    artifact = resized_artifact(
        replace(adapter, modules=modules), [each.rank for each in adapter.modules], dialect=dialect
    )
    assert len(artifact.infos) >= 200
    assert modules.passes < 20
