"""Types of a diagnosis: measurements of each layer, and of the predictions."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from compressor.measure import EquilibriumNorm, Stationarity
from compressor.model import InspectedLayer


@dataclass(frozen=True)
class DiagnosedLayer:
    """One matrix: the measurements of `inspect`, and those on the training data.

    `norm`: ||W||_F. `initial_norm`: the expected norm of its initialization, None if unknown. `start_energy`: the share
    of ||W||_F^2 that decay left of the initialization, None if unknown. `scaling_degree`: 0 if the outputs do not
    depend on the matrix's scale, 1 if they are proportional to it, None for neither or without data. `stationarity`:
    None without data. `equilibrium`: for scale-invariant matrices only.
    """

    inspected: InspectedLayer
    norm: float
    initial_norm: float | None
    start_energy: float | None
    scaling_degree: Literal[0, 1] | None = None
    stationarity: Stationarity | None = None
    equilibrium: EquilibriumNorm | None = None

    @property
    def name(self) -> str:
        return self.inspected.layer.name

    def to_dict(self) -> dict[str, Any]:
        """The fields of the inspected layer and those of the diagnosis, in the types of JSON."""
        return {
            **self.inspected.to_dict(),
            "norm": self.norm,
            "initial_norm": self.initial_norm,
            "start_energy": self.start_energy,
            "scaling_degree": self.scaling_degree,
            "stationarity": self.stationarity.to_dict() if self.stationarity else None,
            "equilibrium": self.equilibrium.to_dict() if self.equilibrium else None,
        }


@dataclass(frozen=True)
class Predictions:
    """How well the model predicts the data of the diagnosis, compared with chance.

    `value` is an accuracy, and `chance` that of always predicting the most frequent class; or `value` is a perplexity,
    and `chance` that of the uniform distribution, the number of tokens. `loss` is in nats per prediction.
    """

    data: str
    metric: str
    value: float
    loss: float
    count: int
    chance: float

    @property
    def at_chance(self) -> bool:
        """Whether it is no better than chance, within two standard errors of an accuracy."""
        if self.metric == "perplexity":
            return not self.value < self.chance
        return self.value <= self.chance + 2 * math.sqrt(self.chance * (1 - self.chance) / self.count)

    def to_dict(self) -> dict[str, Any]:
        """The fields, in the types of JSON."""
        return asdict(self) | {"at_chance": self.at_chance}
