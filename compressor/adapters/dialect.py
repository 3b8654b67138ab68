"""What a dialect is: the names that the tensors of an adapter have, and what stands beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from compressor.adapters.module import Adapter, AdapterModule
from compressor.choices import AdapterDialect
from compressor.io import Checkpoint, Document


@dataclass(frozen=True)
class FactorNames:
    """The names of a module's tensors; `alpha` is None where the dialect has no tensor for it."""

    down: str
    up: str
    alpha: str | None = None


@dataclass(frozen=True)
class WrittenModule:
    """A module as it is to be written: with a rank, or as it is.

    `alpha` is what stands for its scale; factors that are computed anew are multiplied so that it does.
    """

    module: AdapterModule
    rank: int
    as_it_is: bool
    alpha: float


@dataclass(frozen=True)
class Description:
    """What stands beside the tensors: the header of a file, and the documents of a folder."""

    metadata: Mapping[str, str] = field(default_factory=dict)
    documents: Mapping[str, Document] = field(default_factory=dict)


class Dialect(Protocol):
    """The names of one family of tools."""

    @property
    def name(self) -> AdapterDialect: ...

    def read(self, checkpoint: Checkpoint) -> Adapter:
        """The adapter of a checkpoint that has such names; `BadInput` for one that means something else."""

    def names(self, module: AdapterModule, adapter: Adapter) -> FactorNames:
        """The names of a module's factors; `BadInput` for a module that the dialect has no name for."""

    def described(self, adapter: Adapter, modules: Sequence[WrittenModule]) -> Description:
        """What stands beside the tensors of an adapter that is written in this dialect."""
