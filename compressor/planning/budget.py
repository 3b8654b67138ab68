"""Budgets: how small, or how close."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from compressor.errors import BadInput

BudgetKind = Literal["keep", "max-size", "max-drop", "tolerance", "window-rule", "plan"]


@dataclass(frozen=True)
class Budget:
    """One way to say how much to remove.

    Attributes:
        kind: `keep`: the share of the eligible layers' parameters that may remain. `max-size`: the bytes of the weight
            files. `max-drop`: the smallest model whose accuracy (a fraction) or perplexity is worse by at most that.
            `tolerance`: the relative Frobenius error per layer. `window-rule`: what training wrote above its
            initialization. `plan`: the ranks of an existing plan.
        value: The number; None for `window-rule` and `plan`.
    """

    kind: BudgetKind
    value: float | None = None

    @property
    def option(self) -> str:
        """The option that sets this kind of budget."""
        return self.kind.replace("-", "_")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return self.kind if self.value is None else f"{self.kind} {self.value:g}"


def checked_budget(budget: Budget) -> Budget:
    """The budget itself; `BadInput` where its value is out of range."""
    value = float(budget.value if budget.value is not None else math.nan)
    in_range = {
        "keep": 0 < value <= 1,
        "max-size": value >= 1 and math.isfinite(value),
        "max-drop": 0 <= value < math.inf,
        "tolerance": 0 < value < 1,
    }
    if not in_range[budget.kind]:
        ranges = {
            "keep": "above 0 and at most 1",
            "max-size": "at least one byte",
            "max-drop": "that is not negative",
            "tolerance": "between 0 and 1",
        }
        what, remedy = f"`{budget.option}` {value:g} is out of range", f"give a number {ranges[budget.kind]}"
        raise BadInput(what, option=budget.option, remedy=remedy)
    return budget
