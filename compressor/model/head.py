"""The output head of a model: the layer that ends it, which can be applied to some positions at a time.

With a large vocabulary the logits of a batch, and their gradients, are many times larger than anything else of it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# Runs a model on some inputs, and returns its outputs as one tensor.
Forward = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Head:
    """A module whose outputs are those of the model, or become them by what the model's own code does next.

    `name` is its place in the model, and `width` the number of outputs at a position. `tail` is None where the outputs
    are the model's.
    """

    name: str
    width: int
    tail: Tail | None = None

    def __call__(self, model: nn.Module, hidden: Tensor, *, instead: nn.Module | None = None) -> Tensor:
        """The model's outputs `(1, positions, width)` from inputs of the head, `(1, positions, size)`.

        `model` is the one whose head this is, or that one with other layers in its layers' places; another layer may
        run `instead` of the head.
        """
        head = model.get_submodule(self.name)
        if self.tail is None:
            return (instead or head)(hidden)  # type: ignore[no-any-return]
        with ExitStack() as stack:
            if instead is not None:
                stack.enter_context(with_forward(head, instead.__call__))
            for child, output in self.tail.returned.items():
                stack.enter_context(with_forward(model.get_submodule(child), partial(_returning, output)))
            stack.callback(head.register_forward_pre_hook(partial(_given, hidden), with_kwargs=True).remove)
            return self.tail.forward(model)

    def inputs(self, model: nn.Module, forward: Forward) -> Tensor:
        """What the head is given in a forward of the model, which ends there."""
        handle = model.get_submodule(self.name).register_forward_pre_hook(_stop, with_kwargs=True)
        try:
            forward(model)
        except _ReachedHead as reached:
            return reached.hidden
        finally:
            handle.remove()
        raise RuntimeError(f"the model does not call its head {self.name}")


class _ReachedHead(Exception):  # noqa: N818 - it is no error
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def _stop(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    raise _ReachedHead(arguments[0] if arguments else next(iter(named.values())))


@dataclass(frozen=True)
class Tail:
    """How a model's own code is run after its head: on inputs whose hidden states are known, and replaced at the head.

    `returned` has the outputs, on these inputs, of the children that the model calls before the head.
    """

    forward: Forward
    returned: Mapping[str, Any]


@dataclass(frozen=True)
class _Call:
    name: str
    hidden: Tensor | None
    output: Any


class _Calls:
    """The last calls of modules in a forward, innermost first, and those that the model itself makes."""

    def __init__(self) -> None:
        self.last: deque[_Call] = deque(maxlen=8)
        self.own: list[_Call] = []
        self.count: Counter[str] = Counter()
        self._depth = 0

    def begin(self, *_: Any) -> None:
        self._depth += 1

    def end(self, name: str, given: Sequence[Any], output: Any) -> None:
        self._depth -= 1
        hidden = given[0] if len(given) == 1 and isinstance(given[0], Tensor) else None
        call = _Call(name, hidden, output)
        self.last.append(call)
        self.count[name] += 1
        if self._depth == 0:
            # A model that makes many calls itself has no body that could be replaced as a whole.
            self.own = [*self.own, call][:4]


@torch.no_grad()
def find_head(model: nn.Module, forward: Forward) -> Head | None:
    """Find the output head of a model in evaluation mode, and check on some inputs that it may be applied to positions
    one by one.

    `forward` runs the model on a few examples. None for a model without such a head, such as one whose outputs are
    stacked or multiplied with each other after the last layer.
    """
    calls = _Calls()
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name:
                stack.callback(module.register_forward_pre_hook(calls.begin).remove)
                stack.callback(module.register_forward_hook(_ending(calls, name), with_kwargs=True).remove)
        outputs = forward(model)
    for call in calls.last:
        if call.output is outputs and calls.count[call.name] == 1:
            return _checked(Head(call.name, outputs.shape[-1]), model, call, outputs=outputs)
    if not 1 < len(calls.own) < 4:
        return None
    *before, call = calls.own
    # Hooks see the calls of layers, so only modules that hold others are replaced.
    plain = all(calls.count[each.name] == 1 and any(model.get_submodule(each.name).children()) for each in before)
    if not plain or calls.count[call.name] != 1:
        return None
    tail = Tail(forward, {each.name: each.output for each in before})
    return _checked(Head(call.name, outputs.shape[-1], tail), model, call, outputs=outputs)


def _checked(head: Head, model: nn.Module, call: _Call, *, outputs: Tensor) -> Head | None:
    """The head, if its outputs for some positions are those of the model."""
    hidden = call.hidden
    if hidden is None or hidden.dim() < 2 or not hidden.is_floating_point() or not outputs.is_floating_point():
        return None
    if hidden.shape[:-1] != outputs.shape[:-1] or outputs.shape[:-1].numel() < 2:
        return None
    rows, expected = hidden.flatten(0, -2), outputs.flatten(0, -2)
    tolerance = max(1e-4, 4 * torch.finfo(outputs.dtype).eps) * float(expected.abs().nan_to_num(0, 0, 0).max())
    few = -(-len(rows) // 3)
    for some in (slice(None, few), slice(few, None)):
        try:
            found = head(model, rows[None, some])
        except Exception:
            return None
        if found.shape != (1, *expected[some].shape):
            return None
        if not torch.allclose(found[0], expected[some], rtol=1e-3, atol=tolerance, equal_nan=True):
            return None
    return head


def _ending(calls: _Calls, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
    def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        calls.end(name, (*arguments, *named.values()), output)

    return hook


def _returning(output: Any, *_: Any, **__: Any) -> Any:
    return output


def _given(hidden: Tensor, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    return ((hidden,), named) if arguments else (arguments, dict.fromkeys(named, hidden))


@contextmanager
def with_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward of a module."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
