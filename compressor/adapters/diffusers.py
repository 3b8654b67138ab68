"""Adapters in the names of diffusers: one file, and the part of the pipeline before each name.

Their scale is one, unless the header of the file holds the configuration of PEFT, which diffusers writes and
reads, or an alpha lies beside the factors. Names of other tools with dots, such as `diffusion_model.`, are read too.
Source: https://github.com/huggingface/diffusers (`loaders/lora_base.py`, `utils/peft_utils.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compressor.adapters.dialect import Description, FactorNames, WrittenModule
from compressor.adapters.groups import grouped
from compressor.adapters.module import Adapter, AdapterModule, Lora
from compressor.adapters.names import ModuleName, is_of_diffusers, part_of
from compressor.adapters.peft import Scaling, lora_ranks
from compressor.choices import AdapterDialect
from compressor.documents import bounded_json
from compressor.errors import BadInput
from compressor.io import Checkpoint

METADATA = "lora_adapter_metadata"
_PARTS = re.compile(r"(unet|transformer(_2)?|text_encoder(_\d)?|diffusion_model|prior|controlnet)\.(.+)")
# Attention layers of the old names: `attn1.processor.to_q_lora`.
_PROCESSOR = re.compile(r"(.*)\.processor\.(to_q|to_k|to_v|to_out)_lora")


@dataclass(frozen=True)
class Diffusers:
    """The dialect of diffusers."""

    name: AdapterDialect = "diffusers"

    def read(self, checkpoint: Checkpoint) -> Adapter:
        groups, others = grouped(checkpoint)
        names = {group.place: _name(group.place) for group in groups}
        if all(not name.part for name in names.values()):
            part = part_of([name.path for name in names.values()])
            names = {place: ModuleName(part, name.path) for place, name in names.items()}
        scaled = {part: Scaling.of(config, checkpoint.source) for part, config in _configurations(checkpoint).items()}
        modules = tuple(
            scaled[name.part].module(group, name) if name.part in scaled else group.module(name)
            for group in groups
            for name in (names[group.place],)
        )
        return Adapter(checkpoint, self.name, modules, tuple(others))

    def names(self, module: AdapterModule, adapter: Adapter) -> FactorNames:
        if adapter.dialect == "diffusers":
            alpha = None if module.alpha is None else module.alpha.name
            if not isinstance(module.factors, Lora):
                return FactorNames(f"{module.place}.lora_A.weight", f"{module.place}.lora_B.weight", alpha)
            return FactorNames(module.factors.down.name, module.factors.up.name, alpha)
        if not is_of_diffusers(module.name):
            what = f"{str(module.name)[:80]} is no name that diffusers has"
            raise BadInput(
                what, where=adapter.checkpoint.source, option="to", remedy="leave it in the names that it has"
            )
        return FactorNames(f"{module.name}.lora_A.weight", f"{module.name}.lora_B.weight")

    def described(self, adapter: Adapter, modules: Sequence[WrittenModule]) -> Description:
        kept = dict(adapter.checkpoint.metadata) if adapter.dialect == "diffusers" else {"format": "pt"}
        known = _configurations(adapter.checkpoint) if adapter.dialect == "diffusers" else {}
        # An alpha beside the factors goes along in files that have it there.
        unstated = [each for each in modules if each.module.alpha is None or adapter.dialect != "diffusers"]
        of_parts = dict[str, Any]()
        for part in sorted({each.module.name.part for each in unstated}):
            of_part = [each for each in unstated if each.module.name.part == part]
            if part not in known and adapter.dialect == "diffusers" and all(e.module.scale == 1 for e in of_part):
                continue
            ranks = {each.module.name.path: each.rank for each in of_part}
            alphas = {each.module.name.path: each.module.scaled.alpha_at(each.rank) for each in of_part}
            config = {"target_modules": sorted(ranks), **known.get(part, {}), **lora_ranks(ranks, alphas)}
            of_parts |= {f"{part}.{name}": value for name, value in (config | {"use_rslora": False}).items()}
        if of_parts:
            kept[METADATA] = json.dumps(of_parts, indent=2, sort_keys=True)
        return Description(kept)


def _name(place: str) -> ModuleName:
    if (old := _PROCESSOR.fullmatch(place)) is not None:
        place = f"{old[1]}.{old[2]}" + (".0" if old[2] == "to_out" else "")
    found = _PARTS.fullmatch(place)
    return ModuleName("", place) if found is None else ModuleName(found[1], found[4])


def _configurations(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """The configurations of PEFT in the header, by the part of the pipeline."""
    text = checkpoint.metadata.get(METADATA)
    if text is None:
        return {}
    try:
        stated = bounded_json(text)
        if not isinstance(stated, dict):
            raise ValueError("no mapping")
    except (ValueError, RecursionError):
        what = f"has {METADATA} in its header that is no JSON object"
        raise BadInput(what, where=checkpoint.source, remedy="save the adapter again with diffusers") from None
    found: dict[str, dict[str, Any]] = {}
    for key, value in stated.items():
        part, _, name = key.partition(".")
        found.setdefault(part, {})[name] = value
    return found
