"""How much work is put into scales and integers, and which widths and groups are tried."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class QuantizationSettings:
    """How much work is put into scales and integers, and which groups are tried.

    The defaults were chosen by the loss of the reference models at 2, 3, and 4 bits.
    """

    smallest_group: int = 24
    """Fewest inputs that share a scale where a group size does not divide a matrix's inputs."""

    largest_group: int = 160
    """Most inputs that share a scale in such a matrix; one that has no divisor in between gets a scale a row."""

    damping: float = 0.03
    """Share of the mean of the inputs' moment that is added to its diagonal."""

    gradient_damping: float = 1.0
    """The same of the gradients' moment, of which fewer numbers are known well: with less, the loss in the metric is
    lower and that of the model higher."""

    rounds: int = 4
    """Most rounds after the first pass of GPTQ, each of which fits the scales and chooses the integers anew."""

    gain: float = 0.02
    """Share of the loss in the metric that a round must remove for another to follow."""

    scale_steps: int = 3
    """Steps of conjugate gradients in which the scales are fitted to the integers in the metric."""

    block: int = 128
    """Inputs, and outputs, whose errors are carried one by one; those of blocks are by matrix products."""

    scale_step: float = 0.05
    """Step between the scales that are tried for each group, as a share of the one that spans all its weights. The more
    bits there are, the fewer of the smaller ones are tried."""

    scale_rounds: int = 2
    """How often the scale is fitted to the integers and the integers to the scale, from the best candidate."""


DEFAULTS = QuantizationSettings()
