"""The weights that training started from, and what a layer still has of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


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


@dataclass(frozen=True)
class InitialWeights:
    """The weights that training started from, each drawn again or read when it is asked for.

    Attributes:
        source: What they are called in messages.
        read: The tensor of a name in the state of the module, None where there is none.
    """

    source: str
    read: Callable[[str], Tensor | None] = field(repr=False)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], source: str = "the initial state") -> InitialWeights:
        """Those of a module's state that was kept."""
        return cls(source, state.get)
