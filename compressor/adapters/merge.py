"""Several adapters of one base as one: the factors of a module side by side, so that nothing becomes dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from compressor.adapters.dialects import DIALECTS
from compressor.adapters.module import Adapter, AdapterModule, Scale, Stored, is_magnitude, require_small
from compressor.adapters.names import ModuleName
from compressor.errors import BadInput
from compressor.factorize import FactorPair, Product


@dataclass(frozen=True)
class Part:
    """What one adapter adds to a module, times a weight; `factor` is that and the scale, where it is multiplied in."""

    module: AdapterModule
    factor: float


@dataclass(frozen=True)
class Concatenated:
    """The sum of several updates, as the product of their factors side by side."""

    parts: tuple[Part, ...]

    @property
    def tensors(self) -> tuple[Stored, ...]:
        return tuple(each for part in self.parts for each in part.module.factors.tensors)

    @property
    def rank(self) -> int:
        return sum(part.module.factors.rank for part in self.parts)

    @property
    def is_pair(self) -> bool:
        return False

    @property
    def is_stored(self) -> bool:
        return False

    def read(self) -> Product:
        pairs = [part.module.factors.read().pair() for part in self.parts]
        ups = [pair.up.double() * part.factor for pair, part in zip(pairs, self.parts, strict=True)]
        return Product(FactorPair(torch.cat(ups, dim=1), torch.cat([pair.down.double() for pair in pairs])))


def merged_adapter(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """The weighted sum of some adapters, in the names of the first; nothing is read.

    Raises:
        BadInput: they are of different bases, or one of them has what cannot be added.
    """
    first = adapters[0]
    for adapter in adapters:
        _require_addable(adapter, first)
    places: dict[ModuleName, str] = {}
    parts: dict[ModuleName, list[tuple[AdapterModule, float]]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for module in adapter.modules:
            name = module.name.flat
            places.setdefault(name, _place(module, adapter, first))
            parts.setdefault(name, []).append((module, weight))
    modules = tuple(
        _merged(several, place=places[name], keeps_scale=first.dialect != "kohya") for name, several in parts.items()
    )
    return replace(first, modules=modules, config=_config(first, modules))


def _merged(several: Sequence[tuple[AdapterModule, float]], *, place: str, keeps_scale: bool) -> AdapterModule:
    """One module of some adapters, with the scale that all have where that can be kept, and else of scale one."""
    first = several[0][0]
    for module, _ in several[1:]:
        if (module.shape, module.kind, module.kernel) != (first.shape, first.kind, first.kernel):
            shapes = f"{first.shape[0]} x {first.shape[1]} and {module.shape[0]} x {module.shape[1]}"
            what = f"is of {shapes} in two of them, so they are not of one base"
            raise BadInput(what, where=str(first.name), option="models", remedy="merge adapters of one base")
    for module, _ in several:
        if not module.factors.is_pair:
            require_small(module.shape, module.factors.rank, str(module.name), remedy="merge it into its base")
    factors = [module.scale * weight for module, weight in several]
    common = keeps_scale and len(set(factors)) == 1 and factors[0] != 1.0
    scaled = Scale(first.scaled.alpha * several[0][1], first.scaled.over) if common else Scale()
    parts = tuple(Part(module, 1.0 if common else factor) for (module, _), factor in zip(several, factors, strict=True))
    return replace(first, place=place, factors=Concatenated(parts), scaled=scaled, alpha=None, beside=())


def _place(module: AdapterModule, adapter: Adapter, first: Adapter) -> str:
    """What the names of a module begin with in the names of the first adapter."""
    if adapter.dialect == first.dialect:
        return module.place
    names = DIALECTS[first.dialect].names(module, adapter)
    ends = (".lora_A.weight", ".lora_embedding_A", ".lora_down.weight")
    return next(names.down.removesuffix(end) for end in ends if names.down.endswith(end))


def _config(first: Adapter, modules: Sequence[AdapterModule]) -> dict[str, Any] | None:
    """The configuration of the first adapter, that takes in what others change beside."""
    if first.config is None or len(modules) == len(first.modules):
        return first.config
    limits = ("layers_to_transform", "layers_pattern", "exclude_modules")
    kept: Mapping[str, Any] = {name: value for name, value in first.config.items() if name not in limits}
    return {**kept, "target_modules": sorted(module.name.path for module in modules)}


def _require_addable(adapter: Adapter, first: Adapter) -> None:
    where = adapter.checkpoint.source
    base, other = ((each.config or {}).get("base_model_name_or_path") for each in (first, adapter))
    if base and other and base != other:
        what = f"is of the base {str(other)[:80]}, and the first of {str(base)[:80]}"
        raise BadInput(what, where=where, option="models", remedy="merge adapters of one base")
    # A model that is part of no pipeline beside one that is; the text encoder and the UNet of one may be merged.
    if "" in adapter.parts | first.parts and adapter.parts.isdisjoint(first.parts):
        own, of_first = (str(each.modules[0].name)[:60] for each in (adapter, first))
        what = f"changes {own}, and the first {of_first}, so they are not of one base"
        raise BadInput(what, where=where, option="models", remedy="merge adapters of one base")
    beside = [each.name for module in adapter.modules for each in module.beside]
    if beside or adapter.others:
        name = beside[0] if beside else adapter.others[0].name
        what = "is of DoRA, whose updates do not add" if is_magnitude(name) else f"holds {name[:80]} beside its factors"
        remedy = "merge each into the base, and compress the result with `base`"
        raise BadInput(what, where=where, option="models", remedy=remedy)
