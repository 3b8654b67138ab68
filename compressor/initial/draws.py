"""The random draws of an initialization: recorded while a model is built, kept as data, and replayed bit by bit.

A record is a list of steps on registers, each the memory of one tensor. Steps are random draws and what was done to
their results: a few operations in place, each on a whole register or on a strided region of it. Draws advance the
generator, so all of them are replayed in order; all other steps only where a tensor that is wanted depends on them.
PyTorch draws the same numbers from the same seed on every CPU, but for the last bits, which depend on the width of its
vectors.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compressor.errors import BadInput

# What consumes random numbers, and what is done in place with scalars alone.
DRAWS = ("uniform_", "normal_")
# How many scalars each takes.
_COUNTS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(DRAWS, (0, 1, 2)),
    **dict.fromkeys(("fill_", "mul_", "add_", "sub_", "div_", "pow_", "clamp_min_", "clamp_max_"), (1,)),
    **dict.fromkeys(("zero_", "neg_", "sqrt_", "exp_", "log_", "erf_", "erfinv_", "abs_"), (0,)),
    "clamp_": (2,),
}
_SCALAR = tuple(name for name in _COUNTS if name not in DRAWS)
_COPY = "copy_"
# More than any initialization takes: a model of a thousand layers has ten thousand steps.
_MOST_STEPS = 2**20
OPERATIONS = frozenset((*DRAWS, *_SCALAR, _COPY))
_DTYPES = {
    str(each).removeprefix("torch."): each for each in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
_OVERWRITE = frozenset((*DRAWS, "fill_", "zero_", _COPY))


@dataclass(frozen=True)
class Region:
    """Which numbers of a register: those at `offset` and the strides from there."""

    register: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    def of(self, memory: Tensor) -> Tensor:
        """The numbers, as a view."""
        return memory.as_strided(self.shape, self.strides, self.offset)

    def is_all(self, size: int) -> bool:
        """Whether it is all of a register of a size, in order."""
        contiguous = torch.empty(self.shape, device="meta").stride() == self.strides or math.prod(self.shape) == 1
        return self.offset == 0 and math.prod(self.shape) == size and contiguous

    @property
    def overlaps(self) -> bool:
        """Whether several of its numbers may be the same."""
        reach = 0
        for stride, size in sorted(zip(self.strides, self.shape, strict=True)):
            if size > 1:
                if stride <= reach:
                    return True
                reach += (size - 1) * stride
        return False

    def to_list(self) -> list[Any]:
        return [self.register, list(self.shape), list(self.strides), self.offset]

    @classmethod
    def of_list(cls, document: Any) -> Region:
        """Read what `to_list` returns; ValueError for anything else."""
        match document:
            case [int() as register, list() as shape, list() as strides, int() as offset]:
                numbers = [register, offset, *shape, *strides]
                if len(shape) == len(strides) <= 8 and all(type(each) is int and each >= 0 for each in numbers):
                    return cls(register, tuple(shape), tuple(strides), offset)
        raise ValueError(f"{document!r} is no region")

    @property
    def end(self) -> int:
        """One more than the place of its last number in the register."""
        if 0 in self.shape:
            return self.offset
        steps = zip(self.shape, self.strides, strict=True)
        return self.offset + 1 + sum((size - 1) * stride for size, stride in steps)


@dataclass(frozen=True)
class Step:
    """An operation in place on a region of a register, by scalars or with the numbers of another region."""

    operation: str
    target: Region
    scalars: tuple[float, ...] = ()
    source: Region | None = None

    def run(self, memory: Mapping[int, Tensor], generator: torch.Generator) -> None:
        """Carry it out on the memory of the registers."""
        target = self.target.of(memory[self.target.register])
        if self.operation in DRAWS:
            getattr(target, self.operation)(*self.scalars, generator=generator)
        elif self.source is not None:
            target.copy_(self.source.of(memory[self.source.register]))
        else:
            getattr(target, self.operation)(*self.scalars)


@dataclass(frozen=True)
class Register:
    """The memory of one tensor: how many numbers, and their dtype."""

    size: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Draws:
    """The record of an initialization, which can be drawn again from its seed.

    Attributes:
        seed: The seed of PyTorch's generator on the CPU.
        torch_version: The release that drew them.
        registers: The memory that the steps work on.
        steps: What was drawn and done, in order.
        tensors: Where the tensors of the module's state are, by name.
    """

    seed: int
    torch_version: str
    registers: tuple[Register, ...] = field(repr=False)
    steps: tuple[Step, ...] = field(repr=False)
    tensors: Mapping[str, Region] = field(repr=False)

    @property
    def names(self) -> frozenset[str]:
        """The tensors of a module's state that are drawn."""
        return frozenset(self.tensors)

    @property
    def numbers(self) -> int:
        """How many numbers are drawn."""
        return sum(math.prod(step.target.shape) for step in self.steps if step.operation in DRAWS)

    def with_seed(self, seed: int) -> Draws:
        """The same draws from another seed."""
        return replace(self, seed=seed)

    def only(self, names: Collection[str]) -> Draws:
        """The record of some tensors: all draws, and the steps that these depend on."""
        tensors = {name: region for name, region in self.tensors.items() if name in names}
        needed = self._needed(tensors.values())
        steps = tuple(step for step in self.steps if step.operation in DRAWS or step.target.register in needed)
        return _compact(replace(self, steps=steps, tensors=tensors), needed)

    def first(self, numbers: int) -> Draws:
        """The steps while no more than so many numbers are drawn, and the tensors that are finished by then."""
        drawn, end = 0, len(self.steps)
        for place, step in enumerate(self.steps):
            drawn += math.prod(step.target.shape) if step.operation in DRAWS else 0
            if drawn > numbers:
                end = place
                break
        later = {step.target.register for step in self.steps[end:]}
        touched = {step.target.register for step in self.steps[:end]}
        kept = {
            name: region
            for name, region in self.tensors.items()
            if region.register in touched and region.register not in later
        }
        return replace(self, steps=self.steps[:end], tensors=kept)

    def without_overwritten(self) -> Draws:
        """The same without the draws whose numbers are overwritten before they are used.

        A library that skips the default initialization of a layer that it initializes itself draws these alone.
        """
        sizes = [each.size for each in self.registers]
        kept: list[Step] = []
        overwritten: set[int] = set()
        for step in reversed(self.steps):
            register = step.target.register
            if register in overwritten:
                continue
            if step.operation in _OVERWRITE and step.target.is_all(sizes[register]):
                overwritten.add(register)
            if step.source is not None:
                overwritten.discard(step.source.register)
            kept.append(step)
        return replace(self, steps=tuple(reversed(kept)))

    def replay(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Draw tensors again, each given when its last step is done, in memory of its own.

        The generator is one of its own. Only what is still needed is kept.
        """
        wanted = {name: region for name, region in self.tensors.items() if names is None or name in names}
        needed = self._needed(wanted.values())
        last = self._last_steps(needed)
        ready: dict[int, list[str]] = {}
        for name, region in wanted.items():
            ready.setdefault(last.get(region.register, -1), []).append(name)
        free: dict[int, list[int]] = {}
        for register, place in self._last_uses(needed).items():
            free.setdefault(place, []).append(register)
        generator = torch.Generator().manual_seed(self.seed)
        memory: dict[int, Tensor] = {}
        for place, step in enumerate(self.steps):
            register = step.target.register
            if register not in needed:
                if step.operation in DRAWS:
                    step.run({register: self._empty(register)}, generator)
                continue
            for each in (step.target, step.source):
                if each is not None and each.register not in memory:
                    memory[each.register] = self._empty(each.register)
            step.run(memory, generator)
            for name in ready.get(place, ()):
                yield name, wanted[name].of(memory[wanted[name].register]).clone()
            for done in free.get(place, ()):
                memory.pop(done, None)

    @cached_property
    def _states(self) -> dict[int, Tensor]:
        """The state of the generator before each draw, 5 kB each, with which it can be made alone, by its place."""
        generator = torch.Generator().manual_seed(self.seed)
        found = {}
        for place, step in enumerate(self.steps):
            if step.operation in DRAWS:
                found[place] = generator.get_state()
                step.run({step.target.register: self._empty(step.target.register)}, generator)
        return found

    def tensor(self, name: str) -> Tensor:
        """Draw one tensor again; all draws are made the first time that one is asked for. KeyError for other names."""
        region = self.tensors[name]
        needed = self._needed([region])
        memory = {register: self._empty(register) for register in needed}
        generator = torch.Generator()
        for place, step in enumerate(self.steps):
            if step.target.register in needed:
                if step.operation in DRAWS:
                    generator.set_state(self._states[place])
                step.run(memory, generator)
        return region.of(memory[region.register]).clone()

    def _empty(self, register: int) -> Tensor:
        of = self.registers[register]
        return torch.zeros(of.size, dtype=of.dtype)

    def _needed(self, regions: Collection[Region]) -> set[int]:
        """The registers that some regions depend on."""
        needed = {region.register for region in regions}
        sources: dict[int, set[int]] = {}
        for step in self.steps:
            if step.source is not None:
                sources.setdefault(step.target.register, set()).add(step.source.register)
        left = list(needed)
        while left:
            more = sources.get(left.pop(), set()) - needed
            needed |= more
            left += more
        return needed

    def _last_steps(self, needed: Collection[int]) -> dict[int, int]:
        """The place of the last step on each of some registers."""
        return {step.target.register: place for place, step in enumerate(self.steps) if step.target.register in needed}

    def _last_uses(self, needed: Collection[int]) -> dict[int, int]:
        """The place of the last step that writes to or reads each of some registers."""
        found: dict[int, int] = {}
        for place, step in enumerate(self.steps):
            if step.target.register in needed:
                found[step.target.register] = place
                if step.source is not None:
                    found[step.source.register] = place
        return found

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads, in the types of JSON."""
        names = {dtype: name for name, dtype in _DTYPES.items()}
        return {
            "seed": self.seed,
            "torch": self.torch_version,
            "registers": [[each.size, names[each.dtype]] for each in self.registers],
            "steps": [_document(step, self.registers) for step in self.steps],
            "tensors": {name: region.to_list() for name, region in self.tensors.items()},
        }

    @classmethod
    def from_dict(cls, document: Any, *, most_numbers: int = 2**38) -> Draws:
        """Read what `to_dict` returns.

        Args:
            document: Data that nobody vouches for.
            most_numbers: How many numbers it may draw, and a register may hold.

        Raises:
            ValueError: it is something else, or asks for more.
        """
        try:
            seed, version = document["seed"], document["torch"]
            registers = tuple(Register(size, _DTYPES[dtype]) for size, dtype in document["registers"])
            steps = tuple(_step(each, registers) for each in document["steps"])
            tensors = {name: Region.of_list(region) for name, region in document["tensors"].items()}
        except (TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
            raise ValueError(f"it is no record of draws: {error}") from None
        found = cls(seed, version, registers, steps, tensors)
        found._require_sound(most_numbers)
        return found

    def _require_sound(self, most_numbers: int) -> None:
        if type(self.seed) is not int or not 0 <= self.seed < 2**64 or not isinstance(self.torch_version, str):
            raise ValueError("its seed or release is none")
        if any(type(each.size) is not int or not 0 <= each.size <= most_numbers for each in self.registers):
            raise ValueError("it holds more numbers than the model")
        if max(len(self.steps), len(self.registers)) > _MOST_STEPS:
            raise ValueError("it has more steps than any initialization")
        regions = [region for step in self.steps for region in (step.target, step.source) if region is not None]
        for region in (*regions, *self.tensors.values()):
            if region.register >= len(self.registers) or region.end > self.registers[region.register].size:
                raise ValueError("a step or tensor is outside of its register")
            if region.overlaps:
                raise ValueError("numbers of a step or tensor lie on others")
        if any(step.source is not None and step.source.shape != step.target.shape for step in self.steps):
            raise ValueError("a copy has another shape")
        if not self.is_within(most_numbers):
            raise ValueError("it draws more numbers than the model has")

    def is_within(self, numbers: int) -> bool:
        """Whether it draws and holds no more than the initialization of a model of so many numbers may.

        A library may draw a default initialization, its own, and again what it rejects.
        """
        largest = max((each.size for each in self.registers), default=0)
        return self.numbers <= 8 * numbers + 2**16 and largest <= numbers + 2**16


def _document(step: Step, registers: Sequence[Register]) -> list[Any]:
    region = step.target
    target: Any = region.to_list()
    if region.is_all(registers[region.register].size) and step.source is None:
        target = region.register
    found = [step.operation, target, *step.scalars]
    return found if step.source is None else [*found, step.source.to_list()]


def _step(document: Any, registers: Sequence[Register]) -> Step:
    operation, target, *rest = document
    if operation not in OPERATIONS:
        raise ValueError(f"there is no operation {operation!r}")
    if type(target) is int:
        if not 0 <= target < len(registers):
            raise ValueError("a step is outside of its register")
        region = Region(target, (registers[target].size,), (1,))
    else:
        region = Region.of_list(target)
    if operation == _COPY:
        [source] = rest
        return Step(operation, region, source=Region.of_list(source))
    largest = torch.finfo(registers[region.register].dtype).max if region.register < len(registers) else 0.0
    sound = len(rest) in _COUNTS[operation]
    sound &= all(type(each) in (int, float) and math.isfinite(each) and abs(each) <= largest for each in rest)
    if not sound or (operation == "normal_" and rest[1:] and rest[1] < 0):
        raise ValueError(f"{rest!r} are no scalars of {operation}")
    if operation == "uniform_" and len(rest) == 2 and not 0 <= rest[1] - rest[0] <= largest:
        raise ValueError(f"{rest!r} are no scalars of {operation}")
    return Step(operation, region, tuple(rest))


def _compact(draws: Draws, needed: Collection[int]) -> Draws:
    """The same with the registers that have steps or tensors alone; draws that nobody needs share one of their size."""
    places: dict[tuple[int, int, torch.dtype], int] = {}
    registers: list[Register] = []

    def moved(region: Region) -> Region:
        old = draws.registers[region.register]
        key = (region.register if region.register in needed else -1, old.size, old.dtype)
        if key not in places:
            places[key] = len(registers)
            registers.append(old)
        return replace(region, register=places[key])

    steps = tuple(
        replace(step, target=moved(step.target), source=None if step.source is None else moved(step.source))
        for step in draws.steps
    )
    tensors = {name: moved(region) for name, region in draws.tensors.items()}
    return replace(draws, registers=tuple(registers), steps=steps, tensors=tensors)


@dataclass(frozen=True)
class Recorded:
    """A module as it was built, the draws that led to it, and the floating-point tensors that they do not explain."""

    module: nn.Module
    draws: Draws
    unrecorded: frozenset[str]


def record(build: Callable[[], nn.Module], seed: int) -> Recorded:
    """Build a module from a seed and record its draws, which are replayed once and compared bit by bit.

    Raises `BadInput` for a seed that PyTorch does not take.
    """
    recorder = _Recorder()
    with _seeded(seed), recorder:
        module = build()
    state = {name: each for name, each in module.state_dict(keep_vars=True).items() if each.is_floating_point()}
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
        source = rest[0] if name == _COPY and rest else None
        scalars = [*rest, *(value for key, value in named.items() if key not in ("generator", "non_blocking"))]
        if name in DRAWS and (self._broken or named.get("generator") is not None):
            self._forget(target)
        elif isinstance(source, Tensor):
            of = self.region(source)
            if of is None or source.shape != target.shape:
                self._forget(target)
            else:
                self.steps.append(Step(name, own, source=of))
        elif name != _COPY and all(isinstance(each, int | float) and math.isfinite(each) for each in scalars):
            self.steps.append(Step(name, region, tuple(scalars)))
        else:
            self._forget(target)

    def _new(self, name: str, args: tuple[Any, ...], *, named: dict[str, Any], result: Tensor) -> None:
        """A tensor in memory of its own: empty, of one number, drawn, or computed from one that is known."""
        source = next((each for each in args if isinstance(each, Tensor)), None)
        of = None if source is None else self.region(source)
        if result.device.type != "cpu" or result.dtype not in _DTYPES.values():
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
            self._in_place(_COPY, (result, source), {})
        elif of is not None and source is not None and f"{name}_" in _SCALAR and result.dtype == source.dtype:
            self._register(result)
            self._in_place(_COPY, (result, source), {})
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


@dataclass(frozen=True)
class Fingerprint:
    """What tells a tensor from others to a few digits: its norm, and some of its numbers."""

    norm: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, tensor: Tensor, count: int = 8) -> Fingerprint:
        """That of a tensor, by numbers at places that are spread evenly."""
        wide = tensor.detach().to(torch.float64).flatten()
        return cls(float(wide.norm()), tuple(wide[_places(len(wide), count)].tolist()))

    def defect(self, tensor: Tensor, tolerance: float = 1e-5) -> str | None:
        """What is different in another tensor, relative to its root mean square; None where nothing is."""
        other = Fingerprint.of(tensor, len(self.values))
        size = self.norm / math.sqrt(max(1, tensor.numel()))
        if not math.isclose(self.norm, other.norm, rel_tol=tolerance):
            return f"its norm is {other.norm:.6g} instead of {self.norm:.6g}"
        pairs = zip(self.values, other.values, strict=True)
        apart = [abs(a - b) for a, b in pairs if not abs(a - b) <= tolerance * max(size, abs(a))]
        return f"{len(apart)} of {len(self.values)} of its numbers are others" if apart else None

    def to_dict(self) -> dict[str, Any]:
        return {"norm": self.norm, "values": list(self.values)}

    @classmethod
    def from_dict(cls, document: Any) -> Fingerprint:
        """Read what `to_dict` returns; ValueError for anything else."""
        match document:
            case {"norm": int() | float() as norm, "values": list() as values}:
                if all(type(each) in (int, float) and math.isfinite(each) for each in (norm, *values)):
                    return cls(float(norm), tuple(map(float, values)))
        raise ValueError(f"{document!r} is no fingerprint")


def _places(size: int, count: int) -> list[int]:
    count = min(size, count)
    return [size * each // count for each in range(count)]
