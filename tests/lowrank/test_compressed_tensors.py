"""The `quantization_config` of quantized folders is one that compressed-tensors and vLLM understand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from compressor import restore
from compressor.lowrank.compressed_tensors import (
    compressed_tensors_config,
    quantized_targets,
)
from compressor.quantize import Quantization
from tests.exporting.conftest import tiny_llama

LAYERS = {name: Quantization.of(each) for name, each in {"a.0": "4g32", "a.1": "8", "a.2": "4g32", "b": "3g32"}.items()}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = (
            nn.Sequential(*(nn.Linear(64, 64) for _ in range(3))),
            nn.Linear(64, 64),
            nn.Linear(64, 4),
        )


def test_the_package_lays_out_the_layers_as_they_are_stored() -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    config = QuantizationConfig.model_validate(compressed_tensors_config(LAYERS, ["head"]))
    network = Network().to("meta")
    apply_quantization_config(network, config, show_progress=False)
    ModelCompressor(config).compress_model(network)
    for name, quantization in LAYERS.items():
        state = network.get_submodule(name).state_dict()
        infos = {info.name: info for info in quantization.infos((64, 64), state["bias"].dtype)}
        assert set(state) == {"bias", *infos}
        assert {own: tuple(state[own].shape) for own in infos} == {own: info.shape for own, info in infos.items()}
    assert set(network.head.state_dict()) == {"weight", "bias"}


def test_what_was_written_is_read() -> None:
    config = compressed_tensors_config(LAYERS, ["head"])
    assert quantized_targets(config) == LAYERS
    zeros = {"c": Quantization.of("2g64z")}
    assert quantized_targets(compressed_tensors_config(zeros, [])) == zeros


WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": WEIGHTS | {"num_bits": 99}}, "99 bits"),
        ({"weights": WEIGHTS | {"type": "float"}}, "float by group"),
        ({"weights": WEIGHTS | {"strategy": "block"}}, "int by block"),
        ({"weights": WEIGHTS | {"group_size": 2.5}}, "groups of 2.5"),
        ({"weights": None}, "how its weights"),
        ({"targets": "Linear"}, "how its weights"),
        ({"format": "nvfp4-pack-quantized"}, "its format is nvfp4-pack-quantized"),
    ],
)
def test_other_ways_to_quantize_are_refused(changes: dict[str, Any], words: str) -> None:
    group = {"targets": ["Linear"], "weights": WEIGHTS, "format": "pack-quantized"} | changes
    with pytest.raises(ValueError, match=words):
        quantized_targets({"format": "pack-quantized", "config_groups": {"group_0": group}})
    with pytest.raises(ValueError, match="which layers"):
        quantized_targets({"format": "pack-quantized", "config_groups": []})


def foreign_folder(folder: Path, scheme: dict[str, Any], method: str) -> dict[str, torch.Tensor]:
    """A Llama that the package itself quantized, and its weights as the package dequantizes them."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    model = tiny_llama(hidden_size=64, intermediate_size=96)
    model.save_pretrained(folder)
    parsed = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": scheme})
    compressor = BaseCompressor.get_value_from_registry(method)
    stored, dense = load_file(folder / "model.safetensors"), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            weight = stored.pop(f"{name}.weight")
            groups = weight.shape[1] // scheme.get("group_size", weight.shape[1])
            scale = weight.unflatten(1, (groups, -1)).abs().amax(2) / 2 ** (scheme["num_bits"] - 1)
            state = {"weight": weight, "weight_scale": scale}
            if not scheme["symmetric"]:
                state["weight_zero_point"] = torch.ones_like(scale, dtype=torch.int8)
            packed = compressor.compress(state, parsed)
            dense[f"{name}.weight"] = compressor.decompress(packed, parsed)["weight"]
            stored |= {f"{name}.{own}": tensor for own, tensor in packed.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    said = {"quant_method": "compressed-tensors", "format": method, "quantization_status": "compressed"}
    said |= {"config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}}, "ignore": ["lm_head"]}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    return dense


@pytest.mark.parametrize(
    ("scheme", "method"),
    [
        ({"num_bits": 8, "strategy": "channel", "symmetric": True}, "int-quantized"),
        ({"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}, "naive-quantized"),
    ],
)
def test_what_others_quantized_is_restored(scheme: dict[str, Any], method: str, tmp_path: Path) -> None:
    dense = foreign_folder(tmp_path / "quantized", scheme, method)
    restored = restore(tmp_path / "quantized", output=tmp_path / "restored")
    stored = load_file(tmp_path / "restored" / "model.safetensors")
    assert {f"{name}.weight" for name in restored.layers} == set(dense)
    for name, weight in dense.items():
        torch.testing.assert_close(stored[name], weight, rtol=0, atol=1e-7)
    assert "quantization_config" not in json.loads((tmp_path / "restored" / "config.json").read_text())
