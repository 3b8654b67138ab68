"""Results about adapters as pages: a row for each module, or for each kind of module where there are many."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
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

MOST_ROWS = 40
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
    if len(modules) <= MOST_ROWS:
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
    summed = []
    for kind, places in _grouped_by_kind([each.name for each in modules]):
        own = [modules[at] for at in places]
        summed.append(
            (
                one_line(kind),
                str(len(own)),
                _spread([each.rank for each in own]),
                _spread([each.energy_90 for each in own]),
                _spread([each.energy_99 for each in own]),
                _spread([each.entropy for each in own], 1),
                f"{sum(each.norm**2 for each in own) ** 0.5:.3g}",
            )
        )
    headers = ("kind of module", "modules", *(name for name in numbers if name != "scale"))
    return LayerTable(headers, tuple(summed))


def _budget_words(budget: Budget) -> str:
    value = budget.value or 0.0
    if budget.kind == "keep":
        return f"{100 * value:.4g} % of the numbers of all factors"
    if budget.kind == "tolerance":
        return f"relative error of at most {value:g} in every module"
    return budget_words(budget)


def _words(adapter: AdapterChange) -> str:
    return f"in the names of {DIALECTS[adapter.dialect]}: {adapter.modules:,} modules, {adapter.resized:,} resized"


def _kind_of_module(name: str) -> str:
    """What a module is called below the blocks that it is in, which are numbered: `layers.3`, `block.3`, `h.3`."""
    return re.fullmatch(r"(?:.*(?:^|[._])(?:\w*s|block|layer|h)[._]\d+[._])?(.+)", name)[1]  # type: ignore[index]


def _grouped_by_kind(names: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    """The kinds of some modules, with the places of theirs."""
    kinds = dict[str, list[int]]()
    for at, name in enumerate(names):
        kinds.setdefault(_kind_of_module(name), []).append(at)
    yield from sorted(kinds.items())


def _spread(values: Sequence[float], digits: int = 0) -> str:
    """The smallest and the largest of some numbers, in one word where they are equal."""
    low, high = (f"{each:.{digits}f}" for each in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _ranks(modules: Sequence[ModulePlan]) -> LayerTable:
    if len(modules) <= MOST_ROWS:
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
    headers = ("kind of module", "modules", "rank\nbefore", "rank", "kept", "largest\nerror")
    rows = []
    for kind, places in _grouped_by_kind([each.name for each in modules]):
        own = [modules[at] for at in places]
        rows.append(
            (
                one_line(kind),
                str(len(own)),
                _spread([each.rank_before for each in own]),
                _spread([each.rank or 0 for each in own]),
                format_percent(sum(each.parameters for each in own), sum(each.parameters_before for each in own)),
                error_words(max(each.error for each in own), 3),
            )
        )
    return LayerTable(headers, tuple(rows))
