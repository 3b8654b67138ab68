"""Adapters, such as LoRA's factors, recognized by the names of their tensors: they are not models, but added to one."""

from __future__ import annotations

import re
from collections.abc import Collection

# The last parts of names, by who writes them: https://github.com/huggingface/peft (`tuners`), and
# https://github.com/KohakuBlueleaf/LyCORIS (`lycoris/modules`), whose LoRA is that of kohya's sd-scripts.
_KINDS = {
    "LoRA adapter of PEFT": r"lora_(embedding_)?[AB]|lora_magnitude_vector|vera_lambda_[bd]|ia3_l",
    "LoRA file of kohya's scripts": r"lora_(down|up|mid)",
    "LoHa file of LyCORIS": r"hada_(w[12]_[ab]|t[12])",
    "LoKr file of LyCORIS": r"lokr_(w[12](_[ab])?|t2)",
    "OFT adapter": r"oft_(blocks|diag|R)|boft_[RS]",
    "LoRA file of diffusers": r"(\w*_)?lora(_linear_layer)?\.(down|up)",
}
_FACTOR = {kind: re.compile(rf"(?P<place>.*?)\.?(?<![a-zA-Z0-9])({part})(\.|$)") for kind, part in _KINDS.items()}
MERGE_WITH_PEFT = "make a model of it first: PeftModel.from_pretrained(base, adapter).merge_and_unload()"
_OF_DIFFUSION = (
    "merge it into its base first, as pipeline.load_lora_weights(file) and pipeline.fuse_lora() of diffusers do"
)
_REMEDIES = {
    "LoRA file of kohya's scripts": _OF_DIFFUSION,
    "LoHa file of LyCORIS": "merge it into its base first, with tools/merge.py of LyCORIS",
    "LoKr file of LyCORIS": "merge it into its base first, with tools/merge.py of LyCORIS",
    "LoRA file of diffusers": _OF_DIFFUSION,
}
# Some adapters keep the weight that they add to beside it.
_BASES = ("weight", "base_layer.weight", "linear.weight", "original_module.weight")


def is_adapter_factor(name: str) -> bool:
    """Whether a tensor is named as part of an adapter."""
    return any(pattern.match(name) for pattern in _FACTOR.values())


def adapter_kind(names: Collection[str]) -> tuple[str, str] | None:
    """The kind of adapter in a file and how to make a model of it, by its names; None if the weights are there too."""
    found: str | None = None
    for name in names:
        for kind, pattern in _FACTOR.items():
            if (factor := pattern.match(name)) is None:
                continue
            place = factor["place"]
            if any((f"{place}.{base}" if place else base) in names for base in _BASES):
                return None
            found = found or kind
    return None if found is None else (found, _REMEDIES.get(found, MERGE_WITH_PEFT))
