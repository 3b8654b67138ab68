"""Tied tensors under all of their names: a file stores them under one, and different writers choose different ones."""

from __future__ import annotations

from dataclasses import replace

from compressor.io import Checkpoint
from compressor.network.architecture import Architecture


def tied_names(architecture: Architecture) -> list[list[str]]:
    """The names in a model's state of each tensor that has several."""
    names: dict[int, list[str]] = {}
    for name, tensor in architecture.module.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def with_ties(checkpoint: Checkpoint, architecture: Architecture | None) -> Checkpoint:
    """The checkpoint with the model's further names of its tied tensors as aliases."""
    if architecture is None:
        return checkpoint
    known = {architecture.module_name(name): name for name in (*checkpoint.aliases, *checkpoint.tensors)}
    aliases = dict(checkpoint.aliases)
    for group in tied_names(architecture):
        stored = next((known[name] for name in group if name in known), None)
        if stored is not None:
            aliases |= {name: aliases.get(stored, stored) for name in group if name not in known}
    return replace(checkpoint, aliases=aliases)
