"""The layers of a report as rows in groups: by block, or by kind, each with what its layers have together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from compressor.evaluation import LatencyChange
from compressor.evaluation.verdict import Change
from compressor.formatting import format_percent, format_shape, format_short, one_line
from compressor.forms import has_own_errors
from compressor.planning import LayerPlan
from compressor.report.initial_words import started_layers
from compressor.report.layer_groups import blocks_of, in_natural_order, kinds_of
from compressor.report.spectra import Picture, RankMarks, decades_of, picture
from compressor.report.wording import bits_words, error_words, form_words, measured_alone, slowest_times

if TYPE_CHECKING:
    from compressor.results import Compression

ELSEWHERE = "in no block"


@dataclass(frozen=True)
class Time:
    """A time over that of the dense layer, in words."""

    words: str
    change: Change | None


@dataclass(frozen=True)
class Bar:
    """Widths in percent: of what there was, of what is left of it, and the places of the marks."""

    before: float
    after: float
    edge: float | None = None
    bound: float | None = None


@dataclass(frozen=True)
class LayerRow:
    """One layer; `block` and `kind` are the places of its groups, and `why` is the number of the reason."""

    name: str
    block: int
    kind: int
    of: str
    shape: str
    rank: str
    ranks: Bar | None
    form: str
    bits: str
    parameters: int
    stored: str
    size: Bar
    kept: str
    error: str
    times: tuple[Time, ...]
    why: int
    marks: str
    picture: Picture | None


@dataclass(frozen=True)
class LayerGroup:
    """Layers together: how many, and the range of their ranks and bits, their size, and their largest error."""

    name: str
    count: int
    rank: str
    forms: str
    bits: str
    parameters: int
    stored: str
    size: Bar
    kept: str
    error: str
    rows: tuple[LayerRow, ...]


@dataclass(frozen=True)
class LayerRows:
    """All layers in natural order, once by block and once by kind; `reasons` are numbered from 1 by the rows."""

    blocks: tuple[LayerGroup, ...]
    kinds: tuple[LayerGroup, ...]
    reasons: tuple[str, ...]
    decades: int
    by_block: bool

    @property
    def rows(self) -> tuple[LayerRow, ...]:
        return tuple(row for group in self.blocks for row in group.rows)


def layer_rows(compression: Compression) -> LayerRows:
    """The rows of the layers of a plan."""
    plan = compression.plan
    layers = in_natural_order(plan.layers)
    blocks = blocks_of(layers)
    kinds = kinds_of(layers)
    block_names = list(dict.fromkeys(["all layers"] if blocks is None else blocks))
    kind_names = list(dict.fromkeys(kinds))
    reasons = list(dict.fromkeys(one_line(layer.reason) for layer in layers))
    marks = rank_marks(compression)
    decades = decades_of(compression.spectra.values())
    largest = max((max(layer.parameters_before, layer.parameters) for layer in layers), default=1)
    timed = 1 + measured_alone(layers) if plan.device is not None else 0
    started = {layer.name for layer in started_layers(layers)}
    whole = {each.layer.name: each.singular_values for each in compression.measured if each.layer.name in started}

    def row(layer: LayerPlan, block: str, kind: str) -> LayerRow:
        mark, spectrum, kept = marks[layer.name], compression.spectra.get(layer.name), layer.truncated_to
        return LayerRow(
            name=one_line(layer.name),
            block=block_names.index(block),
            kind=kind_names.index(kind),
            of=layer.kind,
            shape=format_shape(layer.shape),
            rank=_rank_of_full(layer, mark.full),
            ranks=_rank_bar(layer, mark),
            form=form_words(layer),
            bits=bits_words(layer),
            parameters=layer.parameters,
            stored=format_short(layer.parameters),
            size=Bar(_share(layer.parameters_before, largest), _share(layer.parameters, largest)),
            kept=format_percent(layer.parameters, layer.parameters_before),
            error=error_words(layer.error, 4),
            times=tuple(_time(ratio) for ratio in slowest_times(layer)[:timed]),
            why=reasons.index(one_line(layer.reason)) + 1,
            marks=mark.words,
            picture=None
            if spectrum is None
            else picture(spectrum, kept, mark, decades=decades, whole=whole.get(layer.name)),
        )

    rows = [
        row(layer, block, kind)
        for layer, block, kind in zip(layers, blocks or block_names * len(layers), kinds, strict=True)
    ]
    return LayerRows(
        _groups(block_names, layers, [(each.block, each) for each in rows]),
        _groups(kind_names, layers, [(each.kind, each) for each in rows]),
        tuple(reasons),
        decades,
        by_block=blocks is not None,
    )


def _groups(
    names: Sequence[str], layers: Sequence[LayerPlan], rows: Sequence[tuple[int, LayerRow]]
) -> tuple[LayerGroup, ...]:
    """The groups of some names; beside each row stands the place of its group."""
    members: list[list[tuple[LayerPlan, LayerRow]]] = [[] for _ in names]
    for layer, (place, row) in zip(layers, rows, strict=True):
        members[place].append((layer, row))
    largest = max(sum(layer.parameters_before for layer, _ in own) for own in members)
    return tuple(_group(name, own, largest) for name, own in zip(names, members, strict=True))


def _group(name: str, members: Sequence[tuple[LayerPlan, LayerRow]], largest: int) -> LayerGroup:
    layers = [layer for layer, _ in members]
    before, after = (sum(getattr(each, size) for each in layers) for size in ("parameters_before", "parameters"))
    ranks = [layer.truncated_to for layer in layers if layer.truncated_to is not None]
    forms = sorted({row.form for _, row in members})
    return LayerGroup(
        name=one_line(name) or ELSEWHERE,
        count=len(layers),
        rank=_range(ranks) if ranks else "full",
        forms=", ".join(forms[:2]) + (" ..." if len(forms) > 2 else ""),
        bits=_range([layer.bits for layer in layers]),
        parameters=after,
        stored=format_short(after),
        size=Bar(_share(before, largest), _share(after, largest)),
        kept=format_percent(after, before),
        error=error_words(max(layer.error for layer in layers), 4),
        rows=tuple(row for _, row in members),
    )


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _share(part: float, whole: float) -> float:
    return round(100 * part / whole, 1) if whole else 0.0


def _time(ratio: float | None) -> Time:
    """A layer's time over that of the dense one."""
    return Time("-", None) if ratio is None else Time(f"{ratio:.2f}", LatencyChange("", ratio).change)


def _rank_of_full(layer: LayerPlan, full: int) -> str:
    if layer.truncated_to is not None:
        return f"{layer.truncated_to} of {full}"
    return f"full, {layer.rank} corrects" if layer.rank else f"full, {full}"


def _rank_bar(layer: LayerPlan, mark: RankMarks) -> Bar | None:
    if not mark.full:
        return None
    kept = mark.full if layer.truncated_to is None else layer.truncated_to
    edge, bound = (
        None if each is None else min(_share(each, mark.full), 100.0) for each in (mark.above_edge, mark.bound)
    )
    return Bar(100.0, min(_share(kept, mark.full), 100.0), edge, bound)


def rank_marks(compression: Compression) -> Mapping[str, RankMarks]:
    """The marks beside the ranks of every layer in the plan.

    The recipe says nothing about the matrix that a spatial pair factorizes.
    """
    measured = {each.layer.name: each for each in compression.inspected}
    marks = {}
    for layer in compression.plan.layers:
        spectrum, each = compression.spectra.get(layer.name), measured.get(layer.name)
        sides = layer.shape if each is None else each.layer.block_shape
        mark = RankMarks(full=min(sides) if spectrum is None else len(spectrum))
        if each is not None and not has_own_errors(layer.form):
            start, window = each.initialization, each.window
            if start is not None:
                mark = replace(mark, edge=start.edge, above_edge=start.above_edge)
            if window is not None and window.vacuous is False:
                mark = replace(mark, bound=window.rank_bound)
        marks[layer.name] = mark
    return marks
