"""How transformers makes a model of the tensors in a file; its internals are used only here."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MergedExperts:
    """One linear layer per expert in the file, merged into one parameter for all experts in the model.

    `parameter` is the end of that parameter's name, and `layers` are the names of the layers inside an expert.
    """

    parameter: str
    layers: tuple[str, ...]


def name_conversions(model: Any) -> list[Any]:
    """The conversions that transformers applies to the names and tensors of a file for `model`, in order."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(model))


def merged_experts(conversion: Any) -> MergedExperts | None:
    """The experts that a conversion merges; None for any other conversion."""
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in getattr(conversion, "operations", ())]
    sources = [_plain(pattern) for pattern in conversion.source_patterns]
    targets = [_plain(pattern) for pattern in conversion.target_patterns]
    one, several = [("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]
    if len(targets) != 1 or steps != (several if len(sources) > 1 else one):
        return None
    experts = targets[0].rpartition(".")[0]
    layers = [re.fullmatch(re.escape(experts) + r"\.\*\.(\w+)\.weight", source) for source in sources]
    if any(found is None for found in layers):
        return None
    return MergedExperts(targets[0], tuple(found[1] for found in layers if found is not None))


def assembles(conversion: Any, name: str) -> bool:
    """Whether a conversion makes the parameter `name` of tensors in the file by computing, not only by its name."""
    computed = bool(getattr(conversion, "operations", ()))
    return computed and any(f".{name}".endswith(_plain(pattern)) for pattern in conversion.target_patterns)


def makes_experts(conversion: Any, places: Sequence[str]) -> bool:
    """Whether a conversion makes or names the parameters of the fused experts of these names."""
    targets = [_plain(pattern) for pattern in conversion.target_patterns]
    parts = [target.rpartition(".")[0] for target in targets]
    return any(part and f".{place}".endswith(part) for part in parts for place in places)


def without_merges(conversions: Sequence[Any], names: Collection[str]) -> list[Any]:
    """The conversions without those that merge experts into parameters that are not among the `names` of a model."""
    kept = []
    for conversion in conversions:
        merged = merged_experts(conversion)
        if merged is None or any(f".{name}".endswith(merged.parameter) for name in names):
            kept.append(conversion)
    return kept


def name_in_model(name: str, conversions: Sequence[Any], model_prefix: str, *, names: dict[str, Any]) -> str | None:
    """The name in a model of a tensor in a file; None if it is assembled from several or not among `names`."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    renamed, converted = rename_source_key(name, renamings, converters, model_prefix, names)
    return renamed if converted is None and renamed in names else None


def loaded_in_several_dtypes(model: Any) -> bool:
    """Whether transformers keeps some of a model's weights in float32 when it loads them in another dtype."""
    return bool(model._get_dtype_plan(model.config.dtype))


def initialize_buffers(model: Any) -> None:
    """Give the buffers of a model that was built without weights the values that they have before it is loaded."""
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()


def _plain(pattern: str) -> str:
    """A pattern without the backslashes before its dots."""
    return pattern.replace(r"\.", ".")
