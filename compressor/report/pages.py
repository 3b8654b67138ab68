"""Results as pages for a terminal, a log or a notebook; in a terminal they fit into 80 columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.adapters import ModulePlan
from compressor.evaluation import Remark
from compressor.formatting import (
    format_count,
    format_percent,
    format_seconds,
    format_shape,
    format_short,
    format_size,
    one_line,
)
from compressor.report.adapters import adapter_inspection_page, adapter_page, merged_adapters_page
from compressor.report.blocks import Block, Facts, LayerTable, Lines, Page, Title, VerdictLine
from compressor.report.comparison import (
    Comparison,
    compared,
    compression_rows,
    eligible_words,
    evaluation_rows,
    side_by_side,
)
from compressor.report.initial_words import (
    initial_facts,
    initial_table,
    initial_terms,
    initial_verdict,
    search_facts,
)
from compressor.report.wording import (
    BITS_NOTE,
    SEARCH_HEADERS,
    above_one_words,
    added_tokens_words,
    archive_initial_words,
    archive_window_words,
    base_share_words,
    bits_words,
    budget_words,
    calibration_words,
    change_words,
    correspondence_words,
    count_words,
    error_words,
    faster_words,
    form_words,
    large_loss_words,
    left_out_words,
    needed_time_words,
    quality_words,
    quantizes,
    rank_words,
    recipe_sources,
    recipe_words,
    rounding_words,
    search_rows,
    search_words,
    squeezed_words,
    stored_only_words,
    time_note,
    time_words,
    unchanged_words,
    uniform_words,
    widths_words,
)

if TYPE_CHECKING:
    from compressor.evaluation import Evaluation
    from compressor.initial import InitialFound
    from compressor.model import InspectedLayer
    from compressor.network import Layer
    from compressor.planning import Plan
    from compressor.recipe import TrainingRecipe
    from compressor.results import Archiving, BeforeAfter, Compression, Export, Inspection, Merging, Needs, Restoration

PAIRED = "ratio of the times: median of paired runs"


def compression_page(compression: Compression) -> Page:
    """The page of `compress MODEL`: verdict, request, layers, sizes and quality before and after, output."""
    if compression.adapter is not None:
        return adapter_page(compression, compression.adapter)
    plan = compression.plan
    effort = f"{format_seconds(compression.seconds)}, peak memory {format_size(compression.peak_memory_bytes)}"
    parts: list[Block] = [
        VerdictLine(compression.verdict.remarks),
        Facts.of(
            *_better_facts(compression),
            ("model", compression.source),
            *base_facts(compression),
            *recipe_facts(compression.recipe),
            *_left_out_facts(compression),
            ("budget", budget_words(plan.budget)),
            *_squeezed_facts(plan),
            *_widths_facts(compression),
            *initial_facts(plan),
            *_calibration_facts(plan),
        ),
        *_search_parts(plan),
        *_plan_parts(plan),
    ]
    parts.append(side_by_side(compression_rows(compression)))
    if compression.evaluation is not None:
        parts.append(_measured_on(compression.evaluation))
    elif compression.latency:
        parts.append(Lines((f"timed on {compression.timed_on}; {PAIRED}",), dim=True))
    if (beside := uniform_words(compression)) is not None:
        parts.append(Facts.of(("beside", beside)))
    if compression.warnings:
        parts.append(Facts.of(*(("warning", words) for words in compression.warnings)))
    parts += _skipped(compression.skipped)
    if compression.needs is not None and compression.output is None and compression.model is None:
        parts.append(_needed(compression.needs))
    output = compression.output or "nothing was written"
    pushed = [("pushed", compression.pushed)] if compression.pushed is not None else []
    faster = _advice(faster_words(compression))
    parts.append(Facts.of(("output", output), *pushed, ("took", effort), *_advice(plan.advice), *faster))
    return Page(tuple(parts))


def _pairs_facts(inspection: Inspection) -> Iterator[tuple[str, str]]:
    encodings = Counter(each.layer.encoding for each in inspection.layers if each.layer.encoding is not None)
    for encoding, count in encodings.most_common():
        yield "stored", f"{count} layer{'s' * (count > 1)} in {encoding}, read as the numbers that it stands for"
    kept = [each.layer.stored.rank for each in inspection.layers if each.layer.stored is not None]
    stored = [rank for rank in kept if rank is not None]
    if stored:
        low, high = min(stored), max(stored)
        ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
        layers = "layer is" if len(stored) == 1 else "layers are"
        yield "already", f"{len(stored)} {layers} low-rank already, of {ranks}"


def _squeezed_facts(plan: Plan) -> Iterator[tuple[str, str]]:
    of_adapter = any(isinstance(layer, ModulePlan) for layer in plan.layers)  # whose modules have low rank anyway
    if not of_adapter and (words := squeezed_words(plan)) is not None:
        yield "already", words


def _better_facts(compression: Compression) -> Iterator[tuple[str, str]]:
    """That all layers alike in few bits were better, where they are."""
    if (better := compression.better_uniform) is not None:
        yield "better", f"{better}; ask for it with `bits={better.uniform.bits}`"


def _needed(needs: Needs) -> LayerTable:
    """What a run that writes is expected to take, beside what there is."""
    amounts = [("memory", needs.memory), ("temporary files", needs.temporary), ("weight files", needs.output)]
    rows = [
        (name, format_size(each.needed), "-" if each.available is None else format_size(each.available))
        for name, each in amounts
        if each.needed
    ]
    if needs.seconds is not None:
        rows.insert(0, ("time", needed_time_words(needs), "-"))
    return LayerTable(("to write it", "needed", "available"), tuple(rows))


def _left_out_facts(result: Compression | Inspection) -> Iterator[tuple[str, str]]:
    if result.left_out:
        yield "left out", one_line(left_out_words(result.left_out, result.weights_at))


def _tensors(count: int) -> str:
    return f"{count} tensor" if count == 1 else f"{count} tensors"


def base_facts(compression: Compression) -> Iterator[tuple[str, str]]:
    """The base of a fine-tune, and how the difference is stored."""
    fine_tune = compression.fine_tune
    if fine_tune is None:
        return
    yield "base", fine_tune.base
    in_full = f", {_tensors(len(fine_tune.in_full))} in full" if fine_tune.in_full else ""
    unchanged = f"; unchanged: {_tensors(fine_tune.unchanged)}" if fine_tune.unchanged else ""
    yield "as", f"{fine_tune.written_as} beside {format_size(fine_tune.base_bytes)} of the base{in_full}{unchanged}"
    if (found := fine_tune.correspondence) is not None:
        yield "names", correspondence_words(found)
    if words := base_share_words(fine_tune.shares, in_adapter=fine_tune.written_as == "LoRA adapter"):
        yield "share", words
    if words := rounding_words(fine_tune.rounding_share):
        yield "rounding", words
    if (tokens := fine_tune.vocabulary) is not None:
        yield "tokens", added_tokens_words(tokens)
    if fine_tune.verified_with is not None:
        yield "PEFT", f"{fine_tune.verified_with} loads it and reproduces every change"
    elif fine_tune.max_lora_rank is not None and compression.output is not None:
        yield "PEFT", "not installed, so the adapter was not loaded"
    if fine_tune.llama_cpp_obstacles:
        yield "llama.cpp", f"refuses {' and '.join(fine_tune.llama_cpp_obstacles)}"
    if fine_tune.vllm_obstacles:
        yield "vLLM", f"refuses {' and '.join(fine_tune.vllm_obstacles)}"
    elif fine_tune.max_lora_rank is not None:
        yield "vLLM", f"should load it with --enable-lora --max-lora-rank {fine_tune.max_lora_rank}"


def _widths_facts(compression: Compression) -> Iterator[tuple[str, str]]:
    if (words := widths_words(compression)) is not None:
        yield "bits", words


def _calibration_facts(plan: Plan) -> Iterator[tuple[str, str]]:
    if plan.calibration is not None:
        yield "calibration", calibration_words(plan.calibration)
    if plan.search is not None:
        yield "search", search_words(plan.search)


def _search_parts(plan: Plan) -> Iterator[Block]:
    """The sizes that a search tried."""
    if plan.search is not None:
        yield LayerTable(SEARCH_HEADERS, tuple(search_rows(plan.search)))


def plan_page(plan: Plan, *, output: Path | None = None) -> Page:
    """The ranks of a plan with their reasons, and what they would store."""
    label = eligible_words(plan, "eligible parameters")
    size = compared(label, format_count, before=plan.eligible_before, after=plan.eligible_after)
    facts = [("plan", str(output))] if output is not None else []
    parts: list[Block] = [
        Facts.of(
            ("model", plan.source),
            ("budget", budget_words(plan.budget)),
            *_squeezed_facts(plan),
            *initial_facts(plan),
            *_calibration_facts(plan),
        ),
        *_search_parts(plan),
        *_plan_parts(plan),
    ]
    if (unchanged := unchanged_words(plan.layers, written=False)) is not None:
        parts.append(Lines((unchanged,)))
    parts.append(side_by_side([size]))
    if facts or plan.advice:
        parts.append(Facts.of(*facts, *_advice(plan.advice)))
    return Page(tuple(parts))


def inspection_page(inspection: Inspection) -> Page:
    """Effective ranks and memory windows of the eligible layers; the others grouped by why they are skipped."""
    if inspection.adapter is not None:
        return adapter_inspection_page(inspection, inspection.adapter)
    measured = [layer for layer in inspection.layers if layer.layer.eligible]
    totals = (
        f"{inspection.parameters:,} parameters, {format_size(inspection.weight_bytes)}; "
        f"{format_percent(inspection.eligible, inspection.parameters)} of the parameters are eligible"
    )
    found = inspection.initial
    parts: list[Block] = [] if found is None else [VerdictLine((Remark(initial_verdict(found), None),))]
    parts.append(
        Facts.of(
            ("model", inspection.source),
            *recipe_facts(inspection.recipe),
            ("size", totals),
            *_pairs_facts(inspection),
            *_left_out_facts(inspection),
            *(() if found is None else search_facts(found)),
        )
    )
    if measured:
        parts += [*_ranks(measured), *_widths(measured), *_memory(measured), *_initial(found)]
    else:
        parts.append(Lines(("No layer is eligible.",)))
    parts += _skipped(each.layer for each in inspection.layers)
    if inspection.advice:
        parts.append(Facts.of(*_advice(inspection.advice)))
    return Page(tuple(parts))


def evaluation_page(evaluation: Evaluation) -> Page:
    """The verdict; quality, size, arithmetic, memory and latency of two models side by side."""
    costs = side_by_side(evaluation_rows(evaluation), "baseline", "model")
    large_loss = large_loss_words(evaluation)
    warning = [] if large_loss is None else [Facts.of(("warning", large_loss))]
    return Page((VerdictLine(evaluation.verdict.remarks), costs, _measured_on(evaluation), *warning))


def restoration_page(restoration: Restoration) -> Page:
    """What `compress restore` restored, and where it is."""
    size = _grown("weight files", restoration.bytes)
    what = ("layers", f"{len(restoration.layers)} made dense")
    if restoration.checkpoint is not None:
        what = ("checkpoint", restoration.checkpoint)
    return Page(
        (
            Facts.of(("model", restoration.source), what),
            side_by_side([size]),
            Facts.of(("output", restoration.output), ("took", format_seconds(restoration.seconds))),
        )
    )


def archive_page(archiving: Archiving) -> Page:
    """What `compress archive` stored of each checkpoint, how, and what it takes in all."""
    stored, unit = archiving.checkpoints, archiving.unit
    steps = f"{unit} {format_count(stored[0].number)}"
    if len(stored) > 1:
        steps += f" to {format_count(stored[-1].number)}"
    bits = "0: every bit is kept"
    tolerance = bits if not archiving.tolerance else f"{100 * archiving.tolerance:g} % of the norm of each tensor"
    facts = [
        ("run", f"{len(stored)} checkpoints, {steps}; their weights, and no states of optimizers"),
        *recipe_facts(archiving.recipe),
        ("initial", archive_initial_words(archiving)),
        ("tolerance", tolerance),
        ("window", archive_window_words(stored)),
    ]
    headers = ("checkpoint", "bytes", "of its\nfile", "from the\ninitial", "from the\nprevious", "rank", "at\nmost")
    rows = tuple(
        (
            each.name,
            format_size(each.stored_bytes),
            format_percent(each.stored_bytes, each.bytes),
            str(each.from_initial),
            str(each.from_previous),
            "-" if each.rank is None else f"{each.rank:g}",
            "-" if each.rank_bound is None else str(each.rank_bound),
            f"{each.error:.1e}",
        )
        for each in stored
    )
    size = compared("checkpoints", format_size, before=archiving.bytes.before, after=archiving.bytes.after)
    return Page(
        (
            Facts.of(*facts),
            LayerTable((*headers, "largest\nerror"), rows),
            side_by_side([size], "files", "archive"),
            Facts.of(("output", archiving.output), ("took", format_seconds(archiving.seconds))),
        )
    )


def _grown(label: str, size: BeforeAfter) -> Comparison:
    """A size that may grow, because that was asked for."""
    return replace(compared(label, format_size, before=size.before, after=size.after), change=None)


def export_page(export: Export) -> Page:
    """What `compress export` wrote, and how to load it."""
    size = _grown("weight files", export.bytes)
    facts = [("output", export.output), ("load", export.load)]
    if export.difference is not None:
        facts.append(("checked", f"outputs differ from torch's by {export.difference:.1e} at most"))
    if export.tensor_types is not None:
        types = ", ".join(f"{count} as {name}" for name, count in export.tensor_types.items())
        facts.append(("tensors", f"{types}; equal to the model's"))
    return Page(
        (
            Facts.of(("model", export.source), ("to", f"{export.to}, {export.layers} low-rank layers")),
            side_by_side([size]),
            Facts.of(*facts, ("took", format_seconds(export.seconds))),
        )
    )


def merging_page(merging: Merging) -> Page:
    """What `compress merge` measured before merging, the change of each task, and the output."""
    if merging.adapter is not None:
        return merged_adapters_page(merging, merging.adapter)
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
    parts: list[Block] = [Facts.of(*facts), *_overlap_parts(merging)]
    if merging.warnings:
        parts.append(Facts.of(*(("warning", words) for words in merging.warnings)))
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
                format_percent(task.output_change),
            )
            for task in merging.tasks
        )
        parts.append(LayerTable(headers, rows))
    parts.append(
        side_by_side(
            [
                compared("parameters", format_count, before=merging.parts_parameters, after=merging.parameters),
                compared("weight files", format_size, before=merging.parts_bytes, after=merging.bytes),
            ],
            "apart",
            "merged",
        )
    )
    output = merging.output or "nothing was written"
    parts.append(Facts.of(("output", output), ("took", format_seconds(merging.seconds))))
    return Page(tuple(parts))


def _overlap_parts(merging: Merging) -> Iterator[Block]:
    tasks = range(len(merging.models))
    headers = ("layer", "shape", *(f"interference\nin task {task + 1}" for task in tasks), "subspace\noverlap")
    headers += ("of\nrandom", "smallest\nangle")
    rows = []
    for layer in merging.layers:
        interference = layer.interference or (None for _ in tasks)
        cells = ("-" if share is None else format_percent(share) for share in interference)
        overlap = (format_percent(layer.subspace), format_percent(layer.random), f"{layer.smallest_angle:.1f}°")
        rows.append((one_line(layer.name), format_shape(layer.shape), *cells, *overlap))
    if not rows:
        return
    seen = "its layers see" if merging.tasks else "span its layer's row space"
    yield LayerTable(headers, tuple(rows))
    yield Facts.of(
        ("interference", f"outputs of the other networks' layer relative to the task's own, on inputs that {seen}"),
        ("overlap", "mean squared cosine of the principal angles of the row spaces (99 % of the energy)"),
    )


def _plan_parts(plan: Plan) -> list[Block]:
    """The table of ranks, and the reasons as numbered notes, since most are shared by many layers."""
    layers = plan.layers
    reasons = list(dict.fromkeys(one_line(layer.reason) for layer in layers))
    shared, bits = len(reasons) == 1, quantizes(layers)
    rows = [
        (
            one_line(layer.name),
            format_shape(layer.shape),
            rank_words(layer),
            form_words(layer),
            *((bits_words(layer),) if bits else ()),
            format_percent(layer.parameters, layer.parameters_before),
            error_words(layer.error, 3),
            *(() if plan.device is None else (time_words(layer),)),
            *(() if shared else (str(reasons.index(one_line(layer.reason)) + 1),)),
        )
        for layer in layers
    ]
    headers = (
        "layer",
        "shape",
        "rank",
        "form",
        *(("bits",) if bits else ()),
        "kept",
        plan.error_name.replace(" ", "\n"),
        *(() if plan.device is None else ("time",)),
        *(() if shared else ("why",)),
    )
    notes = [("why", reasons[0])] if shared else [(str(i), reason) for i, reason in enumerate(reasons, start=1)]
    if bits:
        notes.append(("bits", BITS_NOTE))
    if plan.device is not None:
        notes.append(("time", time_note(layers, plan.device)))
    notes += [("note", words) for words in (above_one_words(layers), stored_only_words(layers)) if words is not None]
    return [LayerTable(headers, tuple(rows)), Facts.of(*notes)]


def _ranks(layers: Sequence[InspectedLayer]) -> tuple[Block, ...]:
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
        rows.append((one_line(layer.layer.name), format_shape(layer.layer.shape), *numbers))
    notes = Facts.of(
        ("numerical", "singular values above 0.001 of the largest"),
        ("Frobenius", f"least rank with a relative error of at most {FROBENIUS_ERROR:g}"),
        ("energy", "least rank with 99 % of the sum of squares"),
        ("entropy", "effective rank of Roy and Vetterli (2007)"),
        ("participation", "participation ratio of the squares"),
        ("stable", "squared Frobenius over squared spectral norm: too small to truncate at"),
    )
    return Title("Effective ranks"), LayerTable(headers, tuple(rows)), notes


def _widths(layers: Sequence[InspectedLayer]) -> tuple[Block, ...]:
    """What each layer loses in each width that was asked for."""
    from compressor.forms import quantization_of

    errors = [
        {of.bits: each[0] for form, each in layer.quantized_errors.items() if (of := quantization_of(form)) is not None}
        for layer in layers
    ]
    widths = sorted({bits for each in errors for bits in each}, reverse=True)
    if not widths:
        return ()
    rows = tuple(
        (
            one_line(layer.layer.name),
            format_shape(layer.layer.shape),
            *(f"{100 * own[bits]:.2g} %" if bits in own else "-" for bits in widths),
        )
        for layer, own in zip(layers, errors, strict=True)
    )
    notes = Facts.of(("bits", "relative Frobenius error of the matrix rounded to nearest, with scales searched for"))
    return Title("In fewer bits"), LayerTable(("layer", "shape", *(f"{bits}\nbits" for bits in widths)), rows), notes


def _memory_cells(layer: InspectedLayer) -> tuple[str, ...]:
    window, start = layer.window, layer.initialization
    bound, exponent = (window.rank_bound, window.forgetting_exponent) if window else (None, None)
    share, above = (start.share, start.above_edge) if start else (None, None)
    return (
        number_words(layer.uses),
        number_words(window.steps if window else None),
        f"{format_short(bound)} vacuous" if window and window.vacuous and bound is not None else number_words(bound),
        "-" if exponent is None else f"{exponent:.3g}",
        "-" if share is None else share_words(share),
        number_words(above),
    )


def _why_unknown(layer: InspectedLayer) -> list[str]:
    """Why there is no rank bound or no edge, each reason once."""
    window, start = layer.window, layer.initialization
    bound = window.reason if window and window.rank_bound is None else ""
    edge = start.reason if start and not bound.endswith(start.reason) else ""
    return [one_line(reason) for reason in (bound, edge) if reason]


def _memory(layers: Sequence[InspectedLayer]) -> tuple[Block, ...]:
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
        rows.append((one_line(layer.layer.name), format_shape(layer.layer.shape), *_memory_cells(layer), notes))
    title = Title("Memory of the training")
    if reasons and all(cell == "-" for row in rows for cell in row[3:-1]):  # of a model without a recipe
        return title, Facts.of(*(("unknown", reason) for reason in reasons))
    if not reasons:
        headers, rows = headers[:-1], [row[:-1] for row in rows]
    terms = [
        ("uses", "how often the matrix is used per example"),
        ("window", f"at epsilon {epsilon:g}: the steps in which all but {epsilon:g} of the matrix was written"),
        ("rank bound", "batch x uses x window; vacuous if it is not below the full rank"),
        ("K", "forgetting exponent: exp(-K) of the initialization is left ('start left')"),
        ("above edge", "singular values above the edge of the surviving initialization"),
    ]
    numbered = [(str(number), reason) for number, reason in enumerate(reasons, start=1)]
    explained = [Facts.of(*numbered)] if numbered else []
    return title, LayerTable(headers, tuple(rows)), *explained, Facts.of(*terms)


def _initial(found: InitialFound | None) -> tuple[Block, ...]:
    """What layers have left of their initial weights, and what training wrote beside them."""
    if found is None or not found.layers:
        return ()
    return Title("What training wrote"), LayerTable(*initial_table(found)), Facts.of(*initial_terms(found))


def _skipped(layers: Iterable[Layer]) -> tuple[Block, ...]:
    by_reason: dict[str, list[str]] = {}
    for layer in layers:
        if layer.skip is not None:
            by_reason.setdefault(one_line(layer.skip), []).append(one_line(layer.name))
    if not by_reason:
        return ()
    lines = []
    for reason, names in by_reason.items():
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        lines.append(f"{shown}: {reason}")
    return Title("Skipped"), Lines(tuple(lines))


def _measured_on(evaluation: Evaluation) -> Lines:
    words = f"measured on {evaluation.data}: {count_words(evaluation)}, {evaluation.device}"
    lines = [one_line(words)]
    if any(timing.ratio is not None for timing in evaluation.latency):
        lines.append(PAIRED)
    return Lines(tuple(lines), dim=True)


def recipe_facts(recipe: TrainingRecipe) -> Iterator[tuple[str, str]]:
    yield "trained", recipe_words(recipe)
    if recipe.sources:
        yield "", f"from {recipe_sources(recipe)}"


def _advice(advice: str | None) -> Iterator[tuple[str, str]]:
    if advice:
        yield "advice", advice


def number_words(number: int | None) -> str:
    if number is None:
        return "-"
    return f"{number:,}" if number < 10**6 else format_short(number)


def share_words(share: float) -> str:
    return format_percent(share) if share >= 0.0005 else f"{100 * share:.0e} %"
