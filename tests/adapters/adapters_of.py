"""Small random adapters in every dialect, and what they add, by their own definitions: an independent reader."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

# Flat and dotted names of the modules of a UNet, with their inputs, outputs, and kernels.
MODULES = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (24, 32, ()),
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj": (24, 40, ()),
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0": (32, 24, ()),
    "down_blocks.0.resnets.1.conv1": (10, 12, (3, 3)),
    "up_blocks.1.attentions.2.proj_in": (20, 20, (1, 1)),
}


def factors(d_in: int, d_out: int, kernel: tuple[int, ...], *, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A down and an up factor whose singular values fall."""
    falling = torch.logspace(0, -d_out / 20, rank)  # of its own in every module
    down = torch.randn(rank, d_in, *kernel) / math.sqrt(d_in)
    up = torch.randn(d_out, rank) * falling
    return down.to(dtype), up.reshape(d_out, rank, *(1 for _ in kernel)).to(dtype)


def kohya_file(path: Path, *, rank: int = 8, alpha: float | None = 3.0, dtype: torch.dtype = torch.float16) -> Path:
    """A file in the names of kohya's scripts."""
    tensors = {}
    for name, (d_in, d_out, kernel) in MODULES.items():
        place = "lora_unet_" + name.replace(".", "_")
        tensors[f"{place}.lora_down.weight"], tensors[f"{place}.lora_up.weight"] = factors(
            d_in, d_out, kernel, rank=rank, dtype=dtype
        )
        if alpha is not None:
            tensors[f"{place}.alpha"] = torch.tensor(alpha, dtype=dtype)
    save_file(tensors, path, {"ss_network_dim": str(rank), "ss_network_alpha": str(alpha)})
    return path


def diffusers_file(path: Path, *, rank: int = 8, ends: tuple[str, str] = ("lora_A", "lora_B")) -> Path:
    """A file in the names of diffusers, of scale one."""
    tensors = {}
    for name, (d_in, d_out, kernel) in MODULES.items():
        down, up = factors(d_in, d_out, kernel, rank=rank, dtype=torch.float32)
        tensors[f"unet.{name}.{ends[0]}.weight"], tensors[f"unet.{name}.{ends[1]}.weight"] = down, up
    save_file(tensors, path, {"format": "pt"})
    return path


def peft_folder(path: Path, config: Mapping[str, Any] | None = None, *, rank: int = 8) -> Path:
    """A folder as PEFT writes it."""
    path.mkdir()
    tensors = {}
    for name, (d_in, d_out, kernel) in MODULES.items():
        down, up = factors(d_in, d_out, kernel, rank=rank, dtype=torch.float32)
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    stated = {"peft_type": "LORA", "r": rank, "lora_alpha": 12, "target_modules": list(MODULES)} | dict(config or {})
    (path / "adapter_config.json").write_text(json.dumps(stated))
    return path


def tensors_in(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, as the official library reads them."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping


def kohya_updates(path: Path) -> dict[str, Tensor]:
    """What a file of kohya's scripts adds to each module, in float64: `alpha / rank * up @ down`."""
    tensors = {name: each.double() for name, each in tensors_in(path).items()}
    found = {}
    for name, down in tensors.items():
        if not name.endswith(".lora_down.weight"):
            continue
        place = name.removesuffix(".lora_down.weight")
        up = tensors[f"{place}.lora_up.weight"]
        alpha = float(tensors.get(f"{place}.alpha", torch.tensor(len(down))))
        found[place] = alpha / len(down) * (up.flatten(1) @ down.flatten(1))
    return found


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank, by LAPACK."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]
