"""What was found of the weights that a model started from, layer by layer, for those who asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from compressor.initial.weights import Start
from compressor.measure.effective_rank import EffectiveRanks

Origin = Literal["given", "stated", "searched"]
"""Whether initial weights were named, were drawn from a seed that a description of the training states, or searched."""


@dataclass(frozen=True)
class SeedSearch:
    """A search for the seed that a model started from.

    Attributes:
        searched: What was searched, in words.
        tried: How many candidates were drawn.
        seconds: How long it took.
        z: The largest correlation, in standard deviations of chance, of a layer with the seed that was found; None
            where none was.
        next_best: The largest of the seeds that it is not.
        with_overwritten: Whether a default initialization was drawn first that the model's own one overwrites.
        false_hits: How many wrong seeds the whole search is expected to find.
    """

    searched: str
    tried: int
    seconds: float
    z: float | None
    next_best: float
    with_overwritten: bool
    false_hits: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class StartedLayer:
    """A layer that correlates with its initial weights: `W = share * W_0 + what training wrote`.

    Attributes:
        name: The layer's name in the checkpoint.
        start: The correlation, the shares, and how much training wrote.
        ranks: The effective ranks of its matrix.
        written_ranks: Those of what training wrote.
    """

    name: str
    start: Start
    ranks: EffectiveRanks
    written_ranks: EffectiveRanks

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            **asdict(self.start),
            "ranks": self.ranks.to_dict(),
            "written_ranks": self.written_ranks.to_dict(),
        }


@dataclass(frozen=True)
class InitialFound:
    """The initial weights that were looked for, and the layers that still have some of them.

    Attributes:
        source: What they are called: a seed or a checkpoint; empty where a search found none.
        seed: The seed that they are drawn from; None of a checkpoint or a state, or where a search found none.
        origin: Whether they were given, stated where the training is described, or searched.
        eligible: How many layers are eligible.
        layers: The layers that correlate with them, with z of at least 8; the others take forms without them.
        search: The search; None where there was none.
    """

    source: str
    seed: int | None
    origin: Origin
    eligible: int = 0
    layers: tuple[StartedLayer, ...] = ()
    search: SeedSearch | None = None

    @property
    def starts(self) -> Mapping[str, Start]:
        """The start of each layer that correlates, by the layer's name."""
        return {layer.name: layer.start for layer in self.layers}

    def to_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "seed": self.seed,
            "origin": self.origin,
            "eligible": self.eligible,
            "search": None if self.search is None else self.search.to_dict(),
            "layers": [layer.to_dict() for layer in self.layers],
        }
