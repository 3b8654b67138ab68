"""Effective ranks: how many directions a matrix really uses, from its singular values.

Every function takes the singular values `s` of one matrix in descending order and is invariant under scaling.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from compressor.measure.scale import power_of_two

Spectrum = npt.NDArray[np.float64]

FROBENIUS_ERROR = 0.1
"""The default relative error of the Frobenius rank."""


@dataclass(frozen=True)
class EffectiveRanks:
    """The effective ranks of one matrix, each under its standard name."""

    full: int
    numerical: int
    frobenius: int
    energy: int
    entropy: float
    participation_ratio: float
    stable: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def numerical_rank(s: Spectrum, epsilon: float = 1e-3) -> int:
    """Number of singular values above `epsilon` times the largest (numerical rank in the spectral norm)."""
    return int(np.count_nonzero(s > epsilon * s[0])) if s.size and s[0] > 0 else 0


def frobenius_rank(s: Spectrum, epsilon: float = FROBENIUS_ERROR) -> int:
    """Smallest k whose best rank-k approximation has a relative Frobenius error of at most `epsilon`.

    By Eckart and Young (1936) that error is sqrt(sum_{i>k} s_i^2 / sum_i s_i^2).
    """
    return int(np.count_nonzero(truncation_errors(s)[:-1] > epsilon))


def energy_rank(s: Spectrum, share: float = 0.99) -> int:
    """Smallest k whose leading singular values hold `share` of the energy, the sum of squares."""
    energy = np.square(s / power_of_two(s))
    total = float(energy.sum())
    return int(np.searchsorted(np.cumsum(energy), share * total * (1 - 1e-12)) + 1) if total > 0 else 0


def entropy_rank(s: Spectrum) -> float:
    """exp of the Shannon entropy of s / sum(s): the effective rank of Roy and Vetterli (EUSIPCO 2007)."""
    total = float(s.sum())
    if total == 0:
        return 0.0
    p = s[s > 0] / total
    return float(np.exp(-np.sum(p * np.log(p))))


def participation_ratio(s: Spectrum) -> float:
    """(sum s^2)^2 / sum s^4: how many equal singular values would have these two moments."""
    if not s.size or s[0] == 0:
        return 0.0
    energy = np.square(s / s[0])
    return float(energy.sum() ** 2 / np.square(energy).sum())


def stable_rank(s: Spectrum) -> float:
    """||W||_F^2 / ||W||_2^2 (Rudelson and Vershynin 2007); too small to truncate at, since it measures energy."""
    return float(np.square(s / s[0]).sum()) if s.size and s[0] > 0 else 0.0


def truncation_errors(s: Spectrum) -> Spectrum:
    """Relative Frobenius error of the best rank-k approximation for k = 0 .. len(s); the last is exactly 0."""
    tail = np.concatenate([np.cumsum(np.square(s / power_of_two(s))[::-1])[::-1], [0.0]])
    return np.sqrt(tail / tail[0]) if tail[0] > 0 else np.zeros_like(tail)


def effective_ranks(s: Spectrum) -> EffectiveRanks:
    """All effective ranks of the matrix with singular values `s`, at their default thresholds."""
    return EffectiveRanks(
        full=int(s.size),
        numerical=numerical_rank(s),
        frobenius=frobenius_rank(s),
        energy=energy_rank(s),
        entropy=entropy_rank(s),
        participation_ratio=participation_ratio(s),
        stable=stable_rank(s),
    )
