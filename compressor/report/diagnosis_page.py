"""The page of a diagnosis."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.formatting import format_shape, format_short, one_line
from compressor.report.blocks import Block, Facts, LayerTable, Lines, Page, Title
from compressor.report.initial_words import initial_verdict
from compressor.report.pages import number_words, recipe_facts, share_words
from compressor.report.wording import quality_words, shortened_apart

if TYPE_CHECKING:
    from compressor.diagnosis.series import RankSeries
    from compressor.results import Diagnosis

# The table of a series fits into 80 columns: so many checkpoints of five characters, and a name beside them.
MOST_COLUMNS, NAME_WIDTH = 7, 30


def diagnosis_page(diagnosis: Diagnosis, *, figure: Path | None = None) -> Page:
    """The findings with their advice, and the measurements behind them, layer by layer."""
    parts: list[Block] = [Facts.of(("model", diagnosis.source), *_trained(diagnosis)), *_layers(diagnosis)]
    if diagnosis.predictions is not None:
        parts += _gradients(diagnosis)
    if diagnosis.series is not None:
        parts += _series(diagnosis.series)
    parts += _findings(diagnosis)
    if figure is not None:
        parts.append(Facts.of(("output", str(figure))))
    return Page(tuple(parts))


def _trained(diagnosis: Diagnosis) -> Iterator[tuple[str, str]]:
    yield from recipe_facts(diagnosis.recipe)
    if diagnosis.initial is not None:
        yield "start", initial_verdict(diagnosis.initial)
    if (found := diagnosis.predictions) is not None:
        chance = quality_words(found.metric, found.chance)
        score = f"{found.metric} {quality_words(found.metric, found.value)} (chance: {chance}), loss {found.loss:.3g}"
        yield "data", f"{found.data}: {found.count:,} predictions, {score}"


def _layers(diagnosis: Diagnosis) -> tuple[Block, ...]:
    from compressor.measure import EPSILON, FROBENIUS_ERROR

    headers = (
        "layer",
        "shape",
        "Frobe-\nnius",
        "en-\ntropy",
        "norm",
        "K",
        "start\nleft",
        "of its\nenergy",
        "rank\nbound",
    )
    rows = []
    for layer in diagnosis.layers:
        ranks, window, start = layer.inspected.ranks, layer.inspected.window, layer.inspected.initialization
        exponent = window.forgetting_exponent if window else None
        bound = window.rank_bound if window else None
        rows.append(
            (
                one_line(layer.name),
                format_shape(layer.inspected.layer.shape),
                number_words(ranks.frobenius if ranks else None),
                f"{ranks.entropy:.1f}" if ranks else "-",
                f"{layer.norm:.3g}",
                "-" if exponent is None else f"{exponent:.3g}",
                "-" if start is None or start.share is None else share_words(start.share),
                "-" if layer.start_energy is None else share_words(layer.start_energy),
                "-" if bound is None else format_short(bound) + ("*" if window and window.vacuous else ""),
            )
        )
    vacuous = any(row[-1].endswith("*") for row in rows)
    notes = Facts.of(
        (
            "Frobenius",
            f"least rank with a relative error of at most {FROBENIUS_ERROR:g}; entropy: Roy and Vetterli (2007)",
        ),
        ("K", "exp(-K) of the initialization is left ('start left'), and makes up so much of the squared norm"),
        (
            "rank bound",
            f"of the memory window at epsilon {EPSILON:g}"
            + (": * is vacuous, not below the full rank" if vacuous else ""),
        ),
    )
    return Title("Memory and ranks"), LayerTable(headers, tuple(rows)), notes


def _gradients(diagnosis: Diagnosis) -> tuple[Block, ...]:
    reasons: list[str] = []
    rows: list[tuple[str, ...]] = []
    for layer in diagnosis.layers:
        found = layer.stationarity
        why = found.reason if found is not None else "no gradient reached it"
        if why and why not in reasons:
            reasons.append(why)
        cosine, ratio = (None, None) if found is None else (found.cosine, found.ratio)
        rows.append(
            (
                one_line(layer.name),
                "-" if layer.scaling_degree is None else str(layer.scaling_degree),
                "-" if found is None else f"{found.gradient_norm:.2e}",
                "-" if cosine is None else f"{cosine:+.3f}",
                "-" if ratio is None else f"{ratio:.3g}",
                str(reasons.index(why) + 1) if why else "",
            )
        )
    headers: tuple[str, ...] = ("layer", "scale", "|gradient|", "cosine", "ratio", "note")
    if not reasons:
        headers, rows = headers[:-1], [row[:-1] for row in rows]
    notes = Facts.of(
        *((str(number), one_line(reason)) for number, reason in enumerate(reasons, start=1)),
        ("scale", "degree in which the outputs scale with the matrix: 0 not at all, 1 in proportion, - otherwise"),
        ("cosine", "of the matrix and the negative gradient of the loss; 1 at a stationary point with weight decay"),
        ("ratio", "norm of the gradient over weight decay times norm of the matrix; 1 there too"),
    )
    return Title("Weights beside the gradient"), LayerTable(headers, tuple(rows)), notes


def _series(series: RankSeries) -> tuple[Block, ...]:
    count = len(series.steps)
    columns = min(count, MOST_COLUMNS)
    shown = [round(column * (count - 1) / (columns - 1)) for column in range(columns)]
    headers = (series.unit, *(format_short(series.steps[index]) for index in shown))
    names = shortened_apart([one_line(layer.name) for layer in series.layers], NAME_WIDTH)
    rows = tuple(
        (name, *(f"{layer.ranks[index].entropy / layer.ranks[index].full:.0%}" for index in shown))
        for name, layer in zip(names, series.layers, strict=True)
    )
    checkpoints = f"{count} checkpoints in {one_line(series.folder)}"
    if len(shown) < count:
        checkpoints += f", {len(shown)} of them shown"
    title = Title("Entropy rank over the training, as a share of the full rank")
    return title, LayerTable(headers, rows), Lines((checkpoints,), dim=True)


def _findings(diagnosis: Diagnosis) -> tuple[Block, ...]:
    found = []
    for finding in diagnosis.findings:
        label = f"{'warning: ' if finding.warning else ''}{finding.subject}"
        found.append(("-", f"{label}. {finding.message} {finding.advice}"))
    return Title("Findings"), Facts.of(*found)
