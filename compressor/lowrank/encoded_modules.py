"""Modules of transformers whose weights a source's tensors stand for: they hold these until they are filled."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressor.encodings import EncodedTensor, StoredTensors, encoded_tensors
from compressor.io import StoredTensor, TensorInMemory
from compressor.io.safetensors_file import read_safetensors
from compressor.lowrank.sources import own_layers
from compressor.network.conversions import name_conversions, name_in_model, without_merges


@dataclass(frozen=True)
class PutEncoded:
    """A module that waits for a weight, with the stored tensors of which it is decoded as its buffers."""

    module: nn.Module
    parameter: str
    encoded: EncodedTensor
    held: tuple[str, ...]

    def fill(self) -> None:
        """Decode the weight from what the module was filled with."""
        tensors = dict(self.module.named_buffers(recurse=False)) | dict(self.module.named_parameters(recurse=False))
        parts = [
            replace(part, stored=TensorInMemory(tensors[own]))
            for part, own in zip(self.encoded.parts, self.held, strict=False)
        ]
        device = tensors[self.held[0]].device
        weight = replace(self.encoded, parts=tuple(parts)).read().to(device)
        for own in self.held:
            self.module._buffers.pop(own, None)
            self.module._parameters.pop(own, None)
        self.module.register_parameter(self.parameter, nn.Parameter(weight))


def encoded_in_files(
    files: Sequence[str], said: Mapping[str, Any], dtype: torch.dtype, *, left: Collection[str]
) -> dict[str, EncodedTensor]:
    """The tensors of safetensors files that others stand for, but for layers of our own, which are `left`."""
    stored: dict[str, StoredTensor] = {}
    own = set(left)
    for file in files:
        if str(file).endswith(".safetensors"):
            tensors, metadata = read_safetensors(Path(file))
            stored |= tensors
            own |= own_layers(metadata)  # by their names in the file, which need not be those of the modules
    with torch.device("cpu"):  # not on the device that the model is built on
        return encoded_tensors(StoredTensors(stored, said, dtype), left=own)


def put_encoded(model: Any, encoded: Mapping[str, EncodedTensor]) -> list[PutEncoded]:
    """Have the modules of a model that is about to be filled hold what is stored for their weights.

    A weight that the model has no place for, such as that of a layer that is another one now, is left out.
    """
    known = dict(model.state_dict())
    conversions = without_merges(name_conversions(model), known)
    put = []
    for name, each in encoded.items():
        own = name_in_model(name, conversions, model.base_model_prefix, names=known)
        if own is None:
            continue
        place, _, parameter = own.rpartition(".")
        module, layer = model.get_submodule(place), name.rpartition(".")[0]
        held = tuple(part.name.removeprefix(f"{layer}.") for part in each.stored)
        module._parameters.pop(parameter)
        for part, buffer in zip(each.stored, held, strict=True):
            empty = torch.empty(part.stored.shape, dtype=part.stored.dtype, device="meta")
            module.register_buffer(buffer, empty)
        module._is_hf_initialized = True
        put.append(PutEncoded(module, parameter, each, held))
    return put
