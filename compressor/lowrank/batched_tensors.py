"""Experts that run in batched products, in files: the matrices or the factors of all of a block in one tensor.

`STEM.batched.MEMBER.down.weight` of `(E, r, d_in)` stands for `STEM.0.MEMBER.down.weight` and so on, where all of them
have the same rank, and `STEM.batched.MEMBER.weight` for matrices that stay dense. The specification names the stems.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from compressor.forms import MARKERS, PLAIN
from compressor.io import Checkpoint, Stack, TensorInfo, TensorInMemory
from compressor.lowrank.spec import LayerSpec
from compressor.lowrank.stored_pairs import config_spec, damaged, spec_of


def batched_stems(stacks: Sequence[Stack], layers: Mapping[str, LayerSpec]) -> tuple[str, ...]:
    """The blocks of experts whose members each are pairs of one rank, or all dense, of which some are pairs."""
    members: dict[str, list[set[LayerSpec | None]]] = {}
    for stack in stacks:
        if stack.of == "weight":
            for member in stack.members:
                of_all = {layers.get(f"{stack.stem}.{number}.{member}") for number in range(stack.count)}
                members.setdefault(stack.stem, []).append(of_all)
    return tuple(
        stem
        for stem, kinds in members.items()
        if all(len(kind) == 1 for kind in kinds)
        and all(each is None or each.form == PLAIN.name for kind in kinds for each in kind)
        and any(each is not None for kind in kinds for each in kind)
    )


def batches_to_write(stacks: Sequence[Stack], layers: Mapping[str, LayerSpec], stems: Sequence[str]) -> list[Stack]:
    """The tensors that stand for those of the experts of some blocks."""
    found: dict[str, Stack] = {}
    for stack in stacks:
        for member in stack.members if stack.stem in stems else ():
            low_rank = f"{stack.stem}.0.{member}" in layers
            owners = [f"{member}.up"] if stack.of == "bias" else [f"{member}.down", f"{member}.up"]
            for owner in owners if low_rank else [member]:
                tensor = f"{stack.stem}.batched.{owner}.{stack.of}"
                found[tensor] = Stack(tensor, stack.stem, (owner,), stack.count, stack.of)
    return list(found.values())


def batched_infos(infos: Sequence[TensorInfo], batches: Sequence[Stack]) -> list[TensorInfo]:
    """Some tensors with batched ones in the places of the parts of each, and without the markers of their pairs."""
    by_name = {info.name: info for info in infos}
    shapes = {name: info.shape for name, info in by_name.items()}
    wholes: dict[str, TensorInfo] = {}
    for batch in batches:
        shape = batch.shape(shapes)
        assert shape is not None
        wholes |= dict.fromkeys(batch.names(), TensorInfo(batch.tensor, shape, by_name[batch.first].dtype))
    markers = _markers(batches)
    left = (wholes.get(info.name, info) for info in infos if info.name not in markers)
    return list({info.name: info for info in left}.values())


def _markers(batches: Sequence[Stack]) -> dict[str, Stack]:
    """The names of the markers of batched pairs."""
    downs = [batch for batch in batches if batch.members[0].endswith(".down")]
    return {name.replace(".down.weight", ".weight"): batch for batch in downs for name in batch.names()}


def batched_tensors(
    tensors: Iterable[tuple[str, Tensor]], batches: Sequence[Stack], infos: Sequence[TensorInfo]
) -> Iterator[tuple[str, Tensor]]:
    """The same of the tensors themselves: a batch is held until it is complete."""
    holders = {name: batch for batch in batches for name in batch.names()}
    markers, by_name = _markers(batches), {info.name: info for info in infos}
    begun: dict[str, tuple[Tensor, dict[str, Tensor]]] = {}
    for name, tensor in tensors:
        if name in markers:
            continue
        if (batch := holders.get(name)) is None:
            yield name, tensor
            continue
        if batch.tensor not in begun:
            info = by_name[batch.tensor]
            whole = torch.empty(info.shape, dtype=info.dtype)
            begun[batch.tensor] = (whole, batch.views(whole))
        whole, missing = begun[batch.tensor]
        missing.pop(name).copy_(tensor)
        if not missing:
            del begun[batch.tensor]
            yield batch.tensor, whole


def unbatched_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint with the tensors of batched experts by themselves, as its specification says.

    Raises:
        BadInput: they do not fit together.
    """
    stems = _stems_in(checkpoint)
    batches = []
    for name, info in checkpoint.tensors.items() if stems else ():
        stem = next((each for each in stems if name.startswith(f"{each}.batched.")), None)
        if stem is None:
            continue
        member, _, of = name.removeprefix(f"{stem}.batched.").rpartition(".")
        batch = Stack(name, stem, (member,), info.shape[0] if info.shape else 0, "bias" if of == "bias" else "weight")
        if of not in ("weight", "bias") or not batch.fits(info.shape):
            raise damaged(f"{name} does not fit the experts", checkpoint)
        batches.append(batch)
    if not batches:
        return checkpoint
    apart = checkpoint.taken_apart(batches)
    markers = {
        name: TensorInMemory(torch.empty(MARKERS["linear"], dtype=apart.tensors[batch.first].dtype))
        for name, batch in _markers(batches).items()
    }
    return apart.changed(markers)


def _stems_in(checkpoint: Checkpoint) -> tuple[str, ...]:
    return spec_of(checkpoint).batched or config_spec(checkpoint).batched
