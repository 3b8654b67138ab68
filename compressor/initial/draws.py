"""The random draws of an initialization, recorded as data, and made again without the code that made them first."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_DRAWN = {"uniform_": torch.ops.aten.uniform_.default, "normal_": torch.ops.aten.normal_.default}
_SAMPLED = 8


@dataclass(frozen=True)
class Fingerprint:
    """What a tensor is checked by: its norm, and a few of its values."""

    norm: float
    values: tuple[float, ...]

    def defect(self, tensor: Tensor) -> str | None:
        """In what a tensor differs, by more than 1e-5 of its norm or of its values' root mean square; None if not."""
        found = fingerprint(tensor)
        if not abs(found.norm - self.norm) <= 1e-5 * self.norm:
            return f"its norm is {found.norm:.7g}, not {self.norm:.7g}"
        size = self.norm / math.sqrt(max(1, tensor.numel()))
        for ours, theirs in zip(found.values, self.values, strict=True):
            if not abs(ours - theirs) <= 1e-5 * max(size, abs(theirs)):
                return f"it has {ours:.7g} in the place of {theirs:.7g}"
        return None

    def to_dict(self) -> dict[str, Any]:
        return {"norm": self.norm, "values": list(self.values)}

    @classmethod
    def from_dict(cls, document: Any) -> Fingerprint:
        """Read what `to_dict` returns; ValueError says what is wrong with the document."""
        if not isinstance(document, Mapping) or not isinstance(values := document.get("values"), list):
            raise ValueError("a fingerprint has a norm and values")
        numbers = [document.get("norm"), *values]
        if len(values) > _SAMPLED or not all(type(each) in (int, float) and math.isfinite(each) for each in numbers):
            raise ValueError("a fingerprint has a norm and a few values")
        return cls(float(numbers[0]), tuple(float(each) for each in values))


def fingerprint(tensor: Tensor) -> Fingerprint:
    """The norm of a tensor and values at even distances."""
    flat = tensor.detach().flatten().double()
    places = torch.linspace(0, max(0, len(flat) - 1), min(_SAMPLED, len(flat))).long()
    return Fingerprint(float(torch.linalg.vector_norm(flat)), tuple(flat[places].tolist()))


@dataclass(frozen=True)
class Draw:
    """One random operation: what it draws, into how many numbers of which dtype, and the tensor that they become."""

    operation: str
    shape: tuple[int, ...]
    dtype: str
    arguments: tuple[float, ...]
    name: str | None

    def make(self, generator: torch.Generator) -> Tensor:
        """The numbers, the next of a generator."""
        tensor = torch.empty(self.shape, dtype=getattr(torch, self.dtype))
        _DRAWN[self.operation](tensor, *self.arguments, generator=generator)
        return tensor


@dataclass(frozen=True, eq=False)
class Draws:
    """The draws of an initialization in their order, which a seed and a version of PyTorch make the same."""

    seed: int
    torch_version: str
    steps: tuple[Draw, ...]
    # Of the generator before the first steps.
    _states: list[Tensor] = field(default_factory=list, init=False, repr=False)

    @property
    def names(self) -> frozenset[str]:
        """The tensors of a module's state that are drawn."""
        return frozenset(step.name for step in self.steps if step.name is not None)

    def replay(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Draw the tensors of some names again, in the order of the initialization; PyTorch's own generator is left."""
        generator = torch.Generator().manual_seed(self.seed)
        for step in self.steps:
            tensor = step.make(generator)
            if step.name is not None and step.name in names:
                yield step.name, tensor

    def tensor(self, name: str) -> Tensor:
        """Draw one tensor again, from the state of the generator before it once that is known.

        KeyError where there is none of the name.
        """
        place = next((place for place, step in enumerate(self.steps) if step.name == name), None)
        if place is None:
            raise KeyError(name)
        generator = torch.Generator().manual_seed(self.seed)
        if not self._states:
            self._states.append(generator.get_state())
        first = min(place, len(self._states) - 1)
        generator.set_state(self._states[first])
        for each in range(first, place):
            self.steps[each].make(generator)
            self._states.append(generator.get_state())
        return self.steps[place].make(generator)

    def to_dict(self) -> dict[str, Any]:
        steps = [[each.operation, list(each.shape), each.dtype, list(each.arguments), each.name] for each in self.steps]
        return {"seed": self.seed, "torch": self.torch_version, "steps": steps}

    @classmethod
    def from_dict(cls, document: Any) -> Draws:
        """Read what `to_dict` returns; ValueError says what is wrong with the document."""
        if not isinstance(document, Mapping) or not isinstance(document.get("steps"), list):
            raise ValueError("it has no draws")
        seed, version = document.get("seed"), document.get("torch")
        if type(seed) is not int or not isinstance(version, str):
            raise ValueError("draws have a seed and a version of PyTorch")
        return cls(seed, version, tuple(_draw(step) for step in document["steps"]))


def _draw(step: Any) -> Draw:
    if not isinstance(step, list) or len(step) != 5 or step[0] not in _DRAWN:
        raise ValueError(f"{step!r} is no draw")
    operation, shape, dtype, arguments, name = step
    sizes = isinstance(shape, list) and all(type(side) is int and 0 < side < 2**31 for side in shape)
    numbers = isinstance(arguments, list) and len(arguments) == 2 and all(type(a) in (int, float) for a in arguments)
    if not sizes or not numbers or dtype not in ("float32", "float64", "float16", "bfloat16"):
        raise ValueError(f"{step!r} is no draw")
    if math.prod(shape) > 2**34 or not isinstance(name, str | None):
        raise ValueError(f"{step!r} is no draw")
    return Draw(operation, tuple(shape), dtype, tuple(arguments), name)


@dataclass(frozen=True)
class Recorded:
    """A module that was built, the draws that its tensors are made of, and the tensors of which they are not known."""

    module: nn.Module
    draws: Draws
    unrecorded: frozenset[str]


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what is drawn into whole tensors, and whether anything else is random."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[tuple[str, Tensor, tuple[float, ...]]] = []
        self.unknown = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: PLR0917
        name = func._schema.name.partition("::")[2]
        if name in _DRAWN:
            numbers = tuple(float(each) for each in args[1:]) or ((0.0, 1.0))
            self.steps.append((name, args[0], numbers))
        elif torch.Tag.nondeterministic_seeded in func.tags:
            self.unknown = True
        return func(*args, **(kwargs or {}))


def record(build: Callable[[], nn.Module], seed: int) -> Recorded:
    """Build a module after `torch.manual_seed(seed)`, and note its draws; PyTorch's generator is as it was after it."""
    recorder = _Recorder()
    with torch.random.fork_rng(devices=[]), recorder:
        torch.manual_seed(seed)
        module = build()
    state = module.state_dict(keep_vars=True)
    last = {tensor.data_ptr(): place for place, (_, tensor, _) in enumerate(recorder.steps)}
    names: dict[int, str] = {}
    for name, tensor in state.items():
        place = last.get(tensor.data_ptr())
        if place is not None and recorder.steps[place][1].shape == tensor.shape:
            names.setdefault(place, name)
    steps = [
        Draw(operation, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), numbers, names.get(place))
        for place, (operation, tensor, numbers) in enumerate(recorder.steps)
    ]
    draws = Draws(seed, torch.__version__, () if recorder.unknown else tuple(steps))
    # What happened to a tensor after its draw shows in its values.
    same = {name for name, tensor in draws.replay(set(state)) if torch.equal(tensor, state[name])}
    kept = tuple(step if step.name in same else replace(step, name=None) for step in draws.steps)
    return Recorded(module, replace(draws, steps=kept), frozenset(state.keys() - same))
