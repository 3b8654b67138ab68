"""Adapters are known by the names of their tensors, wherever and by whom they were written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compressor import BadInput, archive, compress, diagnose
from compressor.io import open_checkpoint
from compressor.io.adapters import adapter_kind, is_adapter_factor
from compressor.network import find_layers

FACTORS = {
    "base_model.model.layers.0.self_attn.q_proj.lora_A.weight": "PEFT",
    "base_model.model.layers.0.self_attn.q_proj.lora_B.default.weight": "PEFT",
    "base_model.model.embed_tokens.lora_embedding_A": "PEFT",
    "layers.0.attn.lora_A": "PEFT",
    "unet.down_blocks.0.attentions.0.to_q.lora_A.weight": "PEFT",
    "base_model.model.mlp.ia3_l": "PEFT",
    "lora_unet_down_blocks_0_attentions_0_to_q.lora_down.weight": "kohya",
    "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": "kohya",
    "lora_unet_x.hada_w1_a": "LoHa",
    "lora_unet_x.lokr_w2_b": "LoKr",
    "lora_unet_x.lokr_w1": "LoKr",
    "lora_unet_x.oft_blocks": "OFT",
    "mid_block.attentions.0.processor.to_q_lora.down.weight": "diffusers",
    "unet.attn.to_k.lora_linear_layer.up.weight": "diffusers",
}
WEIGHTS = [
    "layers.0.self_attn.q_proj.weight",
    "explorab_A.weight",
    "flora_A.weight",
    "encoder.down.weight",
    "encoder.up.weight",
    "down_blocks.0.up.weight",
    "lora_unet.weight",
    "color.lora.weight",
    "q_lora_rank.weight",
]


@pytest.mark.parametrize("name", FACTORS)
def test_factors_are_known(name: str) -> None:
    assert is_adapter_factor(name)
    found = adapter_kind([name, "x.alpha"])
    assert found is not None
    assert FACTORS[name] in found[0]


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_not_taken_for_factors(name: str) -> None:
    assert not is_adapter_factor(name)
    assert adapter_kind([name]) is None


@pytest.mark.parametrize(
    "names", [("x.lora_A.weight", "x.lora_B.weight"), ("a_x.lora_down.weight", "a_x.lora_up.weight")]
)
def test_verbs_of_models_refuse_an_adapter_by_any_file_name(tmp_path: Path, names: tuple[str, str]) -> None:
    path = tmp_path / "step-1.safetensors"
    down, up = names
    save_file({down: torch.randn(4, 32), up: torch.randn(32, 4), "x.alpha": torch.tensor(4.0)}, path)
    for verb in (lambda: diagnose(path), lambda: archive([path], output=tmp_path / "archive")):
        with pytest.raises(BadInput, match=r"is a LoRA (adapter|file) of .*, not a model; .*(merge|fuse)"):
            verb()
    assert [file.name for file in tmp_path.iterdir()] == ["step-1.safetensors"]


@pytest.mark.parametrize("base", ["q.weight", "q.base_layer.weight"])
def test_weights_with_an_adapter_beside_them_are_compressed_and_the_adapter_is_not(tmp_path: Path, base: str) -> None:
    names = {base: (32, 32), "q.lora_A.speech.weight": (4, 32), "q.lora_B.speech.weight": (32, 4)}
    save_file({name: torch.randn(*shape) for name, shape in names.items()}, tmp_path / "model.safetensors")
    layers = find_layers(open_checkpoint(tmp_path / "model.safetensors"))
    assert {layer.tensor for layer in layers if layer.eligible} == {base}
    assert [layer.rank is None for layer in compress(tmp_path / "model.safetensors", keep=0.5).plan.layers] == [False]
