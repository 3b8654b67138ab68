"""A network whose blocks are read from its checkpoint when they run, so that it is never whole in memory.

The matrices of a block are on the meta device until the block is called. They are then read, and are let go when other
blocks are read; autograd keeps what it still needs. All else stays in memory: what is outside the blocks, biases,
norms, and buffers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.io import Checkpoint
from compressor.lowrank import join
from compressor.network import Architecture, transformers_without_weights
from compressor.torch_state import CPU


class NotStreamed(Exception):  # noqa: N818 - it is no error
    """A network that has to be loaded whole, and why."""


@dataclass(frozen=True)
class _Held:
    """A matrix in memory, and what is in its place while it is not."""

    owner: nn.Module
    parameter: str
    values: nn.Parameter
    empty: nn.Parameter

    def let_go(self) -> None:
        # Where something else took its place, there is nothing to put back.
        if self.owner._parameters.get(self.parameter) is self.values:
            setattr(self.owner, self.parameter, self.empty)


class Block:
    """A module that is called as a whole, and the names in the checkpoint of its own matrices, by their names in it."""

    def __init__(self, blocks: Blocks, module: nn.Module, stored: Mapping[str, str]) -> None:
        self.blocks, self.module, self.stored = blocks, module, stored
        self.own_forward = module.forward
        self.held: list[_Held] = []
        # As an attribute of the module and not as a hook, so that a caller that puts another forward in its place,
        # or stops the run in a hook, has nothing read.
        module.forward = self.forward

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """The module's own forward, with its matrices in memory."""
        with self.blocks.running(self):
            return self.own_forward(*arguments, **named)

    def missing(self) -> Iterator[tuple[nn.Module, str, nn.Parameter, str]]:
        """The matrices that the module as it is now would need and are not in memory, with their names in the file.

        Layers may have been replaced, and what replaces them may share matrices that are not.
        """
        for name, stored in self.stored.items():
            place, _, parameter = name.rpartition(".")
            owner: nn.Module | None = self.module
            for part in place.split(".") if place else ():
                owner = None if owner is None else owner._modules.get(part)
            empty = None if owner is None else owner._parameters.get(parameter)
            if owner is not None and empty is not None and empty.is_meta:
                yield owner, parameter, empty, stored

    @property
    def nbytes(self) -> int:
        return sum(held.values.nbytes for held in self.held)

    def let_go(self) -> None:
        """Let all matrices go."""
        for held in self.held:
            held.let_go()
        self.held.clear()


@dataclass
class _Source:
    """Where tensors are read; copies of a network share it."""

    read: Callable[[str], Tensor]

    def __deepcopy__(self, _: dict[int, Any]) -> _Source:
        return self


@dataclass
class Blocks:
    """The blocks of a network, and those in memory from the least to the most recently run.

    Up to `kept_bytes` of them stay in memory, so that small models are read once; the block that runs and the one
    before it stay in any case.
    """

    source: _Source
    kept_bytes: int = 2**25
    device: torch.device = CPU
    are_frozen: bool = False
    stored: dict[str, str] = field(default_factory=dict)
    every: list[Block] = field(default_factory=list)
    in_memory: list[Block] = field(default_factory=list)
    active: list[Block] = field(default_factory=list)

    def __deepcopy__(self, memo: dict[int, Any]) -> Blocks:
        """Blocks of which none is in memory; nor are those of the network that is copied any more."""
        self.come_to(self.device)
        memo[id(self)] = copied = replace(self, every=[], in_memory=[], active=[])
        copied.every += copy.deepcopy(self.every, memo)
        return copied

    @contextmanager
    def running(self, block: Block) -> Iterator[None]:
        """Hold a block in memory."""
        needed = [(owner, parameter, empty, stored) for owner, parameter, empty, stored in block.missing()]
        self._make_room(block, sum(empty.nbytes for _, _, empty, _ in needed))
        for owner, parameter, empty, stored in needed:
            values = nn.Parameter(self.values(stored, empty), empty.requires_grad and not self.are_frozen)
            block.held.append(_Held(owner, parameter, values, empty))
            setattr(owner, parameter, values)
        self.in_memory = [*(each for each in self.in_memory if each is not block), block]
        self.active.append(block)
        try:
            yield
        finally:
            self.active.pop()

    def _make_room(self, block: Block, nbytes: int) -> None:
        others = [each for each in self.in_memory if each is not block]
        total = nbytes + sum(each.nbytes for each in self.in_memory)
        for each in others[:-1]:
            if total <= self.kept_bytes:
                break
            if not any(each is active for active in self.active):
                total -= each.nbytes
                self._let_go(each)

    def _let_go(self, block: Block) -> None:
        block.let_go()
        self.in_memory = [each for each in self.in_memory if each is not block]

    def values(self, stored: str, empty: Tensor) -> Tensor:
        """The values of a tensor of the checkpoint, in the place and dtype that the network has them."""
        values = self.source.read(stored).to(device=self.device, dtype=empty.dtype)
        if empty.is_contiguous() or empty.dim() < 4:
            return values
        return torch.empty_like(empty, device=self.device).copy_(values)  # channels last

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Compute no gradients of what is read, or is in memory."""
        before, self.are_frozen = self.are_frozen, True
        for block in self.in_memory:
            for held in block.held:
                held.values.requires_grad_(False)
        try:
            yield
        finally:
            self.are_frozen = before
            for block in self.in_memory:
                for held in block.held:
                    held.values.requires_grad_(held.empty.requires_grad and not before)

    def come_to(self, device: torch.device) -> None:
        """Let all blocks go, and read them onto a device from now on."""
        for block in self.in_memory:
            block.let_go()
        self.in_memory, self.device = [], device


def blocks_of(model: nn.Module) -> Blocks | None:
    """The blocks of a network that is streamed."""
    found: Blocks | None = vars(model).get("blocks_on_disk")
    return found


def parameter_of(model: nn.Module, module: str, parameter: str = "weight") -> Tensor:
    """A parameter of a network by the name of its module, read from the checkpoint where it is not in memory."""
    found = getattr(model.get_submodule(module), parameter)
    assert isinstance(found, Tensor)
    blocks = blocks_of(model)
    if not found.is_meta or blocks is None:
        return found
    return blocks.values(blocks.stored[join(module, parameter)], found)


def device_of(model: nn.Module) -> torch.device | None:
    """The device of a network's first tensor that has values, or where its blocks come to; None if it has none."""
    blocks = blocks_of(model)
    if blocks is not None:
        return blocks.device
    first = next(chain(model.parameters(), model.buffers()), None)
    return None if first is None else first.device


def streamed_transformers(checkpoint: Checkpoint, folder: Path) -> nn.Module:
    """A transformers model that equals what is loaded from a folder, with separate experts, and is streamed.

    Raises `NotStreamed` where it cannot be.
    """
    if not (checkpoint.config or {}).get("architectures"):
        raise NotStreamed("its config.json names no architecture")
    dtypes = {info.dtype for info in checkpoint.tensors.values() if info.dtype.is_floating_point}
    architecture = transformers_without_weights(folder, dtypes.pop() if len(dtypes) == 1 else None)
    if architecture is None:
        raise NotStreamed("transformers has a way of its own to load it")
    architecture.module.requires_grad_(True)  # as what is loaded does
    return _streamed(architecture, checkpoint)


def streamed_module(architecture: Architecture, checkpoint: Checkpoint, *, kept: Collection[str] = ()) -> nn.Module:
    """The module that a factory built, changed in place: with the weights of a checkpoint, and streamed.

    The parameters of the names that are `kept` stay in memory. Raises `NotStreamed` where it cannot be; the module is
    then as it was.
    """
    for module in architecture.module.modules():
        hooks = module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks
        own = type(module)._load_from_state_dict.__module__.partition(".")[0] != "torch"
        if own or any(hooks) or isinstance(module, torch.jit.ScriptModule):
            raise NotStreamed(f"{type(module).__name__} loads its weights by code of its own")
    unknown = next((name for name in checkpoint.tensors if name not in architecture.module.state_dict()), None)
    if unknown is not None:
        raise NotStreamed(f"its module has no {unknown}")
    return _streamed(architecture, checkpoint, kept)


@dataclass(frozen=True)
class _Place:
    """Where a module tree holds a parameter."""

    module: str
    owner: nn.Module
    parameter: str

    @property
    def name(self) -> str:
        return join(self.module, self.parameter)


def _streamed(architecture: Architecture, checkpoint: Checkpoint, kept: Collection[str] = ()) -> nn.Module:
    """The module, in place; its buffers have values already, those of the checkpoint apart."""
    module = architecture.module
    names = {architecture.module_name(name): name for name in (*checkpoint.aliases, *checkpoint.tensors)}
    stored = {own: name for own, name in names.items() if own is not None}
    _require_fit(module, stored, checkpoint)
    of_blocks = _matrices_of_blocks(module, stored.keys() - set(kept))
    if not of_blocks:
        raise NotStreamed("it has no chain of blocks")
    blocks = Blocks(_Source(checkpoint.read))
    on_disk = {place.name for places in of_blocks.values() for place in places.values()}
    blocks.stored |= {name: stored[name] for name in on_disk}
    for places in _places(module):
        old = places[0].owner._parameters[places[0].parameter]
        assert old is not None
        name = next((place.name for place in places if place.name in stored), None)
        if name in on_disk:
            values = old.detach().to("meta")
        else:
            values = torch.empty_like(old, device=CPU) if name is None else blocks.values(stored[name], old)
        new = nn.Parameter(values, old.requires_grad)
        for place in places:
            setattr(place.owner, place.parameter, new)
    _fill_buffers(module, stored, checkpoint)
    for block, matrices in of_blocks.items():
        blocks.every.append(Block(blocks, block, {own: stored[place.name] for own, place in matrices.items()}))
    vars(module)["blocks_on_disk"] = blocks
    return module


def whole(module: nn.Module) -> nn.Module:
    """A streamed module, changed in place: with all of its weights in memory, as if it had been loaded."""
    blocks = blocks_of(module)
    if blocks is None:
        return module
    for block in blocks.every:
        for owner, parameter, empty, stored in block.missing():
            setattr(owner, parameter, nn.Parameter(blocks.values(stored, empty), empty.requires_grad))
        del block.module.forward
    del vars(module)["blocks_on_disk"]
    return module


def _require_fit(module: nn.Module, stored: Mapping[str, str], checkpoint: Checkpoint) -> None:
    """Raise `NotStreamed` unless every tensor of the module is in the checkpoint, once and in its own shape."""
    state = module.state_dict(keep_vars=True)
    given = {id(state[name]) for name in stored if name in state}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise NotStreamed(f"{name} is no tensor")
        if name not in stored:
            if id(tensor) not in given and tensor.numel() > 0:
                raise NotStreamed(f"{name} is not in the files under a name of its own")
            continue
        info = checkpoint.tensors[checkpoint.aliases.get(stored[name], stored[name])]
        if info.shape != tuple(tensor.shape):
            raise NotStreamed(f"{name} has another shape in the files")


def _places(module: nn.Module) -> list[list[_Place]]:
    """For each parameter of a module all of its places in the tree."""
    found: dict[int, list[_Place]] = {}
    for name, owner in module.named_modules(remove_duplicate=False):
        for parameter, values in owner._parameters.items():
            if values is not None:
                found.setdefault(id(values), []).append(_Place(name, owner, parameter))
    return list(found.values())


def _matrices_of_blocks(module: nn.Module, names: Collection[str]) -> dict[nn.Module, dict[str, _Place]]:
    """Of the parameters of some names the matrices of each block, by their names in it; one inside another has its own.

    Those that several layers share are not among them.
    """
    modules = dict(module.named_modules(remove_duplicate=False))
    blocks = {
        child
        for each in modules.values()
        if isinstance(each, nn.ModuleList | nn.Sequential)
        for child in _alike(list(each.children()))
    }
    found: dict[nn.Module, dict[str, _Place]] = {}
    for places in _places(module):
        place = places[0]
        parameter = place.owner._parameters[place.parameter]
        if len(places) > 1 or place.name not in names or parameter is None or parameter.dim() < 2:
            continue
        parts = place.module.split(".")
        above = (".".join(parts[:depth]) for depth in range(len(parts), 0, -1))
        name = next((name for name in above if modules[name] in blocks), None)
        if name is not None:
            found.setdefault(modules[name], {})[place.name.removeprefix(f"{name}.")] = place
    return found


def _alike(children: Sequence[nn.Module]) -> Sequence[nn.Module]:
    """The members of a list of modules, if they are several blocks of one class: modules of layers."""
    several = len(children) > 1 and len({type(child) for child in children}) == 1
    return children if several and all(child._modules for child in children) else ()


def _fill_buffers(module: nn.Module, stored: Mapping[str, str], checkpoint: Checkpoint) -> None:
    """Read the buffers that are in the checkpoint."""
    same: dict[int, Tensor] = {}
    for place, owner in module.named_modules(remove_duplicate=False):
        for name, buffer in owner._buffers.items():
            full = join(place, name)
            if buffer is not None and full in stored and name not in owner._non_persistent_buffers_set:
                if id(buffer) not in same:
                    same[id(buffer)] = checkpoint.read(stored[full]).to(buffer.dtype)
                owner._buffers[name] = same[id(buffer)]
