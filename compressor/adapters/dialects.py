"""The dialects by name, and which of them an adapter has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from compressor.adapters.dialect import Dialect
from compressor.adapters.diffusers import Diffusers
from compressor.adapters.groups import grouped
from compressor.adapters.kohya import Kohya, has_flat_names
from compressor.adapters.module import Adapter
from compressor.adapters.peft import PREFIX, Peft
from compressor.choices import AdapterDialect
from compressor.errors import BadInput
from compressor.io import Checkpoint, adapter_config, refuse_adapter
from compressor.io.adapters import adapter_kind

DIALECTS: Mapping[AdapterDialect, Dialect] = {each.name: each for each in (Peft(), Kohya(), Diffusers())}


def is_adapter(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is an adapter, by the names of its tensors or by the configuration beside them."""
    return (
        adapter_kind({*checkpoint.tensors, *checkpoint.aliases}) is not None or adapter_config(checkpoint) is not None
    )


def read_adapter(checkpoint: Checkpoint) -> Adapter:
    """The adapter that a checkpoint is; its values are not read.

    Raises:
        BadInput: an adapter of a kind that is not read, or a damaged one.
    """
    groups, _ = grouped(checkpoint)
    places = [group.place for group in groups]
    try:
        if adapter_config(checkpoint) is not None or any(place.startswith(PREFIX) for place in places):
            adapter = DIALECTS["peft"].read(checkpoint)
        elif not groups:
            refuse_adapter(checkpoint)
            raise BadInput("holds no low-rank factors", remedy="give an adapter that does")
        elif has_flat_names(places) or not any("." in place for place in places):
            adapter = DIALECTS["kohya"].read(checkpoint)
        else:
            adapter = DIALECTS["diffusers"].read(checkpoint)
    except BadInput as error:
        raise error.in_file(checkpoint.source or "the adapter") from None
    if not adapter.modules:
        raise BadInput("holds no low-rank factors", where=checkpoint.source, remedy="give an adapter that does")
    return _without_shared_names(adapter)


def _without_shared_names(adapter: Adapter) -> Adapter:
    """The adapter with a name of its own for each module: two that would have one keep what they are called."""
    counts = Counter(module.name for module in adapter.modules)
    modules = tuple(
        replace(module, name=replace(module.name, path=module.place, dotted=False))
        if counts[module.name] > 1
        else module
        for module in adapter.modules
    )
    return replace(adapter, modules=modules)
