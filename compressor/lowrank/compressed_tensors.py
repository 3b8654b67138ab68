"""The `quantization_config` of compressed-tensors, by which transformers and vLLM load integers and scales.

Its format `pack-quantized` stores of a linear layer what `dense@..` does, under the same names. So a folder of such
layers and no others is a checkpoint of compressed-tensors, and loads without this package.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from compressor.quantize import Quantization

METHOD = "compressed-tensors"
PACKED = "pack-quantized"
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
