"""A model as a row of segments that run one after another, so that one of them at a time needs memory.

Transformers are chains of blocks of one kind: one, or an encoder's and then a decoder's, or one for each stage. A
segment runs the model's own code with the blocks before it passed over, the tensors that enter it taken from where they
were left, and stops where the next one begins; so masks, positions and whatever else a model hands to its blocks are
right by construction. A model in which no such chain is found is one segment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor.calibration.criterion import outputs_of
from compressor.evaluation import Batch

# What enters a segment: what its block is given, then what each chain that has come to its end gave. Empty for the
# first segment; and what the last hands on is the model's outputs alone.
State = tuple[Tensor, ...]


@dataclass(frozen=True)
class Chain:
    """The names of blocks in order, each of which is given what the one before gave.

    They return a tuple of `results`, of which that is the first; or with 0 the tensor itself.
    """

    blocks: tuple[str, ...]
    results: int = 0


@dataclass(frozen=True)
class Segments:
    """The chains of a model in order: segment 0 ends where the first block begins, and segment i runs block i - 1."""

    chains: tuple[Chain, ...] = ()

    @property
    def count(self) -> int:
        return len(self._blocks) + 1

    @property
    def _blocks(self) -> list[tuple[int, int]]:
        """The number of its chain and its number there of every block."""
        return [(number, each) for number, chain in enumerate(self.chains) for each in range(len(chain.blocks))]

    def _ends_a_chain(self, index: int) -> bool:
        """Whether a segment runs the last block of a chain that another one follows."""
        return 0 < index < self.count - 1 and self._blocks[index][1] == 0

    def made_by(self, index: int, handed_on: State) -> State:
        """Those of the tensors that a segment hands on which it did not itself receive."""
        return (handed_on[0], handed_on[-1]) if self._ends_a_chain(index) else handed_on[:1]

    def own_layers(self, model: nn.Module, index: int, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """Those of the model's layers that a segment may run for what it makes: all but those in blocks of others."""
        names = [self.chains[number].blocks[place] for number, place in self._blocks]
        own = set(model.get_submodule(names[index - 1]).modules()) if index > 0 else set()
        others = {module for name in names for module in model.get_submodule(name).modules()} - own
        return {name: layer for name, layer in layers.items() if layer not in others}

    def run(self, model: nn.Module, index: int, batch: Batch, state: State) -> State:
        """Run one segment on what enters it: what enters the next, or the model's outputs.

        `model` is the one that was cut or one with other layers inside the same blocks.
        """
        chains = [[model.get_submodule(name) for name in chain.blocks] for chain in self.chains]
        ended: list[Tensor] = []
        with ExitStack() as stack:
            if index > 0:
                current, place = self._blocks[index - 1]
                hidden, *results = state
                for number, result in enumerate(results):
                    stack.enter_context(_passed_over(chains[number], self.chains[number].results))
                    stack.callback(_entering(chains[number][0], result).remove)
                stack.enter_context(_passed_over(chains[current][:place], self.chains[current].results))
                stack.callback(_entering(chains[current][place], hidden).remove)
                if self._ends_a_chain(index):
                    take = partial(_take, ended)
                    stack.callback(chains[current][place].register_forward_hook(take).remove)
            if index < self.count - 1:
                number, place = self._blocks[index]
                stack.callback(chains[number][place].register_forward_pre_hook(_stop, with_kwargs=True).remove)
            try:
                return (outputs_of(model, batch.inputs),)
            except _Reached as reached:
                return (reached.hidden, *state[1:], *ended)


class _Reached(Exception):  # noqa: N818 - it is no error
    """Raised where the next segment begins."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def _stop(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    raise _Reached(_hidden(arguments, named))


def _take(ended: list[Tensor], _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
    ended.append(output[0] if isinstance(output, tuple) else output)


def _entering(block: nn.Module, hidden: Tensor) -> torch.utils.hooks.RemovableHandle:
    def replace(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        if arguments:
            return (hidden, *arguments[1:]), named
        return arguments, {**named, next(iter(named)): hidden}

    return block.register_forward_pre_hook(replace, with_kwargs=True)


@contextmanager
def _passed_over(blocks: Sequence[nn.Module], results: int) -> Iterator[None]:
    """Let the blocks of a chain, from its first on, return what they are given.

    What they return beside it, such as T5's position bias, is what the first block makes of it.
    """
    beside: tuple[Any, ...] = ()

    def first(own: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        nonlocal beside
        beside = own(*arguments, **named)[1:]
        return others(*arguments, **named)

    def others(*arguments: Any, **named: Any) -> Any:
        hidden = _hidden(arguments, named)
        return (hidden, *beside) if results else hidden

    with ExitStack() as stack:
        for number, block in enumerate(blocks):
            forward = partial(first, block.forward) if number == 0 and results > 1 else others
            stack.enter_context(_forward(block, forward))
        yield


@contextmanager
def _forward(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a block run this in place of its own forward."""
    own = block.__dict__.get("forward")
    block.forward = forward
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own


def _hidden(arguments: Sequence[Any], named: Mapping[str, Any]) -> Tensor:
    first = arguments[0] if arguments else next(iter(named.values()))
    assert isinstance(first, Tensor), "blocks were chosen by taking a tensor first"
    return first


def find_segments(
    model: nn.Module, layers: Sequence[nn.Module], batch: Batch, embeddings: Sequence[nn.Module] = ()
) -> Segments:
    """All chains of blocks of one class that hold layers, or the longest, checked by running them on `batch`.

    `layers` and `embeddings` are those whose moments are wanted. Each block is called once and gives the next what it
    takes first, and all that the outputs have of a layer, or of one call of an embedding, passes through one segment. A
    model without such a chain, or whose outputs are not those of its segments, is one segment.
    """
    wanted = {id(layer) for layer in layers}
    names = [
        tuple(f"{name}.{index}" if name else index for index, _ in module.named_children())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1 and _alike(module, wanted)
    ]
    chains = _chains(model, names, batch)
    alone = [(chain,) for chain in sorted(chains, key=_length, reverse=True)]
    for chosen in (_beside_each_other(chains), *alone):
        segments = Segments(chosen)
        if _agrees(model, segments, batch) and _apart(model, segments, layers, embeddings, batch):
            return segments
    return Segments()


def _alike(parts: nn.Module, wanted: set[int]) -> bool:
    """Whether all parts are of one class and hold layers, without being layers themselves."""
    children = list(parts.children())
    holding = [any(id(module) in wanted for module in child.modules()) for child in children]
    return len({type(child) for child in children}) == 1 and all(holding) and id(children[0]) not in wanted


def _length(chain: Chain) -> int:
    return len(chain.blocks)


def _chains(model: nn.Module, rows: Sequence[tuple[str, ...]], batch: Batch) -> list[Chain]:
    """Those of the rows of blocks that are chains, in the order in which they are called.

    Each block is called once, in order, first with the very tensor that the one before gave.
    """
    called: dict[tuple[str, ...], int] = {}
    last: dict[tuple[str, ...], tuple[Tensor, int]] = {}

    def note(
        row: tuple[str, ...], number: int, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> None:
        given = arguments[0] if arguments else next(iter(named.values()), None)
        results = len(output) if isinstance(output, tuple) else 0
        result = output[0] if results else output
        in_order = number == called.get(row, 0) and isinstance(given, Tensor) and isinstance(result, Tensor)
        handed_on = number == 0 or (row in last and given is last[row][0] and results == last[row][1])
        called[row] = number + 1 if in_order and handed_on else len(row) + 1
        last[row] = result, results

    with ExitStack() as stack:
        for row in rows:
            for number, name in enumerate(row):
                hook = partial(note, row, number)
                stack.callback(model.get_submodule(name).register_forward_hook(hook, with_kwargs=True).remove)
        outputs_of(model, batch.inputs)
    return [Chain(row, last[row][1]) for row, calls in called.items() if calls == len(row)]


def _beside_each_other(chains: Sequence[Chain]) -> tuple[Chain, ...]:
    """The longest of the chains, and of the others those that do not lie inside another or around it."""
    chosen: list[Chain] = []
    for chain in sorted(chains, key=_length, reverse=True):
        if not any(_inside(chain, other) or _inside(other, chain) for other in chosen):
            chosen.append(chain)
    return tuple(chain for chain in chains if chain in chosen)


def _inside(inner: Chain, outer: Chain) -> bool:
    return any(inner.blocks[0].startswith(f"{block}.") for block in outer.blocks)


def _agrees(model: nn.Module, segments: Segments, batch: Batch) -> bool:
    """Whether the segments one after another give what the model gives."""
    state: State = ()
    try:
        for index in range(segments.count):
            state = segments.run(model, index, batch, state)
    except Exception:
        return False
    whole, [outputs] = outputs_of(model, batch.inputs), state
    digits = 1e-4 * float(whole.nan_to_num(0, 0, 0).abs().max())  # relative to the outputs, however small those are
    return outputs.shape == whole.shape and torch.allclose(outputs, whole, rtol=1e-3, atol=digits, equal_nan=True)


def _apart(
    model: nn.Module, segments: Segments, layers: Sequence[nn.Module], embeddings: Sequence[nn.Module], batch: Batch
) -> bool:
    """Whether no layer has a part in what two segments make, such as an encoder's in the results of all decoder blocks.

    Its gradient would be in none of them whole. Of an embedding that holds for each of its calls.
    """
    found: set[tuple[nn.Module, int]] = set()
    state: State = ()
    for index in range(segments.count):
        outputs: list[tuple[tuple[nn.Module, int], Tensor]] = []
        calls: Counter[nn.Module] = Counter()

        def note(
            module: nn.Module, _: tuple[Any, ...], output: Tensor, outputs: list[Any] = outputs, calls: Any = calls
        ) -> Tensor:
            calls[module] += module in embeddings
            outputs.append(((module, calls[module]), output if output.requires_grad else output.requires_grad_(True)))
            return output.clone()  # which the model may change in place

        with ExitStack() as stack, torch.enable_grad():
            for module in (*layers, *embeddings):
                stack.callback(module.register_forward_hook(note).remove)
            handed_on = segments.run(model, index, batch, tuple(each.clone() for each in state))
        state = tuple(each.detach() for each in handed_on)
        reachable = [each for each in handed_on if each.requires_grad]
        if not outputs or not reachable:
            continue
        tensors = [output for _, output in outputs]
        gradients = torch.autograd.grad(
            reachable, tensors, [torch.ones_like(each) for each in reachable], allow_unused=True
        )
        reached = {call for (call, _), gradient in zip(outputs, gradients, strict=True) if gradient is not None}
        if found & reached:
            return False
        found |= reached
    return True
