"""What was asked of a compression, what came out, and whether that meets it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compressor.formatting import format_percent, format_size
from compressor.planning import within_limit
from compressor.report.wording import budget_words, drop_words

if TYPE_CHECKING:
    from compressor.planning import Budget
    from compressor.results import Compression


@dataclass(frozen=True)
class Outcome:
    """One limit that was asked for, and what became of it; `met` is None where there is nothing to meet."""

    asked: str
    got: str
    met: bool | None


def outcomes(compression: Compression) -> tuple[Outcome, ...]:
    """Every part of the budget with what came out."""
    return tuple(_outcomes(compression))


def _outcomes(compression: Compression) -> Iterator[Outcome]:
    for part in compression.plan.budget.parts:
        got, met = _reached(compression, part)
        yield Outcome(budget_words(part), got, met)


def _reached(compression: Compression, budget: Budget) -> tuple[str, bool | None]:
    """What came out in the unit of a limit, and whether it is within it; an empty string where that is not known."""
    plan, value = compression.plan, budget.value
    if value is None:
        return f"{plan.rewritten_words}", None
    match budget.kind:
        case "keep":
            kept = plan.eligible_after / max(1, plan.eligible_before)
            return format_percent(kept), kept <= value * (1 + 1e-9)
        case "max-size":
            return format_size(compression.bytes.after), compression.bytes.after <= value
        case "max-latency":
            changes = compression.latency_changes
            if not changes:
                return "", None
            worst = max(changes, key=lambda each: each.ratio)
            said = "predicted" if worst.predicted_on else "measured"
            return f"{worst.ratio:.2f}x, {said}", worst.ratio <= value * (1 + worst.noise)
        case "max-drop":
            return _drop(compression, value)
        case "tolerance":
            if plan.calibration is not None:  # its errors are in another metric
                return "", None
            largest = max((layer.error for layer in plan.layers), default=0.0)
            return f"{largest:.3g} at most", largest <= value * (1 + 1e-3)
        case "bits":
            there = sum(layer.quantization is not None and layer.bits == value for layer in plan.layers)
            return f"{there} of {len(plan.layers)} layers", there == len(plan.layers)
        case "rank":
            largest_rank = max((layer.rank or 0 for layer in plan.layers), default=0)
            return f"rank {largest_rank} at most", largest_rank <= value
        case _:
            return "", None


def _drop(compression: Compression, limit: float) -> tuple[str, bool | None]:
    """The drop on the data, which the search did not use."""
    evaluation = compression.evaluation
    if evaluation is None or evaluation.drop is None:
        return "", None
    words = drop_words(evaluation.metric, evaluation.drop, evaluation.higher_is_better)
    return f"{words} on {evaluation.data}", within_limit(evaluation.drop, limit)
