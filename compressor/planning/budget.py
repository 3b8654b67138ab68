"""Budgets: how small, or how close."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from compressor.errors import BadInput

BudgetKind = Literal[
    "keep",
    "max-size",
    "max-latency",
    "max-drop",
    "tolerance",
    "window-rule",
    "bits",
    "plan",
    "rank",
    "energy",
]


@dataclass(frozen=True)
class Budget:
    """One way to say how much to remove.

    Attributes:
        kind: `keep`: the share of the eligible layers' parameters that may remain. `max-size`: the bytes of the weight
            files. `max-latency`: the time of a forward at every batch size, as a ratio to that of the dense model.
            `max-drop`: the smallest model whose accuracy (a fraction) or perplexity is worse by at most that.
            `tolerance`: the relative Frobenius error per layer. `window-rule`: what training wrote above its
            initialization. `bits`: the bits of every layer. `plan`: the ranks of an existing plan.
            Of an adapter alone `rank`: the largest rank of each module; `energy`: the share of the energy of each.
        value: The number; None for `window-rule` and `plan`.
        max_latency: With a size, a limit on the latency as well; else None.
        max_drop: With a size or a latency, the largest drop of what they give; else None.
    """

    kind: BudgetKind
    value: float | None = None
    max_latency: float | None = None
    max_drop: float | None = None

    @property
    def option(self) -> str:
        """The option that sets this kind of budget."""
        return self.kind.replace("-", "_")

    @property
    def latency_limit(self) -> float | None:
        """The latency that it allows, as a ratio to dense; None where it does not limit it."""
        return self.value if self.kind == "max-latency" else self.max_latency

    @property
    def drop_limit(self) -> float | None:
        """The drop in quality that it allows; None where it does not limit it."""
        return self.value if self.kind == "max-drop" else self.max_drop

    @property
    def parts(self) -> tuple[Budget, ...]:
        """The budgets that it consists of, each with one limit."""
        kinds: tuple[BudgetKind, ...] = ("max-latency", "max-drop")
        limits = zip(kinds, (self.max_latency, self.max_drop), strict=True)
        return (Budget(self.kind, self.value), *(Budget(kind, value) for kind, value in limits if value is not None))

    def to_dict(self) -> dict[str, Any]:
        further = ("max_latency", "max_drop")
        return {name: value for name, value in asdict(self).items() if value is not None or name not in further}

    def __str__(self) -> str:
        said = (each.kind if each.value is None else f"{each.kind} {each.value:g}" for each in self.parts)
        return ", ".join(said)


def checked_budget(budget: Budget) -> Budget:
    """The budget itself; `BadInput` where one of its values is out of range."""
    for part in budget.parts:
        _check(part)
    return budget


def _check(budget: Budget) -> None:
    value = float(budget.value if budget.value is not None else math.nan)
    in_range = {
        "keep": 0 < value <= 1,
        "max-size": value >= 1 and math.isfinite(value),
        "max-latency": 0 < value <= 1,
        "max-drop": 0 <= value < math.inf,
        "tolerance": 0 < value < 1,
        "rank": value >= 1,
        "energy": 0 < value <= 1,
    }
    if not in_range[budget.kind]:
        ranges = {
            "keep": "above 0 and at most 1",
            "max-size": "at least one byte",
            "max-latency": "above 0 and at most 1",
            "max-drop": "that is not negative",
            "tolerance": "between 0 and 1",
            "rank": "from 1 on",
            "energy": "above 0 and at most 1",
        }
        what, remedy = f"`{budget.option}` {value:g} is out of range", f"give a number {ranges[budget.kind]}"
        raise BadInput(what, option=budget.option, remedy=remedy)
