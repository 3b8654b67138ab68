"""The plan of an adapter: the rank of every module, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compressor.adapters.module import Adapter
from compressor.planning import Budget, LayerPlan, Plan


@dataclass(frozen=True)
class ModulePlan(LayerPlan):
    """The rank of one module of an adapter.

    Attributes:
        rank_before: The rank that it had.
        numbers_before: How many numbers its factors took.
    """

    rank_before: int = 0
    numbers_before: int = 0

    @property
    def dense_parameters(self) -> int:
        """The numbers that it took before: an adapter has no dense layers."""
        return self.numbers_before


def adapter_plan(adapter: Adapter, budget: Budget, ranks: Sequence[int]) -> Plan:
    """The plan of an adapter at ranks in the order of its modules."""
    layers = tuple(
        ModulePlan(
            name=str(module.name),
            shape=module.shape,
            kind=module.kind,
            rank=module.rank if module.kept_as_it_is(rank) else rank,
            form="plain",
            parameters=module.numbers_at(rank),
            error=0.0,
            reason="as it is" if module.kept_as_it_is(rank) else str(budget),
            rank_before=module.rank,
            numbers_before=module.numbers,
        )
        for module, rank in zip(adapter.modules, ranks, strict=True)
    )
    return Plan(adapter.checkpoint.name, None, budget, layers)
