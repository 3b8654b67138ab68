"""The steps of an initialization: operations in place on registers, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compressor.initial.repeats import repeats_of

# What consumes random numbers, and what is done in place with scalars alone.
DRAWS = ("uniform_", "normal_")
# How many scalars each takes.
_COUNTS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(DRAWS, (0, 1, 2)),
    **dict.fromkeys(("fill_", "mul_", "add_", "sub_", "div_", "pow_", "clamp_min_", "clamp_max_"), (1,)),
    **dict.fromkeys(("zero_", "neg_", "sqrt_", "exp_", "log_", "erf_", "erfinv_", "abs_"), (0,)),
    "clamp_": (2,),
}
SCALAR = tuple(name for name in _COUNTS if name not in DRAWS)
COPY = "copy_"
OPERATIONS = frozenset((*DRAWS, *SCALAR, COPY))
DTYPES = {
    str(each).removeprefix("torch."): each for each in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
OVERWRITE = frozenset((*DRAWS, "fill_", "zero_", COPY))


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
        found = [self.register, list(self.shape)]
        if self.offset or torch.empty(self.shape, device="meta").stride() != self.strides:
            found += [list(self.strides), self.offset]
        return found

    @classmethod
    def of_list(cls, document: Any) -> Region:
        """Read what `to_list` returns; ValueError for anything else."""
        match document:
            case [int() as register, list() as shape] if all(type(each) is int and each >= 0 for each in shape):
                strides = [math.prod(max(1, size) for size in shape[place + 1 :]) for place in range(len(shape))]
                return cls.of_list([register, shape, strides, 0])
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


def registers_document(registers: Sequence[Register]) -> list[Any]:
    """What `registers_of` reads, in the types of JSON: registers, and what repeats once."""
    found: list[Any] = []
    for repeat in repeats_of(registers, [()] * len(registers)):
        own = [[each.size, _NAMES[each.dtype]] for each in registers[repeat.place : repeat.place + repeat.length]]
        found += own if repeat.times == 1 else [{"times": repeat.times, "registers": own}]
    return found


def registers_of(document: Any, *, most: int) -> tuple[Register, ...]:
    """Read what `registers_document` returns; ValueError for anything else, and for more registers than `most`."""
    found: list[Register] = []
    for each in document:
        times, some = (each["times"], each["registers"]) if isinstance(each, Mapping) else (1, [each])
        if type(times) is not int or not 0 < times <= most or len(found) + times * len(some) > most:
            raise ValueError("it has more registers than any initialization")
        own = [Register(size, DTYPES[dtype]) for size, dtype in some]
        if any(type(register.size) is not int or register.size < 0 for register in own):
            raise ValueError("a register has no size")
        found += own * times
    return tuple(found)


def steps_document(steps: Sequence[Step], registers: Sequence[Register]) -> list[Any]:
    """What `steps_of` reads, in the types of JSON: steps, and what repeats on other registers once."""
    numbers = [_registers(step) for step in steps]
    keys = [_moved(step, tuple(-number for number in own)) for step, own in zip(steps, numbers, strict=True)]
    found: list[Any] = []
    for repeat in repeats_of(keys, numbers):
        own = [_document(step, registers) for step in steps[repeat.place : repeat.place + repeat.length]]
        if repeat.times == 1:
            found += own
        else:
            strides = [list(each) for each in repeat.strides]
            found.append({"times": repeat.times, "steps": own, "strides": strides})
    return found


def steps_of(document: Any, registers: Sequence[Register], *, most: int) -> tuple[Step, ...]:
    """Read what `steps_document` returns; ValueError for anything else, and for more steps than `most`."""
    if len(document) > most:
        raise ValueError("it has more steps than any initialization")
    found: list[Step] = []
    for each in document:
        if not isinstance(each, Mapping):
            found.append(_step(each, registers))
            if len(found) > most:
                raise ValueError("it has more steps than any initialization")
        else:
            times, strides = each["times"], each["strides"]
            own = [_step(step, registers) for step in each["steps"]]
            sound = type(times) is int and times > 0 and len(found) + times * len(own) <= most
            if not sound or any(type(by) is not int for stride in strides for by in stride):
                raise ValueError("what repeats has no times or strides, or too many")
            for time in range(times):
                found += [
                    _sound(_moved(step, tuple(time * by for by in stride)), registers)
                    for step, stride in zip(own, strides, strict=True)
                ]
    return tuple(found)


def _registers(step: Step) -> tuple[int, ...]:
    return (step.target.register,) if step.source is None else (step.target.register, step.source.register)


def _moved(step: Step, by: tuple[int, ...]) -> Step:
    """The same on registers whose numbers are larger."""
    regions = (step.target,) if step.source is None else (step.target, step.source)
    moved = [replace(each, register=each.register + own) for each, own in zip(regions, by, strict=True)]
    return replace(step, target=moved[0], source=None if step.source is None else moved[1])


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
    if operation == COPY:
        [source] = rest
        return _sound(Step(operation, region, source=Region.of_list(source)), registers)
    return _sound(Step(operation, region, tuple(rest)), registers)


def _sound(step: Step, registers: Sequence[Register]) -> Step:
    """The step, if it is one that can be carried out; ValueError otherwise."""
    for region in (step.target, step.source):
        if region is None:
            continue
        if not 0 <= region.register < len(registers) or region.end > registers[region.register].size:
            raise ValueError("a step is outside of its register")
        if region.overlaps:
            raise ValueError("numbers of a step lie on others")
    if step.source is not None:
        if step.source.shape != step.target.shape:
            raise ValueError("a copy has another shape")
        return step
    scalars, largest = step.scalars, torch.finfo(registers[step.target.register].dtype).max
    sound = len(scalars) in _COUNTS[step.operation]
    sound &= all(type(each) in (int, float) and math.isfinite(each) and abs(each) <= largest for each in scalars)
    if sound and step.operation == "normal_":
        sound = len(scalars) < 2 or scalars[1] >= 0
    if sound and step.operation == "uniform_" and len(scalars) == 2:
        sound = 0 <= scalars[1] - scalars[0] <= largest
    if not sound:
        raise ValueError(f"{scalars!r} are no scalars of {step.operation}")
    return step
