"""What a candidate of a search draws: the first matrices of an initialization, or the first part of a large one."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from compressor.initial.draws import Draws
from compressor.initial.jump import Jump
from compressor.initial.steps import DRAWS


@dataclass(frozen=True, eq=False)
class Probe:
    """The first draws of an initialization whose numbers are in its matrices.

    Attributes:
        draws: The whole initialization.
        skipped: The draws before these.
        jump: The way over them; None where they are made.
        first: The draws that are looked at, and the matrices that they give, or the first numbers of one.
    """

    draws: Draws
    skipped: Draws = field(repr=False)
    jump: Jump | None
    first: Draws = field(repr=False)

    def generators(self, seeds: Sequence[int]) -> Iterator[torch.Generator]:
        """A generator for each seed, with which `first` can be drawn."""
        if self.jump is not None:
            for state in self.jump.states(seeds):
                yield torch.Generator().set_state(state)
            return
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for _ in self.skipped.replay((), generator):
                pass
            yield generator


def probe_of(draws: Draws, names: Collection[str], *, numbers: int, jump_from: int) -> Probe:
    """What to draw of an initialization.

    Args:
        draws: The whole of it.
        names: The matrices, all of which depend on the seed.
        numbers: How many numbers are looked at: of all matrices that are complete by then, else of the first one.
        jump_from: From how many numbers on the draws before are jumped over.
    """
    begin = min(draws.places_of_draws(names))
    skipped = replace(draws, steps=tuple(step for step in draws.steps[:begin] if step.operation in DRAWS), tensors={})
    first = _first(draws.without_draws(begin), names, numbers)
    words = _words(skipped) if skipped.numbers >= jump_from else None
    jump = None if words is None else Jump(words)
    if jump is not None:
        [drawn] = Probe(draws, skipped, None, first).generators([0])
        jump = jump if jump.holds(drawn.get_state(), 0) else None
    return Probe(draws, skipped, jump, first)


def _first(draws: Draws, names: Collection[str], numbers: int) -> Draws:
    """The draws of so many numbers, or of as many as the first matrix needs that cannot be drawn in part."""
    wanted = set(names)
    while not (complete := wanted & draws.first(numbers).names):
        if (part := next(filter(None, (draws.part(name, numbers) for name in names)), None)) is not None:
            return part
        numbers *= 2
    return draws.first(numbers).only(complete)


def _words(draws: Draws) -> int | None:
    """How many words of the generator the draws take; None where that is not known."""
    words = 0
    for step in draws.steps:
        size, strides = math.prod(step.target.shape), step.target.strides
        normal = step.operation == "normal_"
        if strides != (1,) or draws.registers[step.target.register].dtype == torch.float64 or (normal and size < 16):
            return None
        # The last 16 normal numbers are drawn again where these are not a whole block.
        words += size + (16 if normal and size % 16 else 0)
    return words
