"""Which layers belong together: by the block that they are in, and by what they are in it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from compressor.network import in_natural_order as names_in_natural_order
from compressor.planning import LayerPlan


def in_natural_order(layers: Iterable[LayerPlan]) -> list[LayerPlan]:
    """The layers by name, with 2 before 10."""
    by_name = {layer.name: layer for layer in layers}
    return [by_name[name] for name in names_in_natural_order(by_name)]


def block_of(name: str) -> str:
    """The block of a layer: its name up to the first part that is a number; empty where that is its last part."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts[:-1]) if part.isdecimal()), None)
    return "" if number is None else ".".join(parts[: number + 1])


def blocks_of(layers: Sequence[LayerPlan]) -> list[str] | None:
    """The block of every layer; None where no block has two of them, so that blocks say nothing."""
    blocks = [block_of(layer.name) for layer in layers]
    several = (count > 1 for block, count in Counter(blocks).items() if block)
    return blocks if any(several) else None


def kinds_of(layers: Sequence[LayerPlan], *, most: int = 24) -> list[str]:
    """What every layer is by its name, or where names say nothing, whether it is linear."""
    kinds = kinds_by_name([layer.name for layer in layers], most=most)
    different = set(kinds)
    telling = len(different) <= most and 2 * len(different) <= len(layers) and different != {"*"}
    return kinds if telling else [layer.kind for layer in layers]


# A part of a name that is a number, as that of a block is; a last part may be one after a dot alone.
_NUMBER = re.compile(r"(?:(?<=[._])|^)\d+(?=[._])|(?:(?<=\.)|^)\d+$")
_ENDS_IN_NUMBER = re.compile(r"\d+(?=\.)")


def kinds_by_name(names: Sequence[str], *, most: int) -> list[str]:
    """The kind of each layer: its name with a star for the number of its block.

    Where these are more than `most` kinds, further numbers do not count either: those that are parts of a name, and
    then those that end one.
    """
    kinds = [_NUMBER.sub("*", name, count=1) for name in names]
    if len(set(kinds)) > most:
        kinds = [_NUMBER.sub("*", name) for name in names]
    if len(set(kinds)) > most:
        kinds = [_ENDS_IN_NUMBER.sub("*", name) for name in kinds]
    return kinds
