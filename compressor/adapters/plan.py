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
    """

    rank_before: int = 0


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
            before=module.numbers,
            rank_before=module.rank,
        )
        for module, rank in zip(adapter.modules, ranks, strict=True)
    )
    return Plan(adapter.checkpoint.name, None, budget, layers)
