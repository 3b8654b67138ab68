"""Results as text for a terminal or a log: rich renderables that fit into 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from compressor.report.comparison import Comparison, compared, compression_rows, evaluation_rows
from compressor.report.wording import (
    SEARCH_HEADERS,
    above_one_words,
    budget_words,
    calibration_words,
    change_words,
    compact,
    error_words,
    format_size,
    in_seconds,
    large_loss_words,
    left_out_words,
    one_line,
    percent,
    quality_words,
    recipe_sources,
    recipe_words,
    rounding_words,
    search_rows,
    search_words,
    shape_of,
    shortened_apart,
    stored_only_words,
    thousands,
    unchanged_words,
)

if TYPE_CHECKING:
    from compressor.evaluation import Evaluation
    from compressor.model import InspectedLayer
    from compressor.network import Layer
    from compressor.planning import Plan
    from compressor.recipe import TrainingRecipe
    from compressor.results import Compression, Export, Inspection, Merging, Restoration

NARROWEST_NAME = 8
PATHS = frozenset({"model", "base", "output", "plan"})


@dataclass(frozen=True)
class LayerTable:
    """One row per layer: the name, shortened where a terminal's window is narrow, and its numbers."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        columns = list(zip(*(header.split("\n") for header in self._padded_headers()), strict=True))
        cells = [*columns, *self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.headers))]
        room = options.max_width - sum(widths[1:]) - 2 * (len(widths) - 1)
        if console.is_terminal:
            widths[0] = min(widths[0], max(room, NARROWEST_NAME))
        names = shortened_apart([name for name, *_ in self.rows], widths[0])
        for row in columns:
            yield Text(_aligned(row, widths), style="bold", no_wrap=True, overflow="ignore")
        yield Text("  ".join("─" * width for width in widths), style="dim", no_wrap=True, overflow="ignore")
        for name, (_, *numbers) in zip(names, self.rows, strict=True):
            line = _aligned((name, *numbers), widths)
            yield Text(line, no_wrap=True, overflow="ignore")

    def _padded_headers(self) -> Iterator[str]:
        """Headers of the same number of lines, the last ones at the bottom."""
        tallest = max(header.count("\n") for header in self.headers)
        for header in self.headers:
            yield "\n" * (tallest - header.count("\n")) + header


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    name, *numbers = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
    return "  ".join([name.strip().ljust(widths[0]), *numbers])


def compression_text(compression: Compression) -> RenderableType:
    """What `compress MODEL` did: the request, the layers, sizes and quality before and after, and where it is."""
    plan = compression.plan
    effort = f"{in_seconds(compression.seconds)}, peak memory {format_size(compression.peak_memory_bytes)}"
    parts: list[RenderableType] = [
        _facts(
            ("model", compression.source),
            *_base_facts(compression),
            *_recipe_facts(compression.recipe),
            *_left_out_facts(compression),
            ("budget", budget_words(plan.budget)),
            *_calibration_facts(plan),
        ),
        *_search_parts(plan),
        *_plan_parts(plan),
    ]
    parts.append(_side_by_side(compression_rows(compression)))
    if compression.evaluation is not None:
        parts.append(_measured_on(compression.evaluation))
    if compression.warnings:
        parts.append(_facts(*(("warning", words) for words in compression.warnings)))
    if skipped := _skipped(compression.skipped):
        parts.append(skipped)
    output = compression.output or "nothing was written"
    pushed = [("pushed", compression.pushed)] if compression.pushed is not None else []
    parts.append(_facts(("output", output), *pushed, ("took", effort), *_advice(plan.advice)))
    return _spaced(parts)


def _left_out_facts(result: Compression | Inspection) -> Iterator[tuple[str, str]]:
    if result.left_out:
        yield "left out", one_line(left_out_words(result.left_out, result.weights_at))


def _tensors(count: int) -> str:
    return f"{count} tensor" if count == 1 else f"{count} tensors"


def _base_facts(compression: Compression) -> Iterator[tuple[str, str]]:
    """What a fine-tune is compressed against, and how the difference is written."""
    fine_tune = compression.fine_tune
    if fine_tune is None:
        return
    yield "base", fine_tune.base
    in_full = f", {_tensors(len(fine_tune.in_full))} in full" if fine_tune.in_full else ""
    unchanged = f"; unchanged: {_tensors(fine_tune.unchanged)}" if fine_tune.unchanged else ""
    yield "as", f"{fine_tune.written_as} beside {format_size(fine_tune.base_bytes)} of the base{in_full}{unchanged}"
    if words := rounding_words(fine_tune.rounding_share):
        yield "rounding", words
    if fine_tune.verified_with is not None:
        yield "PEFT", f"{fine_tune.verified_with} loads it and makes every change"
    elif fine_tune.max_lora_rank is not None and compression.output is not None:
        yield "PEFT", "not installed, so the adapter was not tried"
    if fine_tune.vllm_obstacles:
        yield "vLLM", f"refuses {' and '.join(fine_tune.vllm_obstacles)}"
    elif fine_tune.max_lora_rank is not None:
        yield "vLLM", f"by its rules loads it with --enable-lora --max-lora-rank {fine_tune.max_lora_rank}"


def _calibration_facts(plan: Plan) -> Iterator[tuple[str, str]]:
    if plan.calibration is not None:
        yield "data", calibration_words(plan.calibration)
    if plan.search is not None:
        yield "search", search_words(plan.search)


def _search_parts(plan: Plan) -> Iterator[RenderableType]:
    """The sizes that were tried, where a drop decided."""
    if plan.search is not None:
        yield LayerTable(SEARCH_HEADERS, tuple(search_rows(plan.search)))


def plan_text(plan: Plan, *, output: Path | None = None) -> RenderableType:
    """The ranks of a plan with their reasons, and what they would store."""
    size = compared("eligible parameters", thousands, plan.eligible_before, plan.eligible_after)
    facts = [("plan", str(output))] if output is not None else []
    parts: list[RenderableType] = [
        _facts(("model", plan.source), ("budget", budget_words(plan.budget)), *_calibration_facts(plan)),
        *_search_parts(plan),
        *_plan_parts(plan),
    ]
    if (unchanged := unchanged_words(plan.layers, written=False)) is not None:
        parts.append(Text(unchanged))
    parts.append(_side_by_side([size]))
    if facts or plan.advice:
        parts.append(_facts(*facts, *_advice(plan.advice)))
    return _spaced(parts)


def inspection_text(inspection: Inspection) -> RenderableType:
    """Effective ranks and memory of every eligible layer, the others grouped by why they are skipped."""
    measured = [layer for layer in inspection.layers if layer.layer.eligible]
    totals = (
        f"{inspection.parameters:,} parameters, {format_size(inspection.weight_bytes)}; "
        f"{percent(inspection.eligible, inspection.parameters)} of the parameters are eligible"
    )
    parts: list[RenderableType] = [
        _facts(
            ("model", inspection.source),
            *_recipe_facts(inspection.recipe),
            ("size", totals),
            *_left_out_facts(inspection),
        )
    ]
    if measured:
        parts += [_ranks(measured), _memory(measured)]
    else:
        parts.append(Text("No layer is eligible."))
    if skipped := _skipped(each.layer for each in inspection.layers):
        parts.append(skipped)
    if inspection.advice:
        parts.append(_facts(*_advice(inspection.advice)))
    return _spaced(parts)


def evaluation_text(evaluation: Evaluation) -> RenderableType:
    """Quality, size, arithmetic, memory and latency of two models side by side."""
    costs = _side_by_side(evaluation_rows(evaluation), "baseline", "model")
    large_loss = large_loss_words(evaluation, calibrated=False)
    warning = [] if large_loss is None else [_facts(("warning", large_loss))]
    return _spaced([costs, _measured_on(evaluation), *warning])


def restoration_text(restoration: Restoration) -> RenderableType:
    """What `compress restore` brought back, and where it is."""
    size = compared("weight files", format_size, restoration.bytes.before, restoration.bytes.after)
    layers = f"{len(restoration.layers)} brought back to dense"
    return _spaced(
        [
            _facts(("model", restoration.source), ("layers", layers)),
            _side_by_side([size]),
            _facts(("output", restoration.output), ("took", in_seconds(restoration.seconds))),
        ]
    )


def export_text(export: Export) -> RenderableType:
    """What `compress export` wrote, and how to load it."""
    size = compared("weight files", format_size, export.bytes.before, export.bytes.after)
    facts = [("output", export.output), ("load", export.load)]
    if export.difference is not None:
        facts.append(("checked", f"outputs differ from torch's by {export.difference:.1e} at most"))
    return _spaced(
        [
            _facts(("model", export.source), ("to", f"{export.to}, {export.layers} low-rank layers")),
            _side_by_side([size]),
            _facts(*facts, ("took", in_seconds(export.seconds))),
        ]
    )


def merging_text(merging: Merging) -> RenderableType:
    """What `compress merge` found before merging, what merging did to each task, and where the result is."""
    how = merging.mode if merging.mode == "sum" else f"concat, {merging.head} head"
    names = [(f"model {number}", model) for number, model in enumerate(merging.models, start=1)]
    facts = [*names, *([("base", merging.base)] if merging.base is not None else []), ("mode", how)]
    if (inputs := merging.inputs) is not None:
        words = {
            "data": "between inputs of two tasks",
            "embeddings": "between token embeddings of two tasks",
            "row spaces": "of the first layers' principal angles",
        }[inputs.source]
        facts.append(("inputs", f"|cos| {words}: largest {inputs.largest:.2f}, mean {inputs.mean:.2f}"))
    parts: list[RenderableType] = [_facts(*facts), *_overlap_parts(merging)]
    if merging.warnings:
        parts.append(_facts(*(("warning", words) for words in merging.warnings)))
    if merging.tasks:
        headers = ("task", "predictions", "metric", "alone", "merged", "compared", "logits\nchange")
        rows = tuple(
            (
                one_line(task.data),
                f"{task.count:,}",
                task.metric,
                quality_words(task.metric, task.alone),
                quality_words(task.metric, task.merged),
                change_words(task.metric, task.drop),
                percent(task.output_change),
            )
            for task in merging.tasks
        )
        parts.append(LayerTable(headers, rows))
    parts.append(
        _side_by_side(
            [
                compared("parameters", thousands, merging.parts_parameters, merging.parameters),
                compared("weight files", format_size, merging.parts_bytes, merging.bytes),
            ],
            "apart",
            "merged",
        )
    )
    output = merging.output or "nothing was written"
    parts.append(_facts(("output", output), ("took", in_seconds(merging.seconds))))
    return _spaced(parts)


def _overlap_parts(merging: Merging) -> Iterator[RenderableType]:
    tasks = range(len(merging.models))
    headers = ("layer", "shape", *(f"interference\nin task {task + 1}" for task in tasks), "subspace\noverlap")
    headers += ("of\nrandom", "smallest\nangle")
    rows = []
    for layer in merging.layers:
        interference = layer.interference or (None for _ in tasks)
        cells = ("-" if share is None else percent(share) for share in interference)
        overlap = (percent(layer.subspace), percent(layer.random), f"{layer.smallest_angle:.1f}°")
        rows.append((one_line(layer.name), shape_of(layer.shape), *cells, *overlap))
    if not rows:
        return
    seen = "its layers see" if merging.tasks else "span its layer's row space"
    yield LayerTable(headers, tuple(rows))
    yield _facts(
        ("interference", f"what the others' layer puts out beside the task's own, on inputs that {seen}"),
        ("overlap", "mean squared cosine of the principal angles of the row spaces (99 % of the energy)"),
    )


def _plan_parts(plan: Plan) -> list[RenderableType]:
    """The table of ranks, and the reasons as numbered notes: most are shared by many layers."""
    layers = plan.layers
    reasons = list(dict.fromkeys(one_line(layer.reason) for layer in layers))
    shared = len(reasons) == 1
    rows = [
        (
            one_line(layer.name),
            shape_of(layer.shape),
            "-" if layer.rank is None else str(layer.rank),
            layer.form,
            percent(layer.parameters, layer.dense_parameters),
            error_words(layer.error, 3),
            *(() if shared else (str(reasons.index(one_line(layer.reason)) + 1),)),
        )
        for layer in layers
    ]
    headers = (
        "layer",
        "shape",
        "rank",
        "form",
        "kept",
        plan.error_name.replace(" ", "\n"),
        *(() if shared else ("why",)),
    )
    notes = [("why", reasons[0])] if shared else [(str(i), reason) for i, reason in enumerate(reasons, start=1)]
    notes += [("note", words) for words in (above_one_words(layers), stored_only_words(layers)) if words is not None]
    return [LayerTable(headers, tuple(rows)), _facts(*notes)]


def _ranks(layers: Sequence[InspectedLayer]) -> RenderableType:
    from compressor.measure import FROBENIUS_ERROR

    headers = (
        "layer",
        "shape",
        "numer-\nical",
        "Frobe-\nnius",
        "energy",
        "en-\ntropy",
        "partici-\npation",
        "stable",
    )
    rows = []
    for layer in layers:
        ranks = layer.ranks
        numbers = (
            ("-",) * 6
            if ranks is None
            else (
                str(ranks.numerical),
                str(ranks.frobenius),
                str(ranks.energy),
                f"{ranks.entropy:.1f}",
                f"{ranks.participation_ratio:.1f}",
                f"{ranks.stable:.1f}",
            )
        )
        rows.append((one_line(layer.layer.name), shape_of(layer.layer.shape), *numbers))
    notes = _facts(
        ("numerical", "singular values above 0.001 of the largest"),
        ("Frobenius", f"least rank with a relative error of at most {FROBENIUS_ERROR:g}"),
        ("energy", "least rank with 99 % of the sum of squares"),
        ("entropy", "effective rank of Roy and Vetterli (2007)"),
        ("participation", "participation ratio of the squares"),
        ("stable", "squared Frobenius over squared spectral norm: too small to truncate at"),
    )
    return Group(_title("Effective ranks"), LayerTable(headers, tuple(rows)), Text(), notes)


def _memory_cells(layer: InspectedLayer) -> tuple[str, ...]:
    window, start = layer.window, layer.initialization
    bound, exponent = (window.rank_bound, window.forgetting_exponent) if window else (None, None)
    share, above = (start.share, start.above_edge) if start else (None, None)
    return (
        _number(layer.uses),
        _number(window.steps if window else None),
        f"{compact(bound)} vacuous" if window and window.vacuous and bound is not None else _number(bound),
        "-" if exponent is None else f"{exponent:.3g}",
        "-" if share is None else _share(share),
        _number(above),
    )


def _why_unknown(layer: InspectedLayer) -> list[str]:
    """Why there is no rank bound or no edge, each reason once."""
    window, start = layer.window, layer.initialization
    bound = window.reason if window and window.rank_bound is None else ""
    edge = start.reason if start and not bound.endswith(start.reason) else ""
    return [one_line(reason) for reason in (bound, edge) if reason]


def _memory(layers: Sequence[InspectedLayer]) -> RenderableType:
    from compressor.measure import EPSILON

    epsilon = next((layer.window.epsilon for layer in layers if layer.window is not None), EPSILON)
    headers: tuple[str, ...] = (
        "layer",
        "shape",
        "uses",
        f"window\neps {epsilon:g}",
        "rank\nbound",
        "K",
        "start\nleft",
        "above\nedge",
        "note",
    )
    rows: list[tuple[str, ...]] = []
    reasons: list[str] = []
    for layer in layers:
        why = _why_unknown(layer)
        reasons += [reason for reason in why if reason not in reasons]
        notes = ",".join(str(reasons.index(reason) + 1) for reason in why)
        rows.append((one_line(layer.layer.name), shape_of(layer.layer.shape), *_memory_cells(layer), notes))
    if not reasons:
        headers, rows = headers[:-1], [row[:-1] for row in rows]
    terms = [
        ("uses", "how often the matrix is used per example"),
        ("window", f"at epsilon {epsilon:g}: all but {epsilon:g} of the matrix was written in the last so many steps"),
        ("rank bound", "batch x uses x window; vacuous where it is not below the full rank"),
        ("K", "forgetting exponent: exp(-K) of the initialization is left ('start left')"),
        ("above edge", "singular values above what is left of the initialization"),
    ]
    numbered = [(str(number), reason) for number, reason in enumerate(reasons, start=1)]
    explained = [_facts(*numbered), Text()] if numbered else []
    return Group(
        _title("Memory of the training"),
        LayerTable(headers, tuple(rows)),
        Text(),
        *explained,
        _facts(*terms),
    )


def _skipped(layers: Iterable[Layer]) -> RenderableType | None:
    by_reason: dict[str, list[str]] = {}
    for layer in layers:
        if layer.skip is not None:
            by_reason.setdefault(one_line(layer.skip), []).append(one_line(layer.name))
    if not by_reason:
        return None
    lines = []
    for reason, names in by_reason.items():
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        lines.append(Text(f"{shown}: {reason}"))
    return Group(_title("Skipped"), *lines)


def _side_by_side(comparisons: Sequence[Comparison], before: str = "before", after: str = "after") -> RenderableType:
    rows = [("", before, after, "compared"), *((c.label, c.before, c.after, c.compared) for c in comparisons)]
    known = [i for i in range(4) if any(row[i] for row in rows[1:])]
    cells = [tuple(row[i] for i in known) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [Text(_aligned(row, widths), no_wrap=True, overflow="ignore") for row in cells]
    lines[0].stylize("bold")
    return Group(*lines)


def _measured_on(evaluation: Evaluation) -> RenderableType:
    words = f"measured on {evaluation.data}: {evaluation.count:,} predictions, {evaluation.device}"
    lines = [Text(one_line(words), style="dim")]
    if any(timing.ratio is not None for timing in evaluation.latency):
        lines.append(Text("ratio of the times: median of paired runs", style="dim"))
    return Group(*lines)


def _recipe_facts(recipe: TrainingRecipe) -> Iterator[tuple[str, str]]:
    yield "trained", recipe_words(recipe)
    if recipe.sources:
        yield "", f"from {recipe_sources(recipe)}"


def _advice(advice: str | None) -> Iterator[tuple[str, str]]:
    if advice:
        yield "advice", advice


@dataclass(frozen=True)
class Facts:
    """Labeled words, wrapped beside their labels; a path stays whole, to be copied and searched for."""

    facts: tuple[tuple[str, str], ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        indent = max((len(label) for label, _ in self.facts), default=0) + 2
        for label, words in self.facts:
            # Of several models each is numbered.
            width = len(words) if label.rstrip(" 0123456789") in PATHS else options.max_width - indent
            lines = wrap(one_line(words), max(width, 20), break_on_hyphens=False) or [""]
            for number, line in enumerate(lines):
                text = Text(no_wrap=True, overflow="ignore")
                text.append((label if number == 0 else "").ljust(indent), style="dim")
                yield text.append(line)


def _facts(*facts: tuple[str, str]) -> RenderableType:
    return Facts(facts)


def _title(words: str) -> RenderableType:
    return Padding(Text(words, style="bold"), (0, 0, 1, 0))


def _spaced(parts: Sequence[RenderableType]) -> RenderableType:
    spaced: list[RenderableType] = []
    for part in parts:
        spaced += [Text(), part] if spaced else [part]
    return Group(*spaced)


def _number(number: int | None) -> str:
    if number is None:
        return "-"
    return f"{number:,}" if number < 10**6 else compact(number)


def _share(share: float) -> str:
    return percent(share) if share >= 0.0005 else f"{100 * share:.0e} %"
