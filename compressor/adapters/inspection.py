"""How much rank the modules of an adapter use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from compressor.adapters.module import Adapter, ModuleKind
from compressor.adapters.resize import ModuleSpectrum
from compressor.choices import AdapterDialect
from compressor.measure import energy_rank, entropy_rank


@dataclass(frozen=True)
class InspectedModule:
    """The rank of a module of an adapter, and how much of it is used.

    Attributes:
        name: The module.
        kind: What it is.
        shape: `(d_out, d_in)` of the matrix that it adds.
        rank: The rank that it has.
        energy_90: The smallest rank that holds 90 % of the energy, the sum of squared singular values.
        energy_99: The same for 99 %.
        entropy: The effective rank of Roy and Vetterli (2007).
        norm: The Frobenius norm of what it adds.
        scale: What the product of its factors counts.
        parameters: The numbers of its factors.
    """

    name: str
    kind: ModuleKind
    shape: tuple[int, int]
    rank: int
    energy_90: int
    energy_99: int
    entropy: float
    norm: float
    scale: float
    parameters: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"shape": list(self.shape)}


@dataclass(frozen=True)
class AdapterInspection:
    """How much rank an adapter uses.

    Attributes:
        dialect: Whose names its tensors have.
        modules: What it changes.
    """

    dialect: AdapterDialect
    modules: tuple[InspectedModule, ...]


def inspected_adapter(adapter: Adapter, spectra: Sequence[ModuleSpectrum]) -> AdapterInspection:
    """How much rank an adapter whose modules have these singular values uses."""
    return AdapterInspection(adapter.dialect, tuple(map(_inspected, spectra)))


def _inspected(spectrum: ModuleSpectrum) -> InspectedModule:
    module, values = spectrum.module, spectrum.values
    return InspectedModule(
        name=str(module.name),
        kind=module.kind,
        shape=module.shape,
        rank=module.rank,
        energy_90=energy_rank(values, 0.9),
        energy_99=energy_rank(values, 0.99),
        entropy=entropy_rank(values),
        norm=float(np.linalg.norm(values)),
        scale=module.scale,
        parameters=module.numbers,
    )
