"""The seed that a model started from, found by how its matrices correlate with what candidates draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from compressor.initial.draws import Draws
from compressor.initial.probe import Probe, probe_of
from compressor.initial.weights import LEAST_Z, correlation_of, initial_name
from compressor.io import Checkpoint
from compressor.network import Layer


@dataclass(frozen=True)
class SearchSettings:
    """Which seeds are tried, and on how many numbers.

    Attributes:
        seeds: How many are tried from 0 on.
        customary: Further ones that scripts often set.
        numbers: How many numbers of a candidate are looked at; more where the first matrix cannot be drawn in part.
        most_numbers: How many numbers all candidates draw; fewer are tried from 0 on where each needs many.
        jump_from: From how many numbers on those that come before are jumped over, which takes as long for more.
        at_once: For how many seeds.
        least_size: The numbers of the smallest matrix that is looked at.
    """

    seeds: int = 10_000
    customary: tuple[int, ...] = (
        *(12345, 123456, 1234567, 12345678, 123456789, 1234567890, 54321, 654321, 987654321, 31415, 314159, 3141592),
        *(27182, 271828, 161803, 10_000, 11111, 22222, 33333, 55555, 77777, 99999, 100_000, 111111, 424242, 1_000_000),
        *(19260817, 20200101, 20210101, 20220101, 20230101, 20240101, 20250101, 0xDEADBEEF, 0xCAFE, 2**31 - 1),
        *(2**32 - 1, 2**16 - 1, 2**16, 65537),
    )
    numbers: int = 2**17
    most_numbers: int = 2**34
    jump_from: int = 2**18
    at_once: int = 64
    least_size: int = 1024


SEARCH = SearchSettings()

# After so many candidates it is reported how many there were.
_REPORTED = 64


@dataclass(frozen=True)
class FoundSeed:
    """A seed whose numbers a model still has.

    Attributes:
        seed: The seed.
        draws: What the initialization draws from it.
        z: How the layers correlate with it, by name, in standard deviations of chance: those with at least 8.
        with_overwritten: Whether a default initialization was drawn first that the model's own one overwrites.
        tried: How many candidates were drawn until it was found.
        next_best: The largest z of those that it is not.
    """

    seed: int
    draws: Draws = field(repr=False)
    z: Mapping[str, float] = field(repr=False)
    with_overwritten: bool
    tried: int
    next_best: float


def find_seed(
    draws: Draws,
    checkpoint: Checkpoint,
    layers: Sequence[Layer],
    *,
    stated: Iterable[int] = (),
    settings: SearchSettings = SEARCH,
    report: Callable[[int, int, float], None] | None = None,
) -> FoundSeed | None:
    """Find the seed that a model's initialization was drawn from.

    Stated seeds are tried first, then those from 0 on, then customary ones; each with the default initialization that
    the model's own one overwrites, as PyTorch draws it, and without it, as libraries do that skip it. A candidate draws
    only as much as the first matrices need. It is a hit where their correlation stands 8 standard deviations above
    chance, which a wrong seed reaches once in 10^15, and where another matrix, if there is one, confirms it.

    Args:
        draws: The record of the initialization, from any seed.
        checkpoint: The trained weights.
        layers: Its layers.
        stated: Seeds that were stated where the training is described.
        settings: Which seeds are tried.
        report: Called now and then, and at the end, with how many candidates were tried, how many there are, and the
            largest z of those that are no hit.

    Returns:
        The first hit that holds; None where there is none. Seeds that were set on an accelerator draw other numbers
        there, and are not found.
    """
    names = _names(draws, layers, settings)
    if not names:
        return None
    probes = _probes(draws, names, settings)
    weights = [_looked_at(probe.first, names, checkpoint) for probe in probes]
    report = report or _unheard
    seeds = _seeds(probes, stated, settings)
    least, tried, total = 0.0, 0, len(seeds) * len(probes)
    for tried, (seed, which, generator) in enumerate(_candidates(probes, seeds, settings.at_once), start=1):
        z = _strongest(probes[which].first, weights[which], generator)
        if z >= LEAST_Z:
            whole = probes[which].draws.with_seed(seed)
            found = _confirmed(whole, names, checkpoint)
            if found:
                report(tried, total, least)
                with_overwritten = which == 0 and len(probes) > 1
                return FoundSeed(seed, whole, found, with_overwritten, tried, next_best=least)
        least = max(least, z)
        if tried % _REPORTED == 0:
            report(tried, total, least)
    report(tried, total, least)
    return None


def _unheard(tried: int, total: int, largest: float) -> None:
    """Tell nobody."""


def false_hits(draws: Draws, layers: Sequence[Layer], *, settings: SearchSettings = SEARCH) -> float:
    """How many wrong seeds the whole search is expected to take for hits, before another matrix confirms them.

    The correlation of a matrix with numbers that are independent of it is normal, and of a candidate each first matrix
    is looked at, and all of them together.
    """
    names = _names(draws, layers, settings)
    if not names:
        return 0.0
    probes = _probes(draws, names, settings)
    looks = sum(len(probe.first.names) + (len(probe.first.names) > 1) for probe in probes)
    return len(_seeds(probes, (), settings)) * looks * math.erfc(LEAST_Z / math.sqrt(2)) / 2


def what_is_searched(
    draws: Draws, layers: Sequence[Layer], *, stated: Iterable[int] = (), settings: SearchSettings = SEARCH
) -> str:
    """What `find_seed` tries, in words, for messages."""
    names = _names(draws, layers, settings)
    if not names:
        return "nothing: no matrix depends on the seed by draws that are known"
    probes = _probes(draws, names, settings)
    others = {*range(_from_zero(probes, settings)), *settings.customary}
    own = "".join(f"{seed}, " for seed in dict.fromkeys(stated) if seed not in others)
    both = ", each with and without the default initialization that is overwritten" if len(probes) > 1 else ""
    tried = f"{own}0 to {_from_zero(probes, settings) - 1:,} and {len(settings.customary)} customary seeds{both}"
    return f"{tried}; what accelerators draw from these seeds was not tried"


def _names(draws: Draws, layers: Sequence[Layer], settings: SearchSettings) -> dict[str, Layer]:
    """The layers whose initial weights depend on the seed, by the names that these have in the module's state."""
    found: dict[str, Layer] = {}
    for layer in layers:
        for name in (initial_name(layer), layer.tensor):
            region = draws.tensors.get(name)
            if region is not None and region.shape == layer.tensor_shape and layer.parameters >= settings.least_size:
                found.setdefault(name, layer)
                break
    one, other = (dict(draws.with_seed(seed).replay(found)) for seed in (0, 1))
    return {name: layer for name, layer in found.items() if not torch.equal(one[name], other[name])}


def _has_overwritten(draws: Draws) -> bool:
    return draws.without_overwritten().numbers < draws.numbers


def _probes(draws: Draws, names: Mapping[str, Layer], settings: SearchSettings) -> list[Probe]:
    """What is drawn of each way to make the initialization."""
    found = [draws, draws.without_overwritten()] if _has_overwritten(draws) else [draws]
    return [probe_of(each, names, numbers=settings.numbers, jump_from=settings.jump_from) for each in found]


def _seeds(probes: Sequence[Probe], stated: Iterable[int], settings: SearchSettings) -> list[int]:
    """The seeds that are tried, in order."""
    small = range(_from_zero(probes, settings))
    return list(dict.fromkeys(chain(stated, small, settings.customary)))


def _candidates(
    probes: Sequence[Probe], seeds: Sequence[int], at_once: int
) -> Iterator[tuple[int, int, torch.Generator]]:
    """Every seed with every probe, by its place, in order; and the generator to draw with."""
    for start in range(0, len(seeds), at_once):
        some = seeds[start : start + at_once]
        for seed, *generators in zip(some, *(probe.generators(some) for probe in probes), strict=True):
            for which, generator in enumerate(generators):
                yield seed, which, generator


def _from_zero(probes: Sequence[Probe], settings: SearchSettings) -> int:
    """How many seeds are tried from 0 on: at least 100, and no more than there are numbers for."""
    each = sum(
        probe.first.numbers + (probe.skipped.numbers if probe.jump is None else settings.jump_from) for probe in probes
    )
    return min(settings.seeds, max(100, settings.most_numbers // max(1, each) - len(settings.customary)))


def _looked_at(draws: Draws, names: Mapping[str, Layer], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The weights of the matrices that are drawn, or as many of their first numbers."""
    return {
        name: _normalized(checkpoint.read(names[name].tensor).flatten()[: math.prod(region.shape)])
        for name, region in draws.tensors.items()
    }


def _normalized(weight: Tensor) -> Tensor:
    """The numbers of a weight without their mean, of norm 1."""
    flat = weight.detach().flatten().to(torch.float64)
    flat = flat - flat.mean()
    return torch.nan_to_num(flat / flat.norm()).to(torch.float32)


def _strongest(draws: Draws, weights: Mapping[str, Tensor], generator: torch.Generator) -> float:
    """The z of the matrix that correlates most, or of all together where that is more."""
    every = []
    for name, drawn in draws.replay(weights, generator):
        flat = drawn.flatten().to(torch.float32)
        # The mean of what is drawn drops out of the product with numbers whose mean is zero.
        norm = float(torch.std(flat, correction=0)) * math.sqrt(flat.numel())
        every.append(float(torch.dot(flat, weights[name])) / norm * math.sqrt(flat.numel()) if norm > 0 else 0.0)
    return max(*every, sum(every) / math.sqrt(len(every))) if len(every) > 1 else every[0]


def _confirmed(draws: Draws, names: Mapping[str, Layer], checkpoint: Checkpoint) -> dict[str, float]:
    """The z of every layer that correlates; none where there are others and not two do."""
    found = {}
    for name, drawn in draws.replay(names):
        layer = names[name]
        weight = checkpoint.read(layer.tensor).to(torch.float64)
        z = correlation_of(weight, drawn.to(torch.float64)) * math.sqrt(weight.numel())
        if z >= LEAST_Z:
            found[layer.name] = z
    return found if len(found) >= min(2, len(names)) else {}
