"""What PEFT asks of the experts of a mixture: all of a block are adapted, and those that do the same have one rank.

transformers holds the matrices of a block's experts in two parameters, and PEFT adapts a parameter as a whole: its
pairs are stacked, so they have one rank, and the pair of `gate_up_proj` is found only beside one of `down_proj`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from compressor.errors import BadInput
from compressor.forms import DENSE, PLAIN
from compressor.network import Layer, SeparateExperts
from compressor.planning import Budget, LayerPlan, MeasuredLayer

# Names that PEFT takes for those of experts in any linear layer of a mixture, and drops from `target_modules`.
_NAMES_OF_EXPERTS = frozenset({"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"})


@dataclass(frozen=True)
class ExpertBlock:
    """The experts of a block: for gate, up and down the names of their modules, one an expert."""

    name: str
    roles: tuple[tuple[str, ...], ...]

    @property
    def modules(self) -> frozenset[str]:
        return frozenset(name for role in self.roles for name in role)

    def parameter_ranks(self, ranks: Mapping[str, int]) -> dict[str, int]:
        """The ranks of the parameters that transformers holds these experts in."""
        gate, up, down = (ranks[role[0]] for role in self.roles)
        return {f"{self.name}.gate_up_proj": gate + up, f"{self.name}.down_proj": down}


def expert_blocks(module: nn.Module) -> tuple[ExpertBlock, ...]:
    """The blocks of experts in a tree whose experts are apart."""
    blocks = []
    for name, experts in module.named_modules():
        if isinstance(experts, SeparateExperts):
            count = len(experts.layers)
            names = experts.get_submodule("0").names
            roles = tuple(tuple(f"{name}.{index}.{role}" for index in range(count)) for role in names)  # type: ignore[union-attr]
            blocks.append(ExpertBlock(name, roles))
    return tuple(blocks)


def adapted_as_parameters(modules: Sequence[str], blocks: Sequence[ExpertBlock]) -> frozenset[str]:
    """Those of some linear layers that PEFT adapts only where their weight is named as a parameter."""
    experts = {name for block in blocks for name in block.modules}
    return frozenset(
        name for name in modules if blocks and (name in experts or name.rpartition(".")[2] in _NAMES_OF_EXPERTS)
    )


def padded_ranks(ranks: Mapping[str, int], blocks: Sequence[ExpertBlock]) -> dict[str, int]:
    """The ranks by module with those of all experts in blocks that have any: the largest of their role, or 1."""
    padded = dict(ranks)
    for block in blocks:
        if block.modules.isdisjoint(ranks):
            continue
        for role in block.roles:
            padded |= dict.fromkeys(role, max((ranks[name] for name in role if name in ranks), default=1))
    return padded


def with_common_ranks(
    planned: Sequence[LayerPlan],
    budget: Budget,
    *,
    measured: Sequence[MeasuredLayer],
    layers: Sequence[Layer],
    blocks: Sequence[ExpertBlock],
) -> tuple[LayerPlan, ...]:
    """The plan with one rank for the experts that PEFT stacks.

    For a size it is the mean of what those that changed were given, so that together they do not grow; where errors
    decide it is the largest, and `None`, dense, is larger than any.
    """
    plans = {plan.name: plan for plan in planned}
    sizes = {m.layer.name: m for m in measured}
    names = {layer.module: layer.name for layer in layers}
    for block in blocks:
        for role in block.roles:
            stacked = [plans[names[module]] for module in role if names.get(module) in plans]
            if not stacked:
                continue
            rank = _common_rank(stacked, budget)
            for plan in stacked:
                plans[plan.name] = plan if plan.rank == rank else _at_rank(plan, sizes[plan.name], rank)
    return tuple(plans.values())


def _common_rank(stacked: Sequence[LayerPlan], budget: Budget) -> int | None:
    ranks = [plan.rank for plan in stacked]
    known = [rank for rank in ranks if rank is not None]
    if budget.kind not in ("keep", "max-size"):
        return max(known) if len(known) == len(ranks) else None
    d_out, d_in = stacked[0].shape
    break_even = d_out * d_in / (d_out + d_in)
    return max(1, int(sum(break_even if rank is None else rank for rank in ranks) / len(ranks)))


def _at_rank(plan: LayerPlan, measured: MeasuredLayer, rank: int | None) -> LayerPlan:
    reason = "one rank for the experts of a block, as PEFT stacks them"
    if rank is None:
        return replace(plan, rank=None, form=DENSE, parameters=measured.layer.parameters, error=0.0, reason=reason)
    parameters = PLAIN.parameters(measured.layer, rank)
    error = float(measured.errors(PLAIN.name)[rank])
    return replace(plan, rank=rank, form=PLAIN.name, parameters=parameters, error=error, reason=reason)


def require_pairs_of_experts(
    module: str, tensor: str, blocks: Sequence[ExpertBlock], *, where: Path | None, remedy: str
) -> None:
    """Raise `BadInput` where a tensor that is to be saved whole, in `module`, is an expert's or beside experts."""
    for block in blocks:
        if module in block.modules:
            raise BadInput(
                f"{tensor} has changed by more than a low rank, or is left out, and PEFT holds experts as pairs alone",
                where=where,
                remedy=f"ask for a size with `keep`, or {remedy}",
            )
        if block.name == module or block.name.startswith(f"{module}."):
            raise BadInput(
                f"{tensor} has changed, and PEFT would save the experts in {module} whole with it",
                where=where,
                remedy=remedy,
            )
