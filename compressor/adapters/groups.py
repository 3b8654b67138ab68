"""The tensors of an adapter by the module that they belong to, and by what they are of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from compressor.adapters.lycoris import Loha, Lokr, loha_of, lokr_of
from compressor.adapters.module import (
    REMEDY,
    AdapterModule,
    Factors,
    ModuleKind,
    Scale,
    Stored,
    lora_of,
    require_floats,
)
from compressor.adapters.names import ModuleName
from compressor.errors import BadInput
from compressor.io import Checkpoint

Role = Literal["down", "up", "mid", "alpha", "bias", "magnitude"]

# What the name of a tensor ends with, by what it is: of PEFT, kohya's scripts, and diffusers, the old and the new.
_ENDINGS: Mapping[str, Role] = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_embedding_A": "down",
    ".lora_embedding_B": "up",
    ".lora_B.bias": "bias",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".dora_scale": "magnitude",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
}
_LYCORIS = (".hada_", ".lokr_")


@dataclass
class Group:
    """The tensors of one module."""

    place: str
    roles: dict[Role, Stored] = field(default_factory=dict)
    lycoris: dict[str, Stored] = field(default_factory=dict)

    @property
    def beside(self) -> tuple[Stored, ...]:
        return tuple(stored for role, stored in self.roles.items() if role in ("bias", "magnitude"))

    @property
    def factors(self) -> tuple[Factors, tuple[int, int], tuple[int, ...]]:
        """How the update is stored, the sides of its matrix, and its kernel; `BadInput` where shapes do not fit."""
        if any(part.startswith("hada_") for part in self.lycoris):
            return loha_of(self.lycoris, self.place)
        if self.lycoris:
            return lokr_of(self.lycoris, self.place)
        return lora_of([self.roles.get(role) for role in ("down", "up", "mid")], self.place)

    def module(self, name: ModuleName, alpha: float | None = None, *, stabilized: bool = False) -> AdapterModule:
        """The module of this name, where `alpha` is not stored with it that one; with neither its scale is one."""
        factors, shape, kernel = self.factors
        require_floats((*factors.tensors, *self.beside))
        stored = self.roles.get("alpha")
        if stored is not None:
            alpha = _number(stored)
        if isinstance(factors, Lokr) and factors.whole:
            alpha = None  # two whole factors are never scaled
        rank = factors.scaled_by if isinstance(factors, Loha | Lokr) else factors.rank
        scaled = Scale() if alpha is None else Scale(alpha, math.sqrt(rank) if stabilized else rank)
        embedding = "down" in self.roles and self.roles["down"].name.endswith(".lora_embedding_A")
        kind: ModuleKind = "embedding" if embedding else "convolution" if kernel else "linear"
        return AdapterModule(name, self.place, kind, factors, shape, kernel, scaled, alpha=stored, beside=self.beside)


def grouped(checkpoint: Checkpoint) -> tuple[list[Group], list[Stored]]:
    """The tensors of a file by module, in the file's order, and those that are of none."""
    groups: dict[str, Group] = {}
    others = []
    for name in checkpoint.tensors:
        stored = Stored(name, checkpoint.stored(name))
        for place, role in _placed(name):
            groups.setdefault(place, Group(place)).roles[role] = stored
            break
        else:
            kind = next((kind for kind in _LYCORIS if kind in name), None)
            if kind is None:
                others.append(stored)
            else:
                place, _, part = name.rpartition(kind)
                groups.setdefault(place, Group(place)).lycoris[kind[1:] + part] = stored
    found = []
    for group in groups.values():
        if group.lycoris or group.roles.keys() & {"down", "up", "mid"}:
            found.append(group)
        else:  # the alpha of something else
            others += group.roles.values()
    return found, others


def _placed(name: str) -> Iterator[tuple[str, Role]]:
    """What the names of the module's tensors begin with, and what this one is of it."""
    for ending, role in _ENDINGS.items():
        if name.endswith(ending) and len(name) > len(ending):
            # The old names of diffusers have the layer in the ending: `processor.to_q_lora.down.weight`.
            kept = "_lora" if ending.startswith("_lora.") else ""
            yield name.removesuffix(ending) + kept, role


def _number(stored: Stored) -> float:
    if math.prod(stored.shape) != 1 or stored.tensor.dtype.is_complex:
        raise BadInput("is no single number", where=stored.name, remedy=REMEDY)
    if stored.tensor.dtype.is_floating_point:
        require_floats([stored])
    return float(stored.read().reshape(()).item())
