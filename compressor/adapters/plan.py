"""The plan of an adapter: the rank of every module, and why; and the ranks of a plan that was given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compressor.adapters.module import Adapter, AdapterModule
from compressor.errors import BadInput
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


def planned_ranks(adapter: Adapter, plan: Plan, where: str) -> tuple[int, ...]:
    """The ranks of a plan that was given, in the order of the modules; those that it does not name keep theirs.

    Raises:
        BadInput: the plan names what the adapter does not have.
    """
    edits = {layer.name: layer for layer in plan.layers}
    remedy = "correct it, or write a new plan with 'compress plan ADAPTER'"
    if len(edits) < len(plan.layers):
        raise BadInput("the plan names a module twice", where=where, remedy=remedy)
    if unknown := edits.keys() - {str(module.name) for module in adapter.modules}:
        raise BadInput(
            f"the plan names {min(unknown)[:80]}, which this adapter does not change", where=where, remedy=remedy
        )
    return tuple(
        _planned_rank(module, edits.get(str(module.name)), where=where, remedy=remedy) for module in adapter.modules
    )


def _planned_rank(module: AdapterModule, edit: LayerPlan | None, *, where: str, remedy: str) -> int:
    if edit is None or edit.rank is None:
        return module.rank
    if edit.shape not in ((0, 0), module.shape):
        (a, b), (c, d) = edit.shape, module.shape
        raise BadInput(f"the plan's {edit.name} is {a} x {b}, the adapter's {c} x {d}", where=where, remedy=remedy)
    if edit.form != "plain":
        what = f"form {edit.form!r} does not exist for {edit.name}, a module of an adapter"
        raise BadInput(what, where=where, remedy="give it the form plain, and no bits")
    if edit.rank > module.rank:
        what = f"rank {edit.rank} of {edit.name} is above the {module.rank} that it has"
        raise BadInput(what, where=where, remedy=f"give a rank up to {module.rank}, or null to leave it as it is")
    return edit.rank
