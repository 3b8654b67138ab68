"""An adapter on its base, seen as the fine-tune that the two make: a changed weight is formed when it is read."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressor.adapters.module import Adapter, AdapterModule
from compressor.errors import BadInput
from compressor.formatting import format_shape
from compressor.forms import TRANSPOSED
from compressor.io import StoredTensor, require_finite
from compressor.model import Model
from compressor.network import Layer
from compressor.recipe import TrainingRecipe
from compressor.torch_state import in_float64

_ALONE = "resize it by its factors alone: leave out `base`, `calibration`, and `max_drop`"


@dataclass(frozen=True, eq=False)
class AppliedTensor:
    """`weight + scale * up @ down`, in float32; the dtype is that of the factors, in which others will be stored."""

    weight: StoredTensor
    module: AdapterModule
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype

    @property
    def region(self) -> Hashable:
        return id(self)

    def read(self) -> Tensor:
        pair = self.module.factors.read().pair()
        update = in_float64(pair.up) @ in_float64(pair.down) * self.module.scale
        weight = self.weight.read()
        require_finite(str(self.module.name), weight)
        update = update.T if self.transposed else update
        return (in_float64(weight) + update.reshape(self.shape)).float().contiguous()


@dataclass(frozen=True)
class AppliedAdapter:
    """An adapter on its base.

    Attributes:
        adapter: The adapter.
        model: The base with its updates.
        modules: The modules by the names of the layers that they change.
    """

    adapter: Adapter
    model: Model
    modules: dict[str, AdapterModule]

    @property
    def numbers(self) -> int:
        """How many numbers the factors of all modules take."""
        return sum(module.numbers for module in self.modules.values())


def applied_adapter(adapter: Adapter, base: Model) -> AppliedAdapter:
    """The fine-tune that an adapter and its base make; nothing is read yet.

    Raises:
        BadInput: it holds more than factors of matrices, or is of another base.
    """
    source, checkpoint = adapter.checkpoint.source, base.checkpoint
    if adapter.dialect != "peft":
        what = f"has the names of {adapter.dialect}, and on a base those of PEFT are read"
        raise BadInput(what, where=source, remedy="write it in these first: 'compress export ADAPTER --to peft'")
    beside = [each for module in adapter.modules for each in module.beside] + [*adapter.others]
    if beside:
        raise BadInput(f"holds {beside[0].name} beside its factors", where=source, remedy=_ALONE)
    layers = {layer.module: layer for layer in base.layers}
    modules: dict[str, AdapterModule] = {}
    tensors: dict[str, AppliedTensor] = {}
    for module in adapter.modules:
        layer = _changed_layer(module, layers.get(module.name.path), adapter, base=base)
        modules[layer.name] = module
        transposed = layer.kind in TRANSPOSED
        tensors[layer.tensor] = AppliedTensor(checkpoint.stored(layer.tensor), module, transposed)
    # It runs by what lies in the folder of its base, and all else about it is said of the adapter.
    applied = replace(
        checkpoint.changed(tensors), source=adapter.checkpoint.directory, files=adapter.checkpoint.files, left_out=()
    )
    model = base.with_tensors(applied, adapter.checkpoint.name, tensors)
    return AppliedAdapter(adapter, replace(model, _find_recipe=TrainingRecipe), modules)


def _changed_layer(module: AdapterModule, layer: Layer | None, adapter: Adapter, *, base: Model) -> Layer:
    """The layer that a module changes; `BadInput` where the base has no such one, or it can have no pair."""
    source, name = adapter.checkpoint.source, module.name
    if layer is None or layer.shape != module.shape:
        shape = format_shape(module.shape)
        what = f"changes {name}, {shape}, and its base has " + (
            "no such layer" if layer is None else f"{format_shape(layer.shape)} there"
        )
        raise BadInput(what, where=source, option="base", remedy="give the model that it was trained on")
    if layer.is_tied or not layer.eligible:
        why = layer.skip or "it is in several places of the model"
        raise BadInput(f"changes {name}, which gets no pair on a base: {why}", where=source, remedy=_ALONE)
    if module.rank * sum(module.shape) >= layer.parameters:
        what = f"takes as many numbers for {name}, at rank {module.rank}, as its weight"
        raise BadInput(what, where=source, remedy=_ALONE)
    return layer
