"""Concatenated networks: a file whose layers are wider than those of the architecture of its parts."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from compressor.documents import parse_json
from compressor.errors import BadInput
from compressor.io import Checkpoint
from compressor.lowrank.stored_pairs import join, stored_pairs
from compressor.lowrank.tensor_format import dense_infos

# Under this key a merged file says in its metadata which networks it was made from, and how.
MERGE_KEY = "merge"


def merge_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """The record in the metadata of a merged file; {} if there is none that can be read."""
    with suppress(BadInput):
        record = parse_json(checkpoint.metadata.get(MERGE_KEY, "{}"), where=checkpoint.name)
        if isinstance(record, dict):
            return record
    return {}


def widened(module: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """The module, changed in place: its linear layers, convolutions and batch normalizations as wide as in the file.

    The new tensors have no values yet. A module is left as it is unless the file says that it holds concatenated
    networks.
    """
    if merge_record(checkpoint).get("mode") != "concat":
        return module
    pairs = stored_pairs(checkpoint)
    shapes = {name: info.shape for name, (info, _) in dense_infos(checkpoint, pairs).items()}
    for name, layer in module.named_modules():
        tensors = dict(layer.named_parameters(recurse=False)) | dict(layer.named_buffers(recurse=False))
        wider = {}
        for own, tensor in tensors.items():
            shape = shapes.get(join(name, own), tuple(tensor.shape))
            if shape != tuple(tensor.shape) and len(shape) == tensor.ndim and shape[2:] == tuple(tensor.shape[2:]):
                wider[own] = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
        if wider:
            _set_sizes(layer, wider)
    return module


def _set_sizes(layer: nn.Module, wider: dict[str, Tensor]) -> None:
    sides = ("out_channels", "in_channels") if hasattr(layer, "out_channels") else ("out_features", "in_features")
    for name, tensor in wider.items():
        old = getattr(layer, name)
        setattr(layer, name, nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor)
        if tensor.ndim >= 2:
            for side, size in zip(sides, tensor.shape, strict=False):
                setattr(layer, side, size)
        elif hasattr(layer, "num_features"):
            setattr(layer, "num_features", tensor.shape[0])  # noqa: B010 - no attribute that the type knows
