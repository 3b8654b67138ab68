"""Skip numbers of PyTorch's generator on the CPU without drawing them.

It is the Mersenne Twister MT19937: each word of its sequence is a sum, exclusive or, of earlier ones, so that `t^n`
modulo the characteristic polynomial of the sequence says of which of the next 19,937 words the n-th is the sum
(Haramoto, Matsumoto, Nishimura, Panneton and L'Ecuyer, "Efficient jump ahead for F2-linear random number generators",
2008).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_WORDS, _MIDDLE, _DEGREE = 624, 397, 19937
_MATRIX, _UPPER, _LOWER = np.uint32(0x9908B0DF), np.uint32(0x80000000), np.uint32(0x7FFFFFFF)
# Where the state of a generator, in bytes, has its words, of eight bytes each.
_AT = slice(24, 24 + 8 * _WORDS)


@dataclass(frozen=True, eq=False)
class Jump:
    """A way over so many words of the generator, 32 bits each, which takes as long for few as for many."""

    words: int

    def states(self, seeds: Sequence[int]) -> list[Tensor]:
        """The states of the generator as many words after it was seeded, for all seeds at once."""
        begun = [torch.Generator().manual_seed(seed).get_state() for seed in seeds]
        first = np.stack([state[_AT].numpy().view(np.uint64).astype(np.uint32) for state in begun], axis=1)
        sequence = _sequence(first, _WORDS + _DEGREE)
        jumped = np.zeros_like(first)
        for place in _terms(self.words):
            jumped ^= sequence[place : place + _WORDS]
        for state, words in zip(begun, jumped.T, strict=True):
            state[_AT] = torch.from_numpy(words.astype(np.uint64).view(np.uint8))
        return begun

    def holds(self, state: Tensor, seed: int) -> bool:
        """Whether a state that was reached by drawing gives the same numbers as the one that is jumped to."""
        one, other = torch.Generator(), torch.Generator()
        one.set_state(state)
        other.set_state(self.states([seed])[0])
        return torch.equal(*(torch.rand(_WORDS, generator=each) for each in (one, other)))


def _sequence(first: NDArray[np.uint32], length: int) -> NDArray[np.uint32]:
    """The sequence of words that goes on from the first 624, before they are tempered; one a column."""
    found = np.empty((length, *first.shape[1:]), np.uint32)
    found[:_WORDS] = first
    step = _WORDS - _MIDDLE  # no further, because each word depends on one that is as far behind
    for start in range(0, length - _WORDS, step):
        end = min(start + step, length - _WORDS)
        mixed = (found[start:end] & _UPPER) | (found[start + 1 : end + 1] & _LOWER)
        odd = (mixed & np.uint32(1)) * _MATRIX
        found[start + _WORDS : end + _WORDS] = found[start + _MIDDLE : end + _MIDDLE] ^ (mixed >> np.uint32(1)) ^ odd
    return found


@cache
def _terms(words: int) -> tuple[int, ...]:
    """The exponents of `t^words` modulo the characteristic polynomial."""
    power = 1
    for bit in bin(words)[2:]:
        power = _reduced(_squared(power))
        if bit == "1":
            power = _reduced(power << 1)
    return tuple(place for place, bit in enumerate(reversed(bin(power)[2:])) if bit == "1")


def _squared(polynomial: int) -> int:
    """The square of a polynomial over two elements: its exponents doubled."""
    return int(bin(polynomial)[2:], 4)


def _reduced(polynomial: int) -> int:
    """The remainder modulo the characteristic polynomial."""
    *lower, _ = _characteristic()
    while (above := polynomial >> _DEGREE) > 0:
        polynomial &= (1 << _DEGREE) - 1
        for exponent in lower:
            polynomial ^= above << exponent
    return polynomial


@cache
def _characteristic() -> tuple[int, ...]:
    """The exponents of the characteristic polynomial, found from twice its degree of bits (Berlekamp and Massey)."""
    start = torch.Generator().manual_seed(0).get_state()[_AT].numpy().view(np.uint64).astype(np.uint32)
    bits = (_sequence(start, 2 * _DEGREE) >> np.uint32(31)).tolist()
    found, before, length, since, seen = 1, 1, 0, 1, 0
    for place, bit in enumerate(bits):
        seen = (seen << 1) | bit
        if (found & seen).bit_count() % 2 == 0:
            since += 1
        elif 2 * length <= place:
            found, before = found ^ (before << since), found
            length, since = place + 1 - length, 1
        else:
            found ^= before << since
            since += 1
    assert length == _DEGREE
    return tuple(sorted(length - place for place, bit in enumerate(reversed(bin(found)[2:])) if bit == "1"))
