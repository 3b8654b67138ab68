"""What was found of the weights that a model started from: the same words on pages, cards, and reports."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from compressor.formatting import format_count, format_seconds, one_line

if TYPE_CHECKING:
    from compressor.initial import InitialFound, StartedLayer
    from compressor.planning import LayerPlan, Plan

# A layer gains where what training wrote has a rank, or a norm, that is smaller than the layer's by this share of it.
LEAST_GAIN = 0.1


def initial_verdict(found: InitialFound) -> str:
    """Whether the initial weights are those that the model started from, and whether there is anything to gain."""
    if not found.layers:
        return _not_found(found)
    z = sorted(layer.start.z for layer in found.layers)
    said = (
        f"the initialization is {one_line(found.source)}: {len(found.layers)} of {found.eligible} layers correlate with"
        f" it (z {z[0]:.0f} to {z[-1]:.0f})"
    )
    gaining = gaining_layers(found)
    wrote = f"{statistics.median(layer.start.written for layer in found.layers):.0%} of the norm".replace("%", " %")
    if not gaining:
        return f"{said}; training wrote almost all there is, {wrote}"
    some = "" if len(gaining) == len(found.layers) else f"{len(gaining)} of them gain by it; "
    return f"{said}; {some}training wrote {wrote}"


def _not_found(found: InitialFound) -> str:
    if found.search is not None:
        search = found.search
        return (
            f"no seed was found: {format_count(search.tried)} candidates in {format_seconds(search.seconds)}, of which"
            f" the best correlates with z {search.next_best:.1f}, as chance does ({one_line(search.searched)})"
        )
    stated = ", which its recipe states," if found.origin == "stated" else ""
    said = f"{one_line(found.source)}{stated} is not what it started from: no layer correlates with it (z below 8)"
    return said if found.seed is None else f"{said}; an accelerator draws other numbers from the same seed"


def gaining_layers(found: InitialFound) -> list[StartedLayer]:
    """The layers of which training wrote clearly less than there is."""
    return [layer for layer in found.layers if _gains(layer)]


def _gains(layer: StartedLayer) -> bool:
    most = 1 - LEAST_GAIN
    return layer.written_ranks.energy <= most * layer.ranks.energy or layer.start.written <= most


def search_facts(found: InitialFound) -> Iterable[tuple[str, str]]:
    """How a seed was found, where it was searched."""
    search = found.search
    if search is not None and search.z is not None:
        tried = "the first candidate" if search.tried == 1 else f"{format_count(search.tried)} candidates"
        others = "" if search.tried == 1 else f", the next best {search.next_best:.1f}"
        yield (
            "search",
            f"{tried} in {format_seconds(search.seconds)}: z {search.z:.0f}{others}; {search.false_hits:.0e} false hits"
            " expected in all there are",
        )


def initial_use(plan: Plan) -> str | None:
    """What a plan stores of the layers in a form of what training wrote; None where it has none."""
    started = started_layers(plan.layers)
    if plan.initial is None or not started:
        return None
    stored, dense = (sum(getattr(layer, name) for layer in started) for name in ("parameters", "parameters_before"))
    empty = sum(layer.truncated_to == 0 for layer in started)
    nothing = f", {empty} of them nothing but the seed" if empty and plan.initial.seed is not None else ""
    return (
        f"{len(started)} of {len(plan.layers)} layers store only what training wrote{nothing}:"
        f" {format_count(stored)} of {format_count(dense)} numbers; loaded{_with(needed_initial(plan))}, they are dense"
    )


def _with(needed: str | None) -> str:
    return "" if needed is None else f" with {one_line(needed)}"


def started_layers(layers: Sequence[LayerPlan]) -> list[LayerPlan]:
    """The layers in a form of what training wrote."""
    return [layer for layer in layers if layer.share is not None]


def needed_initial(plan: Plan) -> str | None:
    """What a model needs to be loaded: the initial weights that no seed draws; None where it needs none."""
    if plan.initial is None or plan.initial.seed is not None or not started_layers(plan.layers):
        return None
    return plan.initial.source


def initial_facts(plan: Plan) -> Iterable[tuple[str, str]]:
    """What was found, and what is made of it, with labels."""
    if plan.initial is not None:
        yield "start", initial_verdict(plan.initial)
        if (use := initial_use(plan)) is not None:
            yield "", use
        elif gaining_layers(plan.initial):
            yield "", _unused(plan)
        yield from search_facts(plan.initial)


def _unused(plan: Plan) -> str:
    """Why no layer takes a form with the initial weights, though there is something to gain."""
    if plan.device is not None:
        return "no layer takes a form with it: loaded, it would be dense, and no faster"
    return "no layer loses less with it at this size: all take forms without it"


def initial_table(found: InitialFound) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Headers and a row per layer; a column of bounds only where one binds."""
    bounds = any(layer.start.rank_bound is not None for layer in found.layers)
    headers = ("layer", "z", "exp(-K)", "fitted", "used", "wrote", "rank\nof W", "rank\nof D")
    rows = tuple(
        (
            one_line(layer.name),
            f"{layer.start.z:.0f}",
            "-" if layer.start.predicted is None else f"{layer.start.predicted:.3f}",
            f"{layer.start.fitted:.3f}",
            f"{layer.start.share:.3f}",
            f"{layer.start.written:.0%}".replace("%", " %"),
            str(layer.ranks.energy),
            str(layer.written_ranks.energy),
            *(() if not bounds else ("-" if layer.start.rank_bound is None else f"{layer.start.rank_bound:,}",)),
        )
        for layer in found.layers
    )
    return (*headers, *(("bound",) if bounds else ())), rows


def initial_terms(found: InitialFound) -> Iterable[tuple[str, str]]:
    """What the columns of the table say."""
    yield "z", "correlation with the initial weights, in standard deviations of chance"
    yield "exp(-K)", "the share of them that the recipe predicts is left; fitted: by least squares"
    yield "wrote", "the norm of what training wrote, D = W - used x initial weights, beside that of W"
    yield "rank", "99 % energy rank"
    if any(layer.start.rank_bound is not None for layer in found.layers):
        yield "bound", "batch x uses x steps, which bounds the rank of what training wrote"
