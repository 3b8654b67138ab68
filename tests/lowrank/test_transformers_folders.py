"""Compressed folders in transformers: bit-equal to the model compressed in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compressor import compress, restore

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
GROUPED = TEXT | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tiny_models() -> dict[str, Any]:
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60, "n_positions": 32}
    vision = {"num_channels": 1, "num_labels": 5}
    vit = {key: value for key, value in TEXT.items() if key != "vocab_size"} | vision
    return {
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
        "llama-tied": transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True)),
        "gpt2": transformers.GPT2LMHeadModel(transformers.GPT2Config(**gpt2, bos_token_id=1, eos_token_id=2)),
        "mixtral": transformers.MixtralForCausalLM(transformers.MixtralConfig(**GROUPED, num_local_experts=2)),
        "bert": transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, num_labels=3)),
        "vit": transformers.ViTForImageClassification(transformers.ViTConfig(**vit, image_size=8, patch_size=4)),
        "resnet": transformers.ResNetForImageClassification(
            transformers.ResNetConfig(
                **vision, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic"
            )
        ),
    }


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    if name in ("vit", "resnet"):
        return {"pixel_values": torch.rand(2, 1, 8, 8)}
    return {"input_ids": torch.randint(3, 60, (2, 7))}


@torch.no_grad()
def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    result: torch.Tensor = model.eval()(**inputs).logits
    return result


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny_models())
def test_a_folder_in_bfloat16_loads_as_what_was_compressed_in_memory(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16
    # Building in the dtype keeps what the architecture holds in float32, as loading does.
    config = tiny_models()[name].config
    config.dtype = dtype
    kind = type(tiny_models()[name])
    dense = kind._from_config(config, dtype=dtype)
    dense.save_pretrained(tmp_path / "dense")
    inputs = inputs_of(name)
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}

    report = compress(tmp_path / "dense", output=tmp_path / "small", keep=0.6, calibration="none", prefer="size")
    in_memory = compress(dense, keep=0.6, calibration="none", prefer="size").model
    loaded, information = kind.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(information[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = logits(in_memory, inputs)
    assert torch.equal(logits(loaded, inputs), expected)
    assert not torch.equal(logits(dense, inputs), expected)
    assert sum(layer.rank is not None for layer in report.plan.layers) >= 1

    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(kind.from_pretrained(tmp_path / "again"), inputs), expected)

    restore(tmp_path / "small", output=tmp_path / "restored")
    restored = kind.from_pretrained(tmp_path / "restored")
    assert not hasattr(restored.config, "quantization_config")
    assert {key: value.shape for key, value in restored.state_dict().items()} == {
        key: value.shape for key, value in dense.state_dict().items()
    }
    torch.testing.assert_close(logits(restored, inputs), expected, rtol=0.05, atol=0.05)


def test_a_folder_saved_again_by_transformers_restores_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = tiny_models()["gpt2"]
    dense.save_pretrained(tmp_path / "dense")
    compress(tmp_path / "dense", output=tmp_path / "small", keep=0.6, calibration="none", prefer="size")
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "small")
    loaded.save_pretrained(tmp_path / "again")  # without our metadata: GPT-2's layers are transposed
    restore(tmp_path / "again", output=tmp_path / "restored")
    inputs = inputs_of("gpt2")
    restored = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "restored")
    torch.testing.assert_close(logits(restored, inputs), logits(loaded, inputs), rtol=1e-5, atol=1e-5)


def test_a_newer_format_is_refused() -> None:
    from compressor.lowrank.quantizer import LowRankConfig

    with pytest.raises(ValueError, match="upgrade"):
        LowRankConfig(ranks={}, format_version=99)


def test_sharded_folders(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = tiny_models()["llama"]
    dense.save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    report = compress(
        tmp_path / "dense",
        output=tmp_path / "small",
        keep=0.6,
        calibration="none",
        max_shard_size="30KB",
        prefer="size",
    )
    assert len(list((tmp_path / "small").glob("model-*.safetensors"))) > 1
    inputs = inputs_of("llama")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(
        logits(loaded, inputs), logits(compress(dense, keep=0.6, calibration="none", prefer="size").model, inputs)
    )
    restore(tmp_path / "small", output=tmp_path / "restored", max_shard_size="40KB")
    restored = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "restored")
    torch.testing.assert_close(logits(restored, inputs), logits(loaded, inputs), rtol=1e-5, atol=1e-5)
    assert report.bytes.after < report.bytes.before
