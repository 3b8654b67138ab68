"""A checkpoint as the tensors that its stored ones stand for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from compressor.encodings.encoded import EncodedTensor, StoredTensors
from compressor.encodings.float8 import scaled_floats
from compressor.encodings.integers import PackedIntegers, compressed_tensors, gptq_and_awq
from compressor.encodings.mxfp4 import mxfp4
from compressor.io import Checkpoint, StoredTensor

_READERS = (scaled_floats, gptq_and_awq, compressed_tensors, mxfp4)


def encoded_tensors(file: StoredTensors, *, left: Collection[str] = ()) -> dict[str, EncodedTensor]:
    """The tensors that others stand for, by name; those of the layers that are `left` are not looked for.

    Only shapes and dtypes are read, and all of them are checked against each other.

    Raises:
        BadInput: parts are missing, or do not fit together.
    """
    # What stands for a layer is below its name, or below that of a factor of it.
    others = {name: tensor for name, tensor in file.tensors.items() if not _owners(name) & frozenset(left)}
    found = (each for reader in _READERS for each in reader(replace(file, tensors=others)))
    return {each.name: each for each in found}


def _owners(tensor: str) -> frozenset[str]:
    layer = tensor.rpartition(".")[0]
    return frozenset({layer, layer.rpartition(".")[0]})


def decoded(
    checkpoint: Checkpoint, said: Mapping[str, Any], *, left: Collection[str] = (), packed: bool = False
) -> Checkpoint:
    """The checkpoint with the tensors that its stored ones stand for in their place; nothing is read yet.

    Args:
        checkpoint: As it is stored.
        said: The `quantization_config` that describes it; {} without one.
        left: Layers whose tensors stay as they are stored.
        packed: Leave the packed integers of compressed-tensors too, unless their groups are of inputs in another order.

    Raises:
        BadInput: parts are missing, or do not fit together.
    """
    stored = {name: checkpoint.stored(name) for name in checkpoint.tensors}
    file = StoredTensors(stored, said, model_dtype(checkpoint), checkpoint.source)
    changed: dict[str, StoredTensor | None] = {}
    for name, each in encoded_tensors(file, left=left).items():
        if packed and isinstance(each.decoder, PackedIntegers) and not each.decoder.ordered:
            continue
        changed |= dict.fromkeys(part.name for part in each.stored)
        changed[name] = each
    return checkpoint.changed(changed) if changed else checkpoint


def encoded_in(checkpoint: Checkpoint, name: str) -> EncodedTensor | None:
    """How a tensor of a checkpoint is stored, where others stand for it; else None."""
    stored = checkpoint.stored(name)
    return stored if isinstance(stored, EncodedTensor) else None


def encoded_names(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The tensors of a checkpoint that others stand for."""
    names = dict.fromkeys((*checkpoint.tensors, *checkpoint.wholes))
    return tuple(name for name in names if encoded_in(checkpoint, name) is not None)


def model_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of a model that is stored in other numbers: what its configuration says, else that of most others."""
    config = checkpoint.config or {}
    text = config.get("text_config")
    for said in (config, text if isinstance(text, Mapping) else {}):
        dtype = getattr(torch, str(said.get("dtype") or said.get("torch_dtype")), None)
        if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
            return dtype
    numbers: dict[torch.dtype, int] = {}
    for name, info in checkpoint.tensors.items():
        if info.dtype in (torch.float16, torch.bfloat16, torch.float32) and "scale" not in name.rpartition(".")[2]:
            numbers[info.dtype] = numbers.get(info.dtype, 0) + info.elements
    return max(numbers, key=numbers.__getitem__) if numbers else torch.bfloat16
