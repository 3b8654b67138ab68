"""A model as a row of segments that run one after another, so that one of them at a time needs memory.

Transformers are a chain of blocks of one kind. A segment runs the model's own code with the blocks before it passed
over, the tensor that enters it taken from where it was left, and stops where the next one begins; so masks, positions
and whatever else a model hands to its blocks are right by construction. A model in which no such chain is found is one
segment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor.calibration.criterion import outputs_of
from compressor.evaluation import Batch


@dataclass(frozen=True)
class Segments:
    """The names of a model's blocks in order: segment 0 ends where the first begins, segment i runs block i - 1.

    `in_tuples` says that the blocks hand on their result as the first of a tuple.
    """

    blocks: tuple[str, ...] = ()
    in_tuples: bool = False

    @property
    def count(self) -> int:
        return len(self.blocks) + 1

    def run(self, model: nn.Module, index: int, batch: Batch, hidden: Tensor | None) -> Tensor:
        """Run one segment on what entered it (None for the first): what enters the next, or the model's outputs.

        `model` is the one that was cut or one with other layers inside the same blocks.
        """
        blocks = [model.get_submodule(name) for name in self.blocks]
        with ExitStack() as stack:
            if index > 0:
                assert hidden is not None, "only the first segment starts from the batch alone"
                for block in blocks[: index - 1]:
                    stack.enter_context(_passed_over(block, self.in_tuples))
                stack.callback(_entering(blocks[index - 1], hidden).remove)
            if index < len(blocks):
                stack.callback(blocks[index].register_forward_pre_hook(_stop, with_kwargs=True).remove)
            try:
                return outputs_of(model, batch.inputs)
            except _Reached as reached:
                return reached.hidden


class _Reached(Exception):  # noqa: N818 - it is no error
    """Raised where the next segment begins."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def _stop(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    raise _Reached(_hidden(arguments, named))


def _entering(block: nn.Module, hidden: Tensor) -> torch.utils.hooks.RemovableHandle:
    def replace(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        if arguments:
            return (hidden, *arguments[1:]), named
        return arguments, {**named, next(iter(named)): hidden}

    return block.register_forward_pre_hook(replace, with_kwargs=True)


@contextmanager
def _passed_over(block: nn.Module, in_tuples: bool) -> Iterator[None]:
    """Let a block return what it is given."""

    def forward(*arguments: Any, **named: Any) -> Any:
        hidden = _hidden(arguments, named)
        return (hidden,) if in_tuples else hidden

    own = block.__dict__.get("forward")
    block.forward = forward
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own


def _hidden(arguments: Sequence[Any], named: dict[str, Any]) -> Tensor:
    first = arguments[0] if arguments else next(iter(named.values()))
    assert isinstance(first, Tensor), "blocks were chosen by taking a tensor first"
    return first


def find_segments(model: nn.Module, layers: Sequence[nn.Module], batch: Batch) -> Segments:
    """The longest chain of blocks of one class that hold layers, checked by running it on `batch`.

    `layers` are those whose moments are wanted. Each block is called once and gives the next what it takes first; a
    model without such a chain, or whose outputs are not those of its segments, is one segment.
    """
    wanted = {id(layer) for layer in layers}
    chains = [
        tuple(f"{name}.{index}" if name else index for index, _ in module.named_children())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1 and _alike(module, wanted)
    ]
    for blocks in sorted(chains, key=len, reverse=True):
        for segments in _chained(model, blocks, batch):
            if _agrees(model, segments, batch):
                return segments
    return Segments()


def _alike(parts: nn.Module, wanted: set[int]) -> bool:
    """Whether all parts are of one class and hold layers, without being layers themselves."""
    children = list(parts.children())
    holding = [any(id(module) in wanted for module in child.modules()) for child in children]
    return len({type(child) for child in children}) == 1 and all(holding) and id(children[0]) not in wanted


def _chained(model: nn.Module, names: Sequence[str], batch: Batch) -> list[Segments]:
    """The segments, if each block is called once, in order, first with the very tensor that the one before gave."""
    calls: list[tuple[int, Any, Any]] = []

    def note(index: int, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        calls.append((index, arguments[0] if arguments else next(iter(named.values()), None), output))

    with ExitStack() as stack:
        for index, name in enumerate(names):
            hook = partial(note, index)
            stack.callback(model.get_submodule(name).register_forward_hook(hook, with_kwargs=True).remove)
        outputs_of(model, batch.inputs)
    in_tuples = all(isinstance(output, tuple) and len(output) > 0 for _, _, output in calls)
    results = [output[0] if in_tuples else output for _, _, output in calls]
    in_order = [index for index, _, _ in calls] == list(range(len(names)))
    tensors = all(isinstance(each, Tensor) for each in [*results, *(given for _, given, _ in calls)])
    handed_on = all(result is given for result, (_, given, _) in zip(results, calls[1:], strict=False))
    return [Segments(tuple(names), in_tuples)] if in_order and tensors and handed_on else []


def _agrees(model: nn.Module, segments: Segments, batch: Batch) -> bool:
    """Whether the segments one after another give what the model gives."""
    hidden: Tensor | None = None
    try:
        for index in range(segments.count):
            hidden = segments.run(model, index, batch, hidden)
    except Exception:
        return False
    whole = outputs_of(model, batch.inputs)
    assert hidden is not None
    return hidden.shape == whole.shape and torch.allclose(hidden, whole, rtol=1e-3, atol=1e-4, equal_nan=True)
