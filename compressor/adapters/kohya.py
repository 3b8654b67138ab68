"""Adapters in the names of kohya's scripts: one file, names without dots, and an alpha beside the factors.

Source: https://github.com/kohya-ss/sd-scripts (`networks/lora.py`), https://github.com/KohakuBlueleaf/LyCORIS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compressor.adapters.dialect import Description, FactorNames, WrittenModule
from compressor.adapters.groups import grouped
from compressor.adapters.module import Adapter, AdapterModule
from compressor.adapters.names import (
    ModuleName,
    from_original,
    part_of,
    to_original,
    with_dots,
)
from compressor.choices import AdapterDialect
from compressor.errors import BadInput
from compressor.io import Checkpoint

_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_te_": "text_encoder",
    "lora_transformer_": "transformer",
    "lycoris_": "unet",
}


def has_flat_names(places: Sequence[str]) -> bool:
    """Whether the names of modules begin as those of kohya's scripts do."""
    return any(place.startswith(tuple(_PREFIXES)) for place in places)


@dataclass(frozen=True)
class Kohya:
    """The dialect of kohya's scripts, which ComfyUI reads too."""

    name: AdapterDialect = "kohya"

    def read(self, checkpoint: Checkpoint) -> Adapter:
        groups, others = grouped(checkpoint)
        modules = tuple(group.module(_name(group.place)) for group in groups)
        return Adapter(checkpoint, self.name, modules, tuple(others))

    def names(self, module: AdapterModule, adapter: Adapter) -> FactorNames:
        place = module.place if adapter.dialect == "kohya" else self._place(module, adapter)
        return FactorNames(f"{place}.lora_down.weight", f"{place}.lora_up.weight", f"{place}.alpha")

    def described(self, adapter: Adapter, modules: Sequence[WrittenModule]) -> Description:
        metadata = {} if adapter.dialect != "kohya" else dict(adapter.checkpoint.metadata)
        # Digests of what the file held, and the one rank and alpha of all modules.
        metadata = {name: text for name, text in metadata.items() if not name.startswith("sshs_")}
        for name, values in (
            ("ss_network_dim", {each.rank for each in modules}),
            ("ss_network_alpha", {each.alpha for each in modules}),
        ):
            if name in metadata:
                metadata[name] = f"{values.pop():g}" if len(values) == 1 else "Dynamic"
        return Description(metadata)

    def _place(self, module: AdapterModule, adapter: Adapter) -> str:
        """What the names of a module begin with: of SDXL those of the original UNet, as kohya's scripts have them."""
        name = module.name
        prefix = {
            "text_encoder": "lora_te1_" if "text_encoder_2" in adapter.parts else "lora_te_",
            "diffusion_model": "lora_unet_",
        }.get(name.part)
        prefix = prefix or next((start for start, part in _PREFIXES.items() if part == name.part), None)
        if prefix is None:
            what = f"{name}: the names of kohya's scripts are of diffusion models and their text encoders"
            raise BadInput(what, where=adapter.checkpoint.source, option="to", remedy="export it with `to='peft'`")
        path = name.path
        if name.part == "unet" and adapter.is_of_sdxl:
            path = to_original(path, adapter.blocks_with_attention)
        return prefix + path.replace(".", "_")


def _name(place: str) -> ModuleName:
    """The name of a module as diffusers has it, where it is one of the models that are known."""
    prefix, part = next(((start, part) for start, part in _PREFIXES.items() if place.startswith(start)), ("", ""))
    flat = place.removeprefix(prefix)
    dotted = with_dots(flat)
    if dotted is None:
        return ModuleName(part, flat, dotted=False)
    if part == "unet":
        dotted = from_original(dotted)
        part = "transformer" if part_of([dotted]) == "transformer" else part
    return ModuleName(part, dotted)
