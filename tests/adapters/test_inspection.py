"""How much rank the modules use: LAPACK's singular values of the dense updates."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import compressor
from tests.adapters.adapters_of import kohya_file, kohya_updates


def test_ranks_are_those_of_the_dense_updates(tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = kohya_file(tmp_path / "lora.safetensors", dtype=torch.float32)
    inspection = compressor.inspect(file)
    assert inspection.adapter is not None
    for module, update in zip(inspection.adapter.modules, kohya_updates(file).values(), strict=True):
        values = np.linalg.svd(update.numpy(), compute_uv=False)
        shares = np.cumsum(values**2) / np.sum(values**2)
        assert module.energy_90 == int(np.searchsorted(shares, 0.9)) + 1
        assert module.energy_99 == int(np.searchsorted(shares, 0.99)) + 1
        assert module.norm == pytest.approx(float(np.linalg.norm(update.numpy())), rel=1e-6)
        weights = values[values > 1e-12] / values.sum()
        assert module.entropy == pytest.approx(float(np.exp(-(weights * np.log(weights)).sum())), rel=1e-6)
        assert module.rank == 8
        assert module.scale == pytest.approx(3 / 8)
    document = json.loads(json.dumps(inspection.to_dict()))
    assert [layer["name"] for layer in document["layers"]] == list(inspection.to_frame().index)
    assert document["dialect"] == "kohya"


def test_many_modules_are_summed_up_by_kind(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tensors = {}
    for block in range(30):
        for kind in ("attn1_to_q", "ff_net_0_proj"):
            place = f"lora_unet_down_blocks_{block}_attentions_0_transformer_blocks_0_{kind}"
            tensors[f"{place}.lora_down.weight"] = torch.randn(4, 8)
            tensors[f"{place}.lora_up.weight"] = torch.randn(8, 4)
    save_file(tensors, tmp_path / "lora.safetensors")
    text = str(compressor.inspect(tmp_path / "lora.safetensors"))
    rows = [line.split() for line in text.splitlines() if "attn1.to_q" in line or "ff.net.0.proj" in line]
    blocks = "unet.down_blocks.*.attentions.0.transformer_blocks.0"
    expected = [[f"{blocks}.{kind}", "30", "8", "x", "8", "4"] for kind in ("attn1.to_q", "ff.net.0.proj")]
    assert [row[:6] for row in rows] == expected
    small = str(compressor.compress(tmp_path / "lora.safetensors", rank=2))
    assert small.count(blocks) == 2
