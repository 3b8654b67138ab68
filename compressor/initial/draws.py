"""The random draws of an initialization: kept as data, and replayed bit by bit.

A record is a list of steps on registers, each the memory of one tensor. Steps are random draws and what was done to
their results: a few operations in place, each on a whole register or on a strided region of it. Draws advance the
generator, so all of them are replayed in order; all other steps only where a tensor that is wanted depends on them.
PyTorch draws the same numbers from the same seed on every CPU, but for the last bits, which depend on the width of its
vectors.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from compressor.initial.steps import (
    DRAWS,
    OVERWRITE,
    Region,
    Register,
    Step,
    registers_document,
    registers_of,
    steps_document,
    steps_of,
)

# More than any initialization takes: a model of a thousand layers has ten thousand steps.
_MOST_STEPS = 2**18
# What `Draws.to_dict` is written in.
_FORMAT = 1


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
        kept = self._used_steps()
        return replace(self, steps=tuple(step for place, step in enumerate(self.steps) if place in kept))

    def _used_steps(self) -> set[int]:
        """The places of the steps whose results are not overwritten before they are used."""
        sizes = [each.size for each in self.registers]
        kept: set[int] = set()
        overwritten: set[int] = set()
        for place, step in reversed(list(enumerate(self.steps))):
            register = step.target.register
            if register in overwritten:
                continue
            if step.operation in OVERWRITE and step.target.is_all(sizes[register]):
                overwritten.add(register)
            if step.source is not None:
                overwritten.discard(step.source.register)
            kept.add(place)
        return kept

    def places_of_draws(self, names: Collection[str]) -> list[int]:
        """The places, among the steps, of the draws whose numbers are in some tensors."""
        needed, used = self._needed([self.tensors[name] for name in names]), self._used_steps()
        return [
            place
            for place, step in enumerate(self.steps)
            if place in used and step.operation in DRAWS and step.target.register in needed
        ]

    def without_draws(self, end: int) -> Draws:
        """The same without the draws among its first steps."""
        kept = (step for place, step in enumerate(self.steps) if place >= end or step.operation not in DRAWS)
        return replace(self, steps=tuple(kept))

    def part(self, name: str, numbers: int) -> Draws | None:
        """The record of the first numbers of a tensor, a multiple of 16; None where they do not come first.

        The numbers of a draw do not depend on how many there are, but for the last 16 of normal ones.
        """
        region = self.tensors[name]
        size, needed = self.registers[region.register].size, self._needed([region])
        steps = [step for step in self.steps if step.target.register in needed]
        drawn = [step for step in self.steps if step.operation in DRAWS]
        regions = [each for step in steps for each in (step.target, step.source) if each is not None]
        whole = all(self.registers[each.register].size == size and each.is_all(size) for each in (region, *regions))
        alone = [step for step in steps if step.operation in DRAWS] == drawn[:1]
        if not whole or not alone or numbers % 16 or numbers > size - 16:
            return None

        def part(of: Region) -> Region:
            return Region(of.register, (numbers,), (1,))

        registers = tuple(
            replace(each, size=numbers) if place in needed else each for place, each in enumerate(self.registers)
        )
        steps = [
            replace(step, target=part(step.target), source=None if step.source is None else part(step.source))
            for step in steps
        ]
        found = replace(self, registers=registers, steps=tuple(steps), tensors={name: part(region)})
        return _compact(found, needed)

    def replay(
        self, names: Collection[str] | None = None, generator: torch.Generator | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Draw tensors again, each given when its last step is done, in memory of its own.

        Only what is still needed is kept. The generator is one of its own that is seeded, if none is given.
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
        generator = generator or torch.Generator().manual_seed(self.seed)
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
        if region.register in self._latest:
            return region.of(self._latest[region.register]).clone()
        needed = self._needed([region])
        memory = {register: self._empty(register) for register in needed}
        generator = torch.Generator()
        for place, step in enumerate(self.steps):
            if step.target.register in needed:
                if step.operation in DRAWS:
                    generator.set_state(self._states[place])
                step.run(memory, generator)
        self._latest.clear()
        if not region.is_all(self.registers[region.register].size):  # others, such as more experts, may lie there too
            self._latest[region.register] = memory[region.register]
        return region.of(memory[region.register]).clone()

    @cached_property
    def _latest(self) -> dict[int, Tensor]:
        """The memory that the latest tensor is a part of, by its register."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: each for name, each in self.__dict__.items() if name != "_latest"}

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
        return {
            "format": _FORMAT,
            "seed": self.seed,
            "torch": self.torch_version,
            "registers": registers_document(self.registers),
            "steps": steps_document(self.steps, self.registers),
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
            if document["format"] != _FORMAT:
                raise ValueError(f"it is a record of format {document['format']!r} instead of {_FORMAT}")
            seed, version = document["seed"], document["torch"]
            registers = registers_of(document["registers"], most=_MOST_STEPS)
            if any(each.size > most_numbers for each in registers):
                raise ValueError("it holds more numbers than the model")
            steps = steps_of(document["steps"], registers, most=_MOST_STEPS)
            tensors = {name: Region.of_list(region) for name, region in document["tensors"].items()}
        except KeyError as error:
            raise ValueError(f"it is no record of draws: it has no {error}") from None
        except (TypeError, AttributeError, IndexError, OverflowError) as error:
            raise ValueError(f"it is no record of draws: {error}") from None
        found = cls(seed, version, registers, steps, tensors)
        found._require_sound(most_numbers)
        return found

    def _require_sound(self, most_numbers: int) -> None:
        if type(self.seed) is not int or not 0 <= self.seed < 2**64 or not isinstance(self.torch_version, str):
            raise ValueError("its seed or release is none")
        for region in self.tensors.values():
            if region.register >= len(self.registers) or region.end > self.registers[region.register].size:
                raise ValueError("a tensor is outside of its register")
            if region.overlaps:
                raise ValueError("numbers of a tensor lie on others")
        if not self.is_within(most_numbers):
            raise ValueError("it draws more numbers than the model has")

    def is_within(self, numbers: int) -> bool:
        """Whether it draws and holds no more than the initialization of a model of so many numbers may.

        A library may draw a default initialization, its own, and again what it rejects.
        """
        largest = max((each.size for each in self.registers), default=0)
        return self.numbers <= 8 * numbers + 2**16 and largest <= numbers + 2**16


def _compact(draws: Draws, needed: Collection[int]) -> Draws:
    """The same with the registers that have steps or tensors alone; draws that nobody needs share one of their size."""
    used = [region.register for step in draws.steps for region in (step.target, step.source) if region is not None]
    used += [region.register for region in draws.tensors.values()]
    in_order = dict.fromkeys(used)
    # Scratch memory comes first, so that those of repeated blocks have numbers that advance evenly.
    registers = list(dict.fromkeys(draws.registers[each] for each in in_order if each not in needed))
    places = {each: registers.index(draws.registers[each]) for each in in_order if each not in needed}
    for each in in_order:
        if each in needed:
            places[each] = len(registers)
            registers.append(draws.registers[each])

    def moved(region: Region) -> Region:
        return replace(region, register=places[region.register])

    steps = tuple(
        replace(step, target=moved(step.target), source=None if step.source is None else moved(step.source))
        for step in draws.steps
    )
    tensors = {name: moved(region) for name, region in draws.tensors.items()}
    return replace(draws, registers=tuple(registers), steps=steps, tensors=tensors)
