"""A module is built while its random draws are recorded."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compressor.errors import BadInput
from compressor.initial.draws import Draws
from compressor.initial.steps import COPY, DRAWS, DTYPES, OPERATIONS, SCALAR, Region, Register, Step
from compressor.network import with_separate_experts


@dataclass(frozen=True)
class Recorded:
    """A module as it was built, the draws that led to it, and the floating-point tensors that they do not explain."""

    module: nn.Module
    draws: Draws
    unrecorded: frozenset[str]


def record(build: Callable[[], nn.Module], seed: int) -> Recorded:
    """Build a module from a seed and record its draws, which are replayed once and compared bit by bit.

    Experts have both their own names and those that they have when they are separate. Raises `BadInput` for a seed that
    PyTorch does not take.
    """
    recorder = _Recorder()
    with _seeded(seed), recorder:
        module = build()
    apart = with_separate_experts(module)
    known = {**apart.state_dict(keep_vars=True), **module.state_dict(keep_vars=True)}
    state = {name: each for name, each in known.items() if each.is_floating_point()}
    tensors = {name: region for name, each in state.items() if (region := recorder.region(each)) is not None}
    draws = Draws(seed, torch.__version__, tuple(recorder.registers), tuple(recorder.steps), tensors)
    draws = draws.only(set(tensors))
    same = {name for name, each in draws.replay() if torch.equal(each, state[name].detach())}
    return Recorded(module, draws.only(same), frozenset(state.keys() - same))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Set the seeds of Python, NumPy and PyTorch, as `transformers.set_seed` does, and restore the generators."""
    if not 0 <= seed < 2**64:
        raise BadInput(f"{seed} is no seed", option="initial", remedy="give a whole number from 0 to 2^64 - 1")
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=()):
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what is drawn and done on the CPU; memory that anything else writes to is forgotten."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.registers: list[Register] = []
        self.steps: list[Step] = []
        self._places: dict[int, int] = {}
        self._kept: list[Any] = []  # storages stay alive, so that none has the address of another
        self._broken = False

    def region(self, tensor: Tensor) -> Region | None:
        """Where a tensor is; None where it is not known how it came about."""
        place = self._places.get(tensor.untyped_storage()._cdata)
        if place is None or place < 0 or self.registers[place].dtype != tensor.dtype:
            return None
        return Region(place, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))

    def __torch_dispatch__(  # noqa: PLR0917 - the signature is PyTorch's
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        name = _name(func)
        before = None if name in _KNOWN or self._broken else torch.get_rng_state()
        result = func(*args, **named)
        if before is not None and not torch.equal(before, torch.get_rng_state()):
            self._broken = True  # an unknown draw: nothing after it can be replayed
        self._note(func, args, named=named, result=result)
        return result

    def _note(self, func: Any, args: tuple[Any, ...], *, named: dict[str, Any], result: Any) -> None:
        name = _name(func)
        written = [
            args[place]
            for place, each in enumerate(func._schema.arguments)
            if place < len(args) and each.alias_info is not None and each.alias_info.is_write
        ]
        if written and name in OPERATIONS:
            self._in_place(name, args, named)
        elif written:
            for each in written:
                self._forget(each)
        elif isinstance(result, Tensor) and result.untyped_storage()._cdata not in self._places:
            self._new(name, args, named=named, result=result)

    def _in_place(self, name: str, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        target, *rest = args
        own = region = self.region(target)
        if own is None or region is None:
            return
        size = self.registers[own.register].size
        if own.is_all(size):  # what is drawn and done there does not depend on the shape
            region = Region(own.register, (size,), (1,))
        source = rest[0] if name == COPY and rest else None
        scalars = [*rest, *(value for key, value in named.items() if key not in ("generator", "non_blocking"))]
        if name in DRAWS and (self._broken or named.get("generator") is not None):
            self._forget(target)
        elif isinstance(source, Tensor):
            of = self.region(source)
            if of is None or source.shape != target.shape:
                self._forget(target)
            else:
                self.steps.append(Step(name, own, source=of))
        elif name != COPY and all(isinstance(each, int | float) and math.isfinite(each) for each in scalars):
            self.steps.append(Step(name, region, tuple(scalars)))
        else:
            self._forget(target)

    def _new(self, name: str, args: tuple[Any, ...], *, named: dict[str, Any], result: Tensor) -> None:
        """A tensor in memory of its own: empty, of one number, drawn, or computed from one that is known."""
        source = next((each for each in args if isinstance(each, Tensor)), None)
        of = None if source is None else self.region(source)
        if result.device.type != "cpu" or result.dtype not in DTYPES.values():
            self._forget(result)
            return
        if name in _EMPTY:
            self._register(result)
        elif name in _FILLED:
            self._register(result)
            value = _FILLED[name] if _FILLED[name] is not None else args[1]
            self._in_place("fill_", (result, value), {})
        elif name in ("rand", "randn", "rand_like", "randn_like") and named.get("generator") is None:
            self._register(result)
            self._in_place("uniform_" if "randn" not in name else "normal_", (result, 0.0, 1.0), {})
        elif name == "normal" and source is None and named.get("generator") is None:
            self._register(result)
            self._in_place("normal_", (result, *args[:2]), {})
        elif of is not None and source is not None and name in ("clone", "_to_copy", "contiguous"):
            self._register(result)
            self._in_place(COPY, (result, source), {})
        elif of is not None and source is not None and f"{name}_" in SCALAR and result.dtype == source.dtype:
            self._register(result)
            self._in_place(COPY, (result, source), {})
            self._in_place(f"{name}_", (result, *args[1:]), named)
        else:
            self._forget(result)

    def _register(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._kept.append(storage)
        self._places[storage._cdata] = len(self.registers)
        self.registers.append(Register(storage.nbytes() // tensor.dtype.itemsize, tensor.dtype))

    def _forget(self, tensor: Any) -> None:
        if isinstance(tensor, Tensor):
            self._kept.append(tensor.untyped_storage())
            self._places[tensor.untyped_storage()._cdata] = -1


def _name(func: Any) -> str:
    """The name of an operation of ATen."""
    return str(func._schema.name).removeprefix("aten::")


_EMPTY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
_FILLED: dict[str, float | None] = {
    **dict.fromkeys(("zeros", "new_zeros", "zeros_like"), 0.0),
    **dict.fromkeys(("ones", "new_ones", "ones_like"), 1.0),
    **dict.fromkeys(("full", "full_like"), None),
}
_KNOWN = OPERATIONS | {
    *_EMPTY,
    *_FILLED,
    "rand",
    "randn",
    "rand_like",
    "randn_like",
    "normal",
    "clone",
    "_to_copy",
    "detach",
}
