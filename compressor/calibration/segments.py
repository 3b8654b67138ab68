"""A model split into segments that run one after another, so that only one of them at a time needs memory.

Transformers are chains of blocks of one class: one chain, or an encoder's and then a decoder's, or one for each stage.
A segment runs the model's own code: earlier blocks are skipped, with the cached inputs of the segment in place of their
outputs, and the run stops at the next block. So masks, positions and whatever else a model passes to its blocks are
right by construction. Modules outside the chains belong to the segment whose outputs depend on them; a model
without a chain is one segment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor.calibration.criterion import outputs_of
from compressor.data import Batch
from compressor.freed_memory import freed_memory
from compressor.model.head import Head, with_forward
from compressor.network import Layer

# Inputs of a segment: the input of its block, then the output of each chain that has ended. The first segment has none,
# and the last segment outputs one tensor: the inputs of the model's head, or its outputs where no head is known.
State = tuple[Tensor, ...]


@dataclass(frozen=True)
class BlockChain:
    """The names of blocks in order; the input of each is the output of the one before.

    A block returns a tuple of `results` tensors, of which the first is that output; with 0 it returns the tensor
    itself. The other tensors are those that the first block returns, so it runs even where the chain is skipped.
    """

    blocks: tuple[str, ...]
    results: int = 0


@dataclass(frozen=True)
class Segments:
    """The chains of a model in order: segment 0 ends where the first block begins, and segment i runs block i - 1.

    The last segment ends where the head begins, of a model that has one.
    """

    chains: tuple[BlockChain, ...] = ()
    head: Head | None = None

    @property
    def count(self) -> int:
        return len(self._blocks) + 1

    @property
    def _blocks(self) -> list[tuple[int, int]]:
        """For every block the number of its chain, and its number in the chain."""
        return [(number, each) for number, chain in enumerate(self.chains) for each in range(len(chain.blocks))]

    def _ends_a_chain(self, index: int) -> bool:
        """Whether a segment runs the last block of a chain that is followed by another chain."""
        return 0 < index < self.count - 1 and self._blocks[index][1] == 0

    def new_outputs(self, index: int, outputs: State) -> State:
        """Tensors that a segment outputs which were not among its inputs."""
        return (outputs[0], outputs[-1]) if self._ends_a_chain(index) else outputs[:1]

    def sources(self, index: int) -> list[tuple[int, int]]:
        """For each input of a segment, the segment that output it and its place among the `new_outputs` there."""
        ends = [(segment, 1) for segment in range(index) if self._ends_a_chain(segment)]
        return [(index - 1, 0), *ends] if index else []

    def own_layers(self, model: nn.Module, index: int, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """The layers that the outputs of a segment may depend on: all but those in the blocks of other segments."""
        names = [self.chains[number].blocks[place] for number, place in self._blocks]
        own = set(model.get_submodule(names[index - 1]).modules()) if index > 0 else set()
        others = {module for name in names for module in model.get_submodule(name).modules()} - own
        return {name: layer for name, layer in layers.items() if layer not in others}

    def outputs(self, model: nn.Module, rows: Tensor, modules: Mapping[str, nn.Module] | None = None) -> Tensor:
        """The model's outputs at some positions, `(positions, size)` both, from what the last segment outputs there.

        Of `modules`, by their places, the one at the head's runs instead of the head.
        """
        if self.head is None:
            return rows
        return self.head(model, rows[None], instead=(modules or {}).get(self.head.name))[0]

    def width(self, last: Tensor) -> int:
        """How many outputs the model has at a position, by what the last segment outputs."""
        return last.shape[-1] if self.head is None else self.head.width

    def may_run(self, index: int, place: str) -> bool:
        """Whether a segment may run a module: all but those in the blocks of other segments.

        The first block of a chain runs in later segments too where it returns several tensors.
        """
        for segment, (number, each) in enumerate(self._blocks, start=1):
            block = self.chains[number].blocks[each]
            if place == block or place.startswith(f"{block}."):
                again = each == 0 and self.chains[number].results > 1
                return segment == index or (again and segment < index)
        return True

    def run(self, model: nn.Module, index: int, batch: Batch, *, state: State) -> State:
        """Run one segment on its inputs, and return those of the next; of the last, those of the head.

        `model` is the one that was split, or that one with other layers inside the same blocks.
        """
        freed_memory().give_back()
        chains = [[model.get_submodule(name) for name in chain.blocks] for chain in self.chains]
        ended: list[Tensor] = []
        with ExitStack() as stack:
            if index > 0:
                current, place = self._blocks[index - 1]
                hidden, *results = state
                for number, result in enumerate(results):
                    stack.enter_context(_skipped(chains[number], self.chains[number].results))
                    # A copy, because the model may change it in place, and the segment's output must stay as it is.
                    stack.callback(_entering(chains[number][0], result.clone()).remove)
                stack.enter_context(_skipped(chains[current][:place], self.chains[current].results))
                stack.callback(_entering(chains[current][place], hidden).remove)
                if self._ends_a_chain(index):
                    take = partial(_take, ended)
                    stack.callback(chains[current][place].register_forward_hook(take).remove)
            if index < self.count - 1:
                number, place = self._blocks[index]
                stack.callback(chains[number][place].register_forward_pre_hook(_stop, with_kwargs=True).remove)
            elif self.head is not None:
                head = model.get_submodule(self.head.name)
                stack.callback(head.register_forward_pre_hook(_stop, with_kwargs=True).remove)
            try:
                return (outputs_of(model, batch.inputs),)
            except _Reached as reached:
                if index == self.count - 1:
                    return (reached.hidden,)
                assert len(ended) == self._ends_a_chain(index), "a chain goes on after the next one has begun"
                return (reached.hidden, *state[1:], *ended)


class _Reached(Exception):  # noqa: N818 - it is no error
    """Raised at the start of the next segment."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def _stop(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    raise _Reached(_hidden(arguments, named))


def _take(ended: list[Tensor], _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
    # A copy, because it may itself be the input of the next chain, or be changed in place before that.
    ended.append((output[0] if isinstance(output, tuple) else output).clone())


def _entering(block: nn.Module, hidden: Tensor) -> torch.utils.hooks.RemovableHandle:
    def replace(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        if arguments:
            return (hidden, *arguments[1:]), named
        return arguments, {**named, next(iter(named)): hidden}

    return block.register_forward_pre_hook(replace, with_kwargs=True)


@contextmanager
def _skipped(blocks: Sequence[nn.Module], results: int) -> Iterator[None]:
    """Skip the first blocks of a chain: each returns its input.

    The other tensors that they return, such as T5's position bias, are those of the first block.
    """
    others_returned: tuple[Any, ...] = ()

    def first(own: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        nonlocal others_returned
        others_returned = own(*arguments, **named)[1:]
        return others(*arguments, **named)

    def others(*arguments: Any, **named: Any) -> Any:
        hidden = _hidden(arguments, named)
        return (hidden, *others_returned) if results else hidden

    with ExitStack() as stack:
        for number, block in enumerate(blocks):
            forward = partial(first, block.forward) if number == 0 and results > 1 else others
            stack.enter_context(with_forward(block, forward))
        yield


def _hidden(arguments: Sequence[Any], named: Mapping[str, Any]) -> Tensor:
    first = arguments[0] if arguments else next(iter(named.values()))
    assert isinstance(first, Tensor), "blocks were chosen by taking a tensor first"
    return first


def find_segments(model: nn.Module, layers: Sequence[Layer], batch: Batch) -> Segments:
    """Find as many chains of blocks of one class that hold layers as possible, and check them on `batch`.

    `layers` are those whose moments are wanted. In a chain each block is called once, and its output is the first
    argument of the next; and the outputs depend on each layer, or on each call of an embedding, through one segment
    alone. If that does not hold for all chains, the shortest are left out, or else the longest. A model without a chain
    is one segment.
    """
    wanted = {id(model.get_submodule(each.module)) for each in layers if each.kind not in ("embedding", "parameter")}
    rows = _rows(model, wanted)
    chains = _chains(model, rows, batch)
    # Among chains of one length, the outer one comes first.
    longest = sorted(chains, key=lambda chain: (-len(chain.blocks), rows.index(chain.blocks)))
    disjoint = _disjoint(longest)
    attempts = [disjoint[:count] for count in range(len(disjoint), 0, -1)]
    attempts += [_disjoint(longest[count:]) for count in range(1, len(longest))]
    for chosen in (*attempts, *([chain] for chain in longest[1:-1])):  # the first and the last are among these
        segments = Segments(tuple(chain for chain in chains if chain in chosen))
        if _agrees(model, segments, batch) and _apart(model, segments, layers, batch=batch):
            return segments
    return Segments()


def longest_row(model: nn.Module, layers: Sequence[Layer]) -> tuple[str, ...]:
    """The names of the most blocks that `find_segments` may find in a chain, without running the model."""
    wanted = {id(model.get_submodule(each.module)) for each in layers if each.kind not in ("embedding", "parameter")}
    rows = _rows(model, wanted)
    return max(rows, key=len, default=())


def _rows(model: nn.Module, wanted: set[int]) -> list[tuple[str, ...]]:
    """The names of blocks that are listed together and hold layers."""
    return [
        tuple(f"{name}.{index}" if name else index for index, _ in module.named_children())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1 and _alike(module, wanted)
    ]


def _alike(parts: nn.Module, wanted: set[int]) -> bool:
    """Whether all parts are of one class and hold layers, and are not layers themselves."""
    children = list(parts.children())
    holding = [any(id(module) in wanted for module in child.modules()) for child in children]
    return len({type(child) for child in children}) == 1 and all(holding) and id(children[0]) not in wanted


def _chains(model: nn.Module, rows: Sequence[tuple[str, ...]], batch: Batch) -> list[BlockChain]:
    """The rows of blocks that are chains, in the order in which they are called.

    Each block is called once, in order, and its first argument is the very tensor that the one before returned.
    """
    called: dict[tuple[str, ...], int] = {}
    last: dict[tuple[str, ...], tuple[Tensor, int]] = {}

    def note(
        _: nn.Module,
        arguments: tuple[Any, ...],
        named: dict[str, Any],
        output: Any,
        *,
        row: tuple[str, ...],
        number: int,
    ) -> None:
        given = arguments[0] if arguments else next(iter(named.values()), None)
        results = len(output) if isinstance(output, tuple) else 0
        result = output[0] if results else output
        in_order = number == called.get(row, 0) and isinstance(given, Tensor) and isinstance(result, Tensor)
        passed_on = number == 0 or (row in last and given is last[row][0] and results == last[row][1])
        called[row] = number + 1 if in_order and passed_on else len(row) + 1
        last[row] = result, results

    with ExitStack() as stack:
        for row in rows:
            for number, name in enumerate(row):
                hook = partial(note, row=row, number=number)
                stack.callback(model.get_submodule(name).register_forward_hook(hook, with_kwargs=True).remove)
        outputs_of(model, batch.inputs)
    return [BlockChain(row, last[row][1]) for row, calls in called.items() if calls == len(row)]


def _disjoint(chains: Sequence[BlockChain]) -> list[BlockChain]:
    """The chains that are neither inside nor around one before them."""
    chosen: list[BlockChain] = []
    for chain in chains:
        if not any(_inside(chain, other) or _inside(other, chain) for other in chosen):
            chosen.append(chain)
    return chosen


def _inside(inner: BlockChain, outer: BlockChain) -> bool:
    return any(inner.blocks[0].startswith(f"{block}.") for block in outer.blocks)


def _agrees(model: nn.Module, segments: Segments, batch: Batch) -> bool:
    """Whether the segments, run one after another, reproduce the model's outputs."""
    state: State = ()
    try:
        for index in range(segments.count):
            state = segments.run(model, index, batch, state=state)
    except Exception:
        return False
    whole, [outputs] = outputs_of(model, batch.inputs), state
    digits = 1e-4 * float(whole.nan_to_num(0, 0, 0).abs().max())  # relative to the outputs, however small they are
    return outputs.shape == whole.shape and torch.allclose(outputs, whole, rtol=1e-3, atol=digits, equal_nan=True)


def _apart(model: nn.Module, segments: Segments, layers: Sequence[Layer], *, batch: Batch) -> bool:
    """Whether the outputs of no two segments depend on one layer, as those of all decoder blocks may on an encoder's.

    No segment would have the whole gradient of such a layer. An embedding is checked for each of its calls.
    """
    found: set[tuple[str, int]] = set()
    state: State = ()
    modules = {each.name: model.get_submodule(each.module) for each in layers}
    parameters = {each.name: getattr(modules[each.name], each.parameter) for each in layers if each.kind == "parameter"}
    looked_up = {each.name for each in layers if each.kind == "embedding"}
    for index in range(segments.count):
        outputs: dict[tuple[str, int], Tensor] = {}
        with ExitStack() as stack, torch.enable_grad():
            for name in modules.keys() - parameters.keys():
                stack.callback(modules[name].register_forward_hook(partial(_note_output, outputs, name)).remove)
            for name, parameter in parameters.items():
                stack.callback(parameter.requires_grad_, parameter.requires_grad)
                outputs[name, 0] = parameter.requires_grad_(True)
            passed_on = segments.run(model, index, batch, state=tuple(each.clone() for each in state))
            reachable = [each for each in passed_on if each.requires_grad]
            state = tuple(each.detach() for each in passed_on)
            if not outputs or not reachable:
                continue
            weights = [torch.ones_like(each) for each in reachable]
            gradients = torch.autograd.grad(reachable, list(outputs.values()), weights, allow_unused=True)
        calls = [call for call, gradient in zip(outputs, gradients, strict=True) if gradient is not None]
        reached = {(name, number if name in looked_up else 0) for name, number in calls}
        if found & reached:
            return False
        found |= reached
    return True


def _note_output(
    outputs: dict[tuple[str, int], Tensor], layer: str, _: nn.Module, __: tuple[Any, ...], output: Tensor
) -> Tensor:
    """Keep the output of a layer, by its name and the number of the call."""
    calls = sum(name == layer for name, _ in outputs)
    outputs[layer, calls] = output if output.requires_grad else output.requires_grad_(True)
    return output.clone()  # which the model may change in place
