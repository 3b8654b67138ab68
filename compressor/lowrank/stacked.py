"""Layers that the original held in one tensor, such as those of all experts of a block, and a model has apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from compressor.io import Checkpoint, Stack, TensorInfo
from compressor.lowrank.stored_pairs import config_spec, damaged, spec_of


def stacks_of(checkpoint: Checkpoint) -> tuple[Stack, ...]:
    """The tensors of the original that held several layers which a compressed model has apart, as it says."""
    return spec_of(checkpoint).stacks or config_spec(checkpoint).stacks


def put_together_infos(
    checkpoint: Checkpoint, parts: Mapping[str, TensorInfo], stacks: Sequence[Stack]
) -> dict[str, TensorInfo]:
    """Name, shape and dtype of the tensors of the original: its own in the places of the parts of each.

    Raises `BadInput` where parts are missing or do not fit together.
    """
    shapes = {name: info.shape for name, info in parts.items()}
    wholes: dict[str, TensorInfo] = {}
    for stack in stacks:
        shape = stack.shape(shapes)
        names = [] if shape is None else stack.names()
        dtypes = {parts[name].dtype for name in names}
        if shape is None or len(dtypes) != 1 or stack.tensor in parts:
            raise damaged(f"the layers of {stack.tensor} do not fit together", checkpoint)
        wholes |= dict.fromkeys(names, TensorInfo(stack.tensor, shape, dtypes.pop()))
    return {each.name: each for each in (wholes.get(name, info) for name, info in parts.items())}


def put_together(stack: Stack, info: TensorInfo, read: Callable[[str], Tensor]) -> Tensor:
    """The tensor of the original that held some layers, which are read one at a time."""
    whole = torch.empty(info.shape, dtype=info.dtype)
    for name, view in stack.views(whole).items():
        view.copy_(read(name))
    return whole
