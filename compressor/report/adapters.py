"""Results about adapters as pages, with a row for each module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from compressor.adapters import AdapterInspection, InspectedModule, ModulePlan
from compressor.formatting import (
    format_count,
    format_percent,
    format_seconds,
    format_shape,
    format_size,
    one_line,
)
from compressor.report.blocks import Block, Facts, LayerTable, Page, VerdictLine
from compressor.report.comparison import compared, side_by_side
from compressor.report.wording import budget_words, error_words

if TYPE_CHECKING:
    from compressor.planning import Budget
    from compressor.results import AdapterChange, Compression, Inspection, Merging

DIALECTS = {"peft": "PEFT", "kohya": "kohya's scripts", "diffusers": "diffusers"}


def adapter_page(compression: Compression, adapter: AdapterChange) -> Page:
    """The page of `compress ADAPTER`: what it is, the ranks, the sizes before and after, and where it is."""
    modules = [layer for layer in compression.plan.layers if isinstance(layer, ModulePlan)]
    lost = [] if adapter.error is None else [("error", f"{error_words(adapter.error, 3)} of all updates together")]
    rows = [
        compared("parameters", format_count, before=compression.parameters.before, after=compression.parameters.after),
        compared("weight files", format_size, before=compression.bytes.before, after=compression.bytes.after),
    ]
    effort = f"{format_seconds(compression.seconds)}, peak memory {format_size(compression.peak_memory_bytes)}"
    parts: list[Block] = [
        VerdictLine(compression.verdict.remarks),
        Facts.of(
            ("adapter", f"{compression.source}, {_words(adapter)}"),
            ("budget", _budget_words(compression.plan.budget)),
            *lost,
        ),
        _ranks(modules),
        side_by_side(rows),
    ]
    parts += [Facts.of(*(("warning", words) for words in compression.warnings))] if compression.warnings else []
    pushed = [("pushed", compression.pushed)] if compression.pushed is not None else []
    output = compression.output or "nothing was written"
    parts.append(Facts.of(("output", output), *pushed, ("took", effort)))
    return Page(tuple(parts))


def merged_adapters_page(merging: Merging, adapter: AdapterChange) -> Page:
    """The page of `compress merge ADAPTER ADAPTER`: what was added, the sizes, and where it is."""
    named = zip(merging.models, merging.weights, strict=True)
    models = [(f"adapter {at}", f"{model}, weight {weight:g}") for at, (model, weight) in enumerate(named, start=1)]
    lost = [] if adapter.error is None else [("error", f"{error_words(adapter.error, 3)} of their sum")]
    rows = [
        compared("parameters", format_count, before=merging.parts_parameters, after=merging.parameters),
        compared("weight files", format_size, before=merging.parts_bytes, after=merging.bytes),
    ]
    truncated = f"{adapter.modules:,} modules, {adapter.resized:,} truncated"
    facts = Facts.of(*models, ("merged", f"in the names of {DIALECTS[adapter.dialect]}: {truncated}"), *lost)
    output = merging.output or "nothing was written"
    return Page((facts, side_by_side(rows), Facts.of(("output", output), ("took", format_seconds(merging.seconds)))))


def adapter_inspection_page(inspection: Inspection, adapter: AdapterInspection) -> Page:
    """The page of `compress inspect ADAPTER`: how much of its rank each module uses."""
    modules = adapter.modules
    size = f"{inspection.parameters:,} parameters, {format_size(inspection.weight_bytes)}"
    dialect = f"in the names of {DIALECTS[adapter.dialect]}: {len(modules):,} modules"
    facts = Facts.of(("adapter", f"{inspection.source}, {dialect}"), ("size", size))
    terms = Facts.of(
        ("90 %, 99 %", "the rank that holds so much of the energy, the sum of squared singular values"),
        ("effective", "exp of the entropy of the singular values (Roy and Vetterli 2007)"),
        ("norm", "Frobenius norm of what the module adds, its scale included"),
    )
    return Page((facts, _inspected(modules), terms))


def _inspected(modules: Sequence[InspectedModule]) -> LayerTable:
    numbers = ("rank", "90 %", "99 %", "effective", "scale", "norm")
    rows = [
        (
            one_line(each.name),
            format_shape(each.shape),
            str(each.rank),
            str(each.energy_90),
            str(each.energy_99),
            f"{each.entropy:.1f}",
            f"{each.scale:.3g}",
            f"{each.norm:.3g}",
        )
        for each in modules
    ]
    return LayerTable(("module", "shape", *numbers), tuple(rows))


def _budget_words(budget: Budget) -> str:
    value = budget.value or 0.0
    if budget.kind == "keep":
        return f"{100 * value:.4g} % of the numbers of all factors"
    if budget.kind == "tolerance":
        return f"relative error of at most {value:g} in every module"
    return budget_words(budget)


def _words(adapter: AdapterChange) -> str:
    return f"in the names of {DIALECTS[adapter.dialect]}: {adapter.modules:,} modules, {adapter.resized:,} resized"


def _ranks(modules: Sequence[ModulePlan]) -> LayerTable:
    headers = ("module", "shape", "rank\nbefore", "rank", "kept", "relative\nerror")
    rows = [
        (
            one_line(each.name),
            format_shape(each.shape),
            str(each.rank_before),
            str(each.rank),
            format_percent(each.parameters, each.parameters_before),
            error_words(each.error, 3),
        )
        for each in modules
    ]
    return LayerTable(headers, tuple(rows))
