"""The steps of an initialization: operations in place on registers, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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


def step_document(step: Step, registers: Sequence[Register]) -> list[Any]:
    """What `step_of` reads, in the types of JSON."""
    region = step.target
    target: Any = region.to_list()
    if region.is_all(registers[region.register].size) and step.source is None:
        target = region.register
    found = [step.operation, target, *step.scalars]
    return found if step.source is None else [*found, step.source.to_list()]


def step_of(document: Any, registers: Sequence[Register]) -> Step:
    """Read what `step_document` returns; ValueError for anything else."""
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
        return Step(operation, region, source=Region.of_list(source))
    largest = torch.finfo(registers[region.register].dtype).max if region.register < len(registers) else 0.0
    sound = len(rest) in _COUNTS[operation]
    sound &= all(type(each) in (int, float) and math.isfinite(each) and abs(each) <= largest for each in rest)
    if not sound or (operation == "normal_" and rest[1:] and rest[1] < 0):
        raise ValueError(f"{rest!r} are no scalars of {operation}")
    if operation == "uniform_" and len(rest) == 2 and not 0 <= rest[1] - rest[0] <= largest:
        raise ValueError(f"{rest!r} are no scalars of {operation}")
    return Step(operation, region, tuple(rest))
