"""Sequences that repeat, as those of the blocks of a network, found so that each is written once."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

# How long what repeats may be, and how many items have to be saved.
_LONGEST, _LEAST_SAVED = 256, 4


@dataclass(frozen=True)
class Repeat:
    """Items from a place on that come several times, their numbers larger by the same strides each time."""

    place: int
    length: int
    times: int
    strides: tuple[tuple[int, ...], ...]


def repeats_of(keys: Sequence[Hashable], numbers: Sequence[tuple[int, ...]]) -> Iterator[Repeat]:
    """All of a sequence, in order, as what repeats; what does not comes once, as an item by itself.

    Args:
        keys: What is the same of items that repeat.
        numbers: Those of each item that advance, as many for each of equal items.
    """
    known: dict[Hashable, int] = {}
    same = [known.setdefault(key, len(known)) for key in keys]
    place = 0
    while place < len(same):
        found = _repeat(same, numbers, place)
        yield found
        place += found.length * found.times


def _repeat(keys: Sequence[int], numbers: Sequence[tuple[int, ...]], place: int) -> Repeat:
    best = Repeat(place, 1, 1, ())
    for length in range(1, min(_LONGEST, (len(keys) - place) // 2) + 1):
        if keys[place : place + length] != keys[place + length : place + 2 * length]:
            continue
        strides = tuple(
            tuple(after - before for before, after in zip(*pair, strict=True))
            for pair in zip(numbers[place : place + length], numbers[place + length : place + 2 * length], strict=True)
        )
        times = 2
        while all(
            place + times * length + own < len(keys)
            and keys[place + times * length + own] == keys[place + own]
            and numbers[place + times * length + own]
            == tuple(first + times * by for first, by in zip(numbers[place + own], strides[own], strict=True))
            for own in range(length)
        ):
            times += 1
        if length * (times - 1) >= max(_LEAST_SAVED, best.length * (best.times - 1) + 1):
            best = Repeat(place, length, times, strides)
    return best
