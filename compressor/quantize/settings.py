"""How much work is put into scales and integers, and which widths and groups are tried."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class QuantizationSettings:
    """How much work is put into scales and integers, and which groups are tried.

    The defaults were chosen on layers of the reference models: more candidates and rounds take longer and lower the
    error by less than a hundredth.
    """

    smallest_group: int = 24
    """Fewest inputs that share a scale where a group size does not divide a matrix's inputs."""

    largest_group: int = 160
    """Most inputs that share a scale in such a matrix; one that has no divisor in between gets a scale a row."""

    damping: float = 0.01
    """Share of the mean of the inputs' moment that is added to its diagonal."""

    scale_candidates: int = 16
    """Scales that are tried for each group, from the one that spans all its weights down."""

    scale_rounds: int = 2
    """How often the scale is fitted to the integers and the integers to the scale, from the best candidate."""


DEFAULTS = QuantizationSettings()
