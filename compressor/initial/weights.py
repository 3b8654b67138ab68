"""The weights that training started from, and what a layer still has of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Start:
    """How a layer's weights correlate with its initial ones: `W = share * W_0 + what training wrote`.

    Attributes:
        correlation: Of the layer's numbers with its initial ones.
        z: The correlation times the square root of the count of numbers: of two random matrices about 1.
        predicted: The share that weight decay left by the layer's own recipe, exp(-K); None where that is not known.
        fitted: The share by least squares; in the metric of the loss where there is one.
        share: The one that is used: predicted where the recipe is known, else fitted.
        written: The norm of what training wrote beside that of the layer.
        rank_bound: The bound on the rank of what training wrote, `B R T`; None where it is vacuous.
    """

    correlation: float
    z: float
    predicted: float | None
    fitted: float
    share: float
    written: float
    rank_bound: int | None = None
