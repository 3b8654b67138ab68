"""The `quantization_config` of compressed-tensors, by which transformers and vLLM load integers and scales.

Its format `pack-quantized` stores of a linear layer what `dense@..` does, under the same names. So a folder of such
layers and no others is a checkpoint of compressed-tensors, and loads without this package.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.errors import BadInput
from compressor.io import Checkpoint, StoredTensor, TensorInfo
from compressor.network import is_weight, layer_name
from compressor.quantize import Quantization

METHOD = "compressed-tensors"
PACKED = "pack-quantized"
# What stands beside a quantized `X.weight` besides `X.weight_packed`; those of activations say nothing of weights.
_BESIDE = (
    *("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
    *("input_scale", "input_zero_point", "output_scale", "output_zero_point"),
)
# Formats that keep an integer in a number of its own: an int8 `X.weight`.
UNPACKED = ("int-quantized", "naive-quantized")


def compressed_tensors_config(layers: Mapping[str, Quantization], ignored: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of a transformers model.

    Args:
        layers: How linear layers are quantized, by the names of their modules.
        ignored: The linear layers that are not, which vLLM wants to be told of.
    """
    targets: dict[Quantization, list[str]] = {}
    for name, quantization in layers.items():
        targets.setdefault(quantization, []).append(name)
    groups = {f"group_{index}": _scheme(each, targets[each]) for index, each in enumerate(targets)}
    return {
        "quant_method": METHOD,
        "format": PACKED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignored),
    }


def _scheme(quantization: Quantization, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": quantization.bits,
        "type": "int",
        "symmetric": not quantization.zero_points,
        "strategy": "channel" if quantization.group_size is None else "group",
        "group_size": quantization.group_size,
        "dynamic": False,
    }
    return {"targets": targets, "weights": weights, "format": PACKED}


def is_compressed_tensors(config: Mapping[str, Any] | None) -> bool:
    """Whether the `config.json` of a model says that compressed-tensors quantized it."""
    said = (config or {}).get("quantization_config")
    return isinstance(said, Mapping) and said.get("quant_method") == METHOD


def quantized_targets(document: Mapping[str, Any]) -> dict[str, Quantization]:
    """How the targets of a `quantization_config` are quantized: names of modules or classes, or `re:` and a pattern.

    Raises:
        ValueError: it quantizes in another way than to integers of 2 to 8 bits with scales.
    """
    groups = document.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError("it does not say which layers are quantized")
    formats = {document.get("format")} | {
        group.get("format") for group in groups.values() if isinstance(group, Mapping)
    }
    if strange := sorted(str(each) for each in formats - {None, "mixed-precision", PACKED, *UNPACKED}):
        raise ValueError(f"its format is {strange[0][:40]}")
    found: dict[str, Quantization] = {}
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        targets = group.get("targets") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping) or not isinstance(targets, list):
            raise ValueError("it does not say how its weights are quantized")
        quantization = _quantization(weights)
        found |= {str(target): quantization for target in targets if str(target) not in found}
    return found


def _quantization(weights: Mapping[str, Any]) -> Quantization:
    kind, strategy = weights.get("type", "int"), weights.get("strategy")
    size = weights.get("group_size")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if kind != "int" or strategy not in ("channel", "group", "tensor"):
        raise ValueError(f"its weights are {str(kind)[:40]} by {str(strategy)[:40]}")
    group_size = size if strategy == "group" else None
    symmetric = weights.get("symmetric", True)
    fields = {"bits": weights.get("num_bits", 8), "group_size": group_size, "zero_points": not symmetric}
    return Quantization.from_dict(fields)


@dataclass(frozen=True, eq=False)
class UnpackedTensor:
    """A weight that is stored as an int8 each, with scales; dequantized whenever it is read."""

    layer: str
    integers: StoredTensor
    scale: StoredTensor
    zero_point: StoredTensor | None
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.integers.shape

    @property
    def region(self) -> Hashable:
        return self

    def read(self) -> Tensor:
        rows = 1 if math.prod(self.scale.shape) == 1 else self.shape[0]
        scale = self.scale.read().to(torch.float64).reshape(rows, -1, 1)
        numbers = self.integers.read().to(torch.float64).reshape(self.shape[0], scale.shape[1], -1)
        if self.zero_point is not None:
            numbers -= self.zero_point.read().to(torch.float64).reshape(scale.shape)
        dense: Tensor = (numbers * scale).flatten(1).to(self.dtype)
        return dense


def dequantized_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with dense weights where compressed-tensors stored an int8 for each number; nothing is read yet.

    Weights that are packed stay so. Raises `BadInput` where scales do not fit.
    """
    if not is_compressed_tensors(checkpoint.config):
        return checkpoint
    changed: dict[str, StoredTensor | None] = {}
    for name, info in checkpoint.tensors.items():
        if not is_weight(name) or len(info.shape) != 2 or f"{name}_scale" not in checkpoint.tensors:
            continue
        if info.dtype == torch.int8:
            changed[name] = _unpacked(checkpoint, info)
        if info.dtype == torch.int8 or info.dtype.itemsize > 1:  # else of 8-bit floats, which are refused elsewhere
            beside = (name.removesuffix("weight") + each for each in _BESIDE)
            changed |= dict.fromkeys(each for each in beside if each in checkpoint.tensors)
    return checkpoint.changed(changed) if changed else checkpoint


def _unpacked(checkpoint: Checkpoint, weight: TensorInfo) -> UnpackedTensor:
    scale, zero_point = (checkpoint.tensors.get(f"{weight.name}{end}") for end in ("_scale", "_zero_point"))
    assert scale is not None
    rows, columns = weight.shape
    of_groups = (
        len(scale.shape) == 2 and scale.shape[0] == rows and scale.shape[1] > 0 and columns % scale.shape[1] == 0
    )
    fits = scale.dtype.is_floating_point and (scale.shape in ((), (1,), (rows,)) or of_groups)
    if not fits or (zero_point is not None and zero_point.shape != scale.shape):
        what = f"the scales of {weight.name} do not fit it"
        raise BadInput(what, where=checkpoint.source, remedy="give the original")
    said = (checkpoint.config or {}).get("dtype") or (checkpoint.config or {}).get("torch_dtype")
    dtype = getattr(torch, str(said), None)
    return UnpackedTensor(
        layer_name(weight.name),
        checkpoint.stored(weight.name),
        checkpoint.stored(scale.name),
        None if zero_point is None else checkpoint.stored(zero_point.name),
        dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else scale.dtype,
    )
