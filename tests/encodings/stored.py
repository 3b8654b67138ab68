"""Tiny models as others store them, each with the tensors that its stored ones stand for.

The tensors are computed here, number by number where that is simple, and not by the package.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

Stored = tuple[dict[str, Tensor], Tensor]
"""What is stored of a matrix, by the ends of names, and what it stands for."""
Quantize = Callable[[Tensor], Stored]

SIZES = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


def llama(**said: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | said))


def qwen3_moe(**said: Any) -> Any:
    sizes = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES | sizes | said))


def deepseek_v3() -> Any:
    config = transformers.DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 4},
        **{"moe_intermediate_size": 48, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
        **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 24},
        **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16},
    )
    return transformers.DeepseekV3ForCausalLM(config)


def gpt_oss() -> Any:
    sizes = {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}
    said = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    config = transformers.GptOssConfig(**SIZES | sizes | said, rope_parameters={"rope_type": "default"})
    return transformers.GptOssForCausalLM(config)


def dense_folder(folder: Path, model: Any, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Save a model of random weights; return the tensors of its file."""
    torch.manual_seed(1)
    with torch.no_grad():
        for each in model.parameters():
            if each.dim() > 1:
                each.normal_(std=0.08)
    model.to(dtype).eval().save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def is_linear(name: str) -> bool:
    return re.search(r"(_proj|_proj_with_mqa|_[ab]_proj|gate_up_proj)\.weight$", name) is not None


def store(
    folder: Path, quantize: Quantize, said: Mapping[str, Any], *, where: Callable[[str], bool] = is_linear
) -> Path:
    """Quantize the matrices of a folder, in place: `NAME.weight` becomes the tensors that stand for it.

    Returns a folder of what they stand for.
    """
    tensors = load_file(folder / "model.safetensors")
    stored, dense = {}, {}
    for name, tensor in tensors.items():
        if not where(name):
            stored[name] = dense[name] = tensor
            continue
        parts, values = quantize(tensor.to(torch.float32))
        stored |= {f"{name.removesuffix('weight')}{end}": part.contiguous() for end, part in parts.items()}
        dense[name] = values.to(tensor.dtype).contiguous()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": dict(said)}))
    twin = folder.with_name(f"{folder.name}-means")
    twin.mkdir()
    save_file(dense, twin / "model.safetensors", metadata={"format": "pt"})
    (twin / "config.json").write_text(json.dumps(config))
    return twin


def float8_blocks(matrix: Tensor, side: int = 32, dtype: torch.dtype = torch.float8_e4m3fn) -> Stored:
    """Blocks of `side x side` of eight-bit floats, those at the edges smaller."""
    rows, columns = matrix.shape
    values = torch.zeros(matrix.shape).to(dtype)
    scales = torch.zeros(-(-rows // side), -(-columns // side))
    means = torch.zeros(matrix.shape)
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            part = slice(row * side, (row + 1) * side), slice(column * side, (column + 1) * side)
            scales[row, column] = matrix[part].abs().max() / torch.finfo(dtype).max
            values[part] = (matrix[part] / scales[row, column]).to(dtype)
            means[part] = values[part].to(torch.float32) * scales[row, column]
    return {"weight": values, "weight_scale_inv": scales}, means


def float8_rows(matrix: Tensor) -> Stored:
    scale = matrix.abs().amax(1, keepdim=True) / 448
    values = (matrix / scale).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale": scale}, values.to(torch.float32) * scale


def float8_tensor(matrix: Tensor) -> Stored:
    scale = matrix.abs().max() / torch.finfo(torch.float8_e5m2).max
    values = (matrix / scale).to(torch.float8_e5m2)
    return {"weight": values, "weight_scale": scale, "input_scale": torch.ones(())}, values.to(torch.float32) * scale


FLOAT8_BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
FLOAT8 = {"quant_method": "fp8", "activation_scheme": "static"}


def is_experts(name: str) -> bool:
    return re.search(r"experts\.(gate_up|down)_proj$", name) is not None


def mxfp4(experts: Tensor) -> Stored:
    """As gpt-oss stores `experts x inputs x outputs`: 32 inputs of an output share a power of two."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([values, -values])
    grouped = experts.transpose(1, 2).unflatten(2, (-1, 32))
    exponents = (grouped.abs().amax(-1).log2() - 2).floor()
    scaled = grouped / exponents.exp2().unsqueeze(-1)
    nearest = (scaled.unsqueeze(-1) - values).abs().argmin(-1)
    means = (values[nearest] * exponents.exp2().unsqueeze(-1)).flatten(2).transpose(1, 2)
    blocks = (nearest[..., ::2] + 16 * nearest[..., 1::2]).to(torch.uint8)
    return {"_blocks": blocks, "_scales": (exponents + 127).to(torch.uint8)}, means


MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def packed(numbers: list[int], bits: int) -> list[int]:
    """Numbers one after the other in words of 32 bits, the lowest bit first, as signed integers."""
    stream = sum(number << (place * bits) for place, number in enumerate(numbers))
    words = [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(-(-len(numbers) * bits // 32))]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


def _rounded(matrix: Tensor, group: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Integers of each number, scales and zero points of each output and group, and what they stand for."""
    rows, inputs = matrix.shape
    groups = int(group.max()) + 1
    scales, zeros = torch.zeros(rows, groups), torch.zeros(rows, groups, dtype=torch.int64)
    integers, means = torch.zeros(rows, inputs, dtype=torch.int64), torch.zeros(rows, inputs)
    for place in range(groups):
        own = matrix[:, group == place]
        low, high = own.amin(1).clamp(max=0), own.amax(1).clamp(min=0)
        scales[:, place] = ((high - low) / (2**bits - 1)).to(torch.float16).to(torch.float32)
        zeros[:, place] = (-low / scales[:, place]).round().clamp(1, 2**bits - 1)
    for column in range(inputs):
        scale, zero = scales[:, group[column]], zeros[:, group[column]]
        integers[:, column] = (matrix[:, column] / scale + zero).round().clamp(0, 2**bits - 1)
        means[:, column] = scale * (integers[:, column] - zero)
    return integers, scales, zeros, means


def gptq(bits: int = 4, size: int = 32, version: int = 1, *, ordered: bool = False) -> Quantize:
    """As GPTQ's tools store a matrix; `ordered` puts inputs into groups in an order of their own."""

    def stored(matrix: Tensor) -> Stored:
        rows, inputs = matrix.shape
        group = torch.arange(inputs) // size
        if ordered:
            group = group[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
        integers, scales, zeros, means = _rounded(matrix, group, bits)
        less = zeros - (1 if version == 1 else 0)
        parts = {
            "qweight": torch.tensor([packed(integers[row].tolist(), bits) for row in range(rows)]).T.int(),
            "qzeros": torch.tensor([packed(less[:, place].tolist(), bits) for place in range(scales.shape[1])]).int(),
            "scales": scales.T.to(torch.float16),
            "g_idx": group.int(),
        }
        return parts, means

    return stored


def awq(size: int = 32) -> Quantize:
    """As AWQ stores a matrix of four bits: the eight columns of a word are 0, 2, 4, 6, 1, 3, 5, 7 of them."""

    def stored(matrix: Tensor) -> Stored:
        _, inputs = matrix.shape
        integers, scales, zeros, means = _rounded(matrix, torch.arange(inputs) // size, 4)

        def words(row: list[int]) -> list[int]:
            return [
                word
                for start in range(0, len(row), 8)
                for word in packed([row[start + place] for place in (0, 2, 4, 6, 1, 3, 5, 7)], 4)
            ]

        parts = {
            "qweight": torch.tensor([words(column) for column in integers.T.tolist()]).int(),
            "qzeros": torch.tensor([words(column) for column in zeros.T.tolist()]).int(),
            "scales": scales.T.to(torch.float16),
        }
        return parts, means

    return stored


def compressed_tensors(scheme: Mapping[str, Any], method: str = "pack-quantized") -> Quantize:
    """As compressed-tensors itself stores a matrix."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    weights = QuantizationArgs(**scheme)
    parsed = QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = BaseCompressor.get_value_from_registry(method)

    def stored(matrix: Tensor) -> Stored:
        size = scheme.get("group_size") or matrix.shape[1]
        own = matrix.unflatten(1, (-1, size))
        scale, zero = calculate_qparams(own.amin(2), own.amax(2), weights)
        state = {"weight": matrix, "weight_scale": scale, "weight_zero_point": zero}
        parts = dict(compressor.compress(state, parsed))
        return parts, compressor.decompress(parts, parsed)["weight"]

    return stored


def gptq_config(bits: int = 4, size: int = 32, version: int = 1) -> dict[str, Any]:
    named = "gptq" if version == 1 else "gptq_v2"
    return {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": False, "checkpoint_format": named}


def compressed_tensors_config(scheme: Mapping[str, Any], method: str = "pack-quantized") -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": dict(scheme), "format": method}}
    said = {"quant_method": "compressed-tensors", "format": method, "quantization_status": "compressed"}
    return said | {"config_groups": groups, "ignore": ["lm_head"]}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
FOUR_BITS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
EIGHT_BITS = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
