"""Rows of before and after: sizes, quality, and the cost of a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compressor.evaluation import Change, LatencyChange, judged
from compressor.formatting import format_count, format_percent, format_seconds, format_short, format_size
from compressor.report.blocks import SideBySide
from compressor.report.wording import change_words, quality_words

if TYPE_CHECKING:
    from compressor.evaluation import Evaluation, Latency
    from compressor.planning import Plan
    from compressor.results import Compression


@dataclass(frozen=True)
class Comparison:
    """One quantity before and after, and how they compare, as text; empty if unknown.

    `change` says whether it is better or worse; None where there is nothing to compare.
    """

    label: str
    before: str
    after: str
    compared: str
    change: Change | None = None


def compared(label: str, words: Callable[[int], str], *, before: int | None, after: int) -> Comparison:
    """A quantity whose later value is shown as a share of the earlier one."""
    if before is None:
        return Comparison(label, "", words(after), "")
    return Comparison(label, words(before), words(after), format_percent(after, before), judged(after - before))


def side_by_side(comparisons: Sequence[Comparison], before: str = "before", after: str = "after") -> SideBySide:
    """Rows of before and after as a block of a page."""
    rows = tuple((each.label, each.before, each.after, each.compared) for each in comparisons)
    worse = frozenset(number for number, each in enumerate(comparisons) if each.change == "worse")
    return SideBySide(("", before, after, "compared"), rows, worse)


def eligible_words(plan: Plan, label: str = "of them eligible") -> str:
    """What the numbers of a plan are called: where some are quantized, they are counted by their bytes."""
    return f"{label}, in 16 bits" if plan.quantized else label


def compression_rows(compression: Compression) -> list[Comparison]:
    """Sizes, and quality and cost if they were measured."""
    plan, evaluation = compression.plan, compression.evaluation
    rows = [
        compared("parameters", format_count, before=compression.parameters.before, after=compression.parameters.after),
        compared(eligible_words(plan), format_count, before=plan.eligible_before, after=plan.eligible_after),
        compared("weight files", format_size, before=compression.bytes.before, after=compression.bytes.after),
    ]
    timed = [latency_row(each.latency, each.workload) for each in compression.latency]
    measured = [] if evaluation is None else quality_rows(evaluation)
    # What was timed on the data too is said once.
    return [*rows, *(row for row in measured if row.label not in {each.label for each in timed}), *timed]


def evaluation_rows(evaluation: Evaluation) -> list[Comparison]:
    """Size, quality and cost of a model beside its baseline, if there is one."""
    before, after = evaluation.baseline_cost, evaluation.compressed_cost
    return [
        compared("parameters", format_count, before=before.parameters if before else None, after=after.parameters),
        compared("weights", format_size, before=before.bytes if before else None, after=after.bytes),
        *quality_rows(evaluation),
    ]


def quality_rows(evaluation: Evaluation) -> list[Comparison]:
    """The metric, and the arithmetic, memory and time of a forward pass."""
    metric, before, after = evaluation.metric, evaluation.baseline_cost, evaluation.compressed_cost
    higher = evaluation.higher_is_better
    baseline = "" if evaluation.baseline is None else quality_words(metric, evaluation.baseline, higher)
    change = "" if evaluation.drop is None else change_words(metric, evaluation.drop, higher)
    after_words = quality_words(metric, evaluation.compressed, higher)
    rows = [Comparison(metric, baseline, after_words, change, evaluation.quality.change)]
    if after.macs is not None:
        rows.append(
            compared("multiply-accumulates", format_short, before=before.macs if before else None, after=after.macs)
        )
    if after.peak_memory_bytes is not None:
        peak = before.peak_memory_bytes if before else None
        rows.append(compared("memory of a batch", format_size, before=peak, after=after.peak_memory_bytes))
    return [*rows, *(latency_row(each, f"batch {each.batch_size}") for each in evaluation.latency)]


def latency_row(timing: Latency, workload: str) -> Comparison:
    """The time of a workload, which is a little different in every run."""
    ratio = timing.ratio
    return Comparison(
        f"latency, {workload}",
        "" if timing.baseline_seconds is None else format_seconds(timing.baseline_seconds),
        format_seconds(timing.compressed_seconds),
        "" if ratio is None else f"{ratio:.2f} x the time",
        None if ratio is None else LatencyChange(workload, ratio).change,
    )
