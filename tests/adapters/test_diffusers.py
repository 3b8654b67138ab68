"""diffusers loads what is written for it, in its own names and in those of kohya's scripts."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import compressor
from tests.adapters.adapters_of import tensors_in, truncated

pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")

RANKS = (4, 6)


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    """A UNet of two blocks, as those of Stable Diffusion 1.5."""
    torch.manual_seed(0)
    made: nn.Module = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=2,
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return made.eval()


@pytest.fixture(scope="module")
def unet_xl() -> nn.Module:
    """A UNet with the blocks of SDXL, several transformer blocks in the second."""
    torch.manual_seed(0)
    made: nn.Module = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=2,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
        use_linear_projection=True,
    )
    return made.eval()


def adapted_layers(unet: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers of attention, feed-forward networks, and residual blocks."""
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and ("blocks" in name or "mid_block" in name)
    }


def adapter_for(unet: nn.Module, path: Path, *, one_alpha: bool) -> dict[str, Tensor]:
    """A folder of PEFT with ranks of their own in every layer, with one alpha or several; and what it adds."""
    tensors, ranks, alphas, updates = {}, {}, {}, {}
    for at, (name, module) in enumerate(adapted_layers(unet).items()):
        rank = RANKS[at % len(RANKS)]
        weight = module.weight
        kernel = weight.shape[2:]
        down = torch.randn(rank, weight.shape[1], *kernel) / math.sqrt(weight[0].numel())
        up = torch.randn(len(weight), rank, *(1 for _ in kernel)) * 0.2
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up
        ranks[name], alphas[name] = rank, 3.0 if one_alpha else 1.0 + at % 3
        product = (up.double().flatten(1) @ down.double().flatten(1)).reshape(weight.shape)
        updates[name] = alphas[name] / rank * product
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "rank_pattern": ranks, "alpha_pattern": alphas}
    (path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": list(ranks)}))
    return updates


def added(unet: nn.Module, loaded: nn.Module) -> dict[str, Tensor]:
    """What a UNet that has loaded an adapter adds to each weight."""
    loaded.fuse_lora()
    found = {}
    for name in adapted_layers(unet):
        layer: Any = loaded.get_submodule(name)
        found[name] = layer.base_layer.weight.detach() - unet.get_submodule(name).weight.detach()
    return found


def loaded_by_pipeline(unet: nn.Module, file: Path, mixin: Any) -> nn.Module:
    """The UNet with a file as a pipeline loads it."""
    state, alphas, metadata = mixin.lora_state_dict(file, unet_config=unet.config, return_lora_metadata=True)
    loaded = copy.deepcopy(unet)
    mixin.load_lora_into_unet(state, network_alphas=alphas, unet=loaded, metadata=metadata)
    return loaded


def require_equal(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, update in expected.items():
        # fuse_lora adds in float32, to weights of size one.
        torch.testing.assert_close(ours[name], update.float(), rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_a_unet_of_sd_loads_it(unet: nn.Module, tmp_path: Path, to: str) -> None:
    updates = adapter_for(unet, tmp_path / "lora", one_alpha=to == "kohya")
    file = tmp_path / "written.safetensors"
    compressor.export(tmp_path / "lora", to=to, output=file)
    mixin = diffusers.loaders.StableDiffusionLoraLoaderMixin
    require_equal(added(unet, loaded_by_pipeline(unet, file, mixin)), updates)


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_a_unet_of_sdxl_loads_it(unet_xl: nn.Module, tmp_path: Path, to: str) -> None:
    updates = adapter_for(unet_xl, tmp_path / "lora", one_alpha=to == "kohya")
    file = tmp_path / "written.safetensors"
    compressor.export(tmp_path / "lora", to=to, output=file)
    if to == "kohya":  # the scripts train SDXL with the names of its original code
        assert all(
            "blocks" not in name or "put_blocks" in name or "transformer_blocks" in name for name in tensors_in(file)
        )
    mixin = diffusers.loaders.StableDiffusionXLLoraLoaderMixin
    require_equal(added(unet_xl, loaded_by_pipeline(unet_xl, file, mixin)), updates)


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_it_loads_what_was_resized(unet: nn.Module, tmp_path: Path, to: str) -> None:
    updates = adapter_for(unet, tmp_path / "lora", one_alpha=True)
    compressor.export(tmp_path / "lora", to=to, output=tmp_path / "written.safetensors")
    small = tmp_path / "small.safetensors"
    resized = compressor.compress(tmp_path / "written.safetensors", output=small, keep=0.5)
    ranks = {layer.name.removeprefix("unet."): layer.rank for layer in resized.plan.layers}
    assert len(set(ranks.values())) > 2
    mixin = diffusers.loaders.StableDiffusionLoraLoaderMixin
    expected = {name: truncated(each.flatten(1), ranks[name]).reshape(each.shape) for name, each in updates.items()}
    require_equal(added(unet, loaded_by_pipeline(unet, small, mixin)), expected)


def test_what_diffusers_saves_is_read_with_its_scales(unet: nn.Module, tmp_path: Path) -> None:
    """diffusers writes the configuration of PEFT into the header; its scales are not one."""
    from peft import LoraConfig

    model = copy.deepcopy(unet)
    pattern = {"attn2.to_q": 6}
    config = LoraConfig(r=4, lora_alpha=3, rank_pattern=pattern, target_modules=["to_q", "conv1"], use_rslora=True)
    model.add_adapter(config)  # type: ignore[operator]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    from peft import get_peft_model_state_dict

    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path / "saved",
        unet_lora_layers=get_peft_model_state_dict(model),
        unet_lora_adapter_metadata=config.to_dict(),
    )
    compressor.compress(tmp_path / "saved", output=tmp_path / "same", rank=100)
    compressor.compress(tmp_path / "saved", output=tmp_path / "small", rank=2)
    mixin = diffusers.loaders.StableDiffusionLoraLoaderMixin
    name = "pytorch_lora_weights.safetensors"

    def updates(folder: str) -> dict[str, Tensor]:
        loaded = loaded_by_pipeline(unet, tmp_path / folder / name, mixin)
        loaded.fuse_lora()  # type: ignore[operator]
        return {
            layer: module.base_layer.weight.detach() - unet.get_submodule(layer).weight.detach()
            for layer, module in loaded.named_modules()
            if hasattr(module, "base_layer")
        }

    full = updates("saved")
    assert full
    assert all(float(each.norm()) > 0.1 for each in full.values())
    require_equal(updates("same"), full)
    require_equal(updates("small"), {n: truncated(e.flatten(1), 2).reshape(e.shape) for n, e in full.items()})


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_a_text_encoder_loads_it(tmp_path: Path, to: str) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    encoder = CLIPTextModel(config).eval()
    layers = [name for name, each in encoder.named_modules() if isinstance(each, nn.Linear)]
    tensors, updates = {}, {}
    for name in layers:
        weight = encoder.get_submodule(name).weight
        down, up = torch.randn(4, weight.shape[1]) / 4, torch.randn(len(weight), 4) / 4
        place = f"text_encoder.{name}" if name.startswith("text_model") else f"text_encoder.text_model.{name}"
        tensors[f"{place}.lora_A.weight"], tensors[f"{place}.lora_B.weight"] = down, up
        updates[name] = up @ down
    save_file(tensors, tmp_path / "lora.safetensors")
    written = tmp_path / "written.safetensors"
    if to == "kohya":
        compressor.export(tmp_path / "lora.safetensors", to=to, output=written)
        assert all(name.startswith("lora_te_text_model_encoder_layers_") for name in tensors_in(written))
    else:
        compressor.compress(tmp_path / "lora.safetensors", output=written, rank=4)
    mixin = diffusers.loaders.StableDiffusionLoraLoaderMixin
    state, alphas, metadata = mixin.lora_state_dict(written, return_lora_metadata=True)
    loaded = copy.deepcopy(encoder)
    mixin.load_lora_into_text_encoder(state, network_alphas=alphas, text_encoder=loaded, metadata=metadata)
    for name in layers:
        layer: Any = loaded.get_submodule(name)
        torch.testing.assert_close(layer.get_delta_weight("default_0"), updates[name], rtol=1e-5, atol=1e-6)
