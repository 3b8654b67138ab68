"""The ranks of an adapter's modules from one budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from compressor.adapters.module import Adapter
from compressor.adapters.resize import ModuleSpectrum
from compressor.errors import QualityGateNotMet
from compressor.formatting import format_size
from compressor.measure import energy_rank
from compressor.planning import Budget


def needs_spectra(budget: Budget) -> bool:
    """Whether the singular values decide about the ranks."""
    return budget.kind != "rank"


def adapter_ranks(
    adapter: Adapter,
    budget: Budget,
    *,
    spectra: Sequence[ModuleSpectrum] = (),
    size_at: Callable[[Sequence[int]], int] | None = None,
) -> tuple[int, ...]:
    """The rank of each module, in their order, at least one.

    `rank` is the largest of every module. `energy` and `tolerance` are those of each module. `keep` and `max-size`,
    which needs the size of the files at given ranks, are of all modules together: for each number that is stored the
    largest sum of squared singular values, by one threshold over all modules (Eckart and Young 1936).

    Raises:
        QualityGateNotMet: rank one in every module is larger than `max-size`.
    """
    value = budget.value or 0.0
    if budget.kind == "rank":
        return tuple(min(int(value), module.rank) for module in adapter.modules)
    if budget.kind in ("energy", "tolerance"):
        share = value if budget.kind == "energy" else 1 - value**2
        return tuple(max(1, energy_rank(each.values, share)) for each in spectra)
    shares = _Shares(adapter, spectra)
    if budget.kind == "keep":
        limit = math.floor(value * sum(module.numbers for module in adapter.modules))
        fits = shares.largest(lambda ranks: shares.numbers(ranks) <= limit)
        return shares.ranks(fits)
    assert budget.kind == "max-size"
    assert size_at is not None
    limit = int(value)
    fits = shares.largest(lambda ranks: size_at(ranks) <= limit)
    ranks = shares.ranks(fits)
    if (least := size_at(ranks)) > limit:
        where = adapter.checkpoint.name
        raise QualityGateNotMet(
            f"{where}: even at rank one its file has {format_size(least)}; ask for a larger `max_size`"
        )
    return ranks


class _Shares:
    """The singular values of all modules in the order in which they are kept: by energy per number that they take."""

    def __init__(self, adapter: Adapter, spectra: Sequence[ModuleSpectrum]) -> None:
        self._adapter = adapter
        values = [each.values[1 : module.rank] ** 2 for each, module in zip(spectra, adapter.modules, strict=True)]
        sides = np.array([sum(module.shape) for module in adapter.modules], dtype=np.float64)
        owners = np.repeat(np.arange(len(values)), [len(each) for each in values])
        gains = np.concatenate([*values, np.zeros(0)]) / sides[owners]
        # Of equal gains the first of each module come first, as they must: the order is stable.
        self._order = owners[np.argsort(-gains, kind="stable")]

    def ranks(self, kept: int) -> tuple[int, ...]:
        """The ranks where the first of each module and so many of the others are kept."""
        counts = np.bincount(self._order[:kept], minlength=len(self._adapter.modules))
        return tuple(int(count) + 1 for count in counts)

    def numbers(self, ranks: Sequence[int]) -> int:
        """How many numbers the factors take."""
        return sum(module.numbers_at(rank) for module, rank in zip(self._adapter.modules, ranks, strict=True))

    def largest(self, fits: Callable[[Sequence[int]], bool]) -> int:
        """How many can be kept, found by bisection: what they take grows with them."""
        low, high = 0, len(self._order)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(self.ranks(middle)) else (low, middle - 1)
        return low
