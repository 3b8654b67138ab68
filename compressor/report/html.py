"""The report as one HTML file: nothing loaded, the same bytes for the same result, readable without its script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import BadInput
from compressor.formatting import format_seconds, format_size, one_line
from compressor.report.beside_uniform import uniform_table
from compressor.report.comparison import Comparison, compression_rows
from compressor.report.initial_words import initial_facts, initial_table, initial_terms, started_layers
from compressor.report.layer_rows import layer_rows
from compressor.report.loss_plots import loss_plot, search_plot
from compressor.report.losses import curve_points
from compressor.report.other_sizes import OtherSize, OtherSizes, other_sizes
from compressor.report.outcome import outcomes
from compressor.report.pages import base_facts
from compressor.report.plot import SHAPES, Plot
from compressor.report.script_text import script_text
from compressor.report.wording import (
    BITS_NOTE,
    SEARCH_HEADERS,
    above_one_words,
    calibration_words,
    count_words,
    left_out_words,
    loss_name,
    measured_alone,
    quantizes,
    recipe_words,
    search_rows,
    search_words,
    squeezed_words,
    stored_only_words,
    timed_on,
    widths_words,
)

if TYPE_CHECKING:
    from compressor.recipe import TrainingRecipe
    from compressor.results import Compression

HERE = Path(__file__).parent


def check_report_path(path: Path, *, source: Path | None, overwrite: bool) -> None:
    """Refuse a report that could not be written, before the work starts.

    Raises `BadInput` if the path is not named .html, exists and `overwrite` is not set, is not in a writable folder or
    is in the model folder `source`, or if jinja2 is not installed.
    """
    from compressor.io import check_output

    if find_spec("jinja2") is None:
        raise BadInput(
            "a report needs jinja2, which is not installed", where=path, remedy="run pip install 'compressor[report]'"
        )
    # A slip such as --report MODEL --overwrite must not destroy a model.
    if path.suffix.lower() not in (".html", ".htm"):
        raise BadInput("a report is an HTML file", where=path, remedy="give it a name that ends in .html")
    check_output(path, sources=[] if source is None else [source], form="file", overwrite=overwrite)


def write_report(compression: Compression, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a compression as one HTML file with figures, for a browser without a connection.

    In a model folder that this package wrote, the report belongs to the folder and is replaced with it.

    Args:
        compression: The result of `compress`.
        path: The file to write, named .html.
        overwrite: Whether to replace a file that exists.

    Raises:
        BadInput: the path cannot be written, or is in the source's folder; or jinja2 is not installed.

    Example:
        >>> small = compressor.compress("model/", output="small/", keep=0.6, data="test.jsonl")
        >>> compressor.write_report(small, "report.html")
    """
    path, source = Path(path), Path(compression.source) if compression.model is None else None
    check_report_path(path, source=source, overwrite=overwrite)
    write_page(report_page(compression), path, overwrite=overwrite)


def write_page(page: str, path: Path, *, overwrite: bool) -> None:
    """Write a page as a file, whole or not at all; in a folder of ours it is replaced with the folder."""
    from compressor.io import note_file, staged_file

    with staged_file(path, overwrite=overwrite) as staged:
        # A name in a checkpoint may hold half a surrogate pair, which UTF-8 has no bytes for.
        staged.write_bytes(page.encode("utf-8", "backslashreplace"))
    note_file(path)


def report_page(compression: Compression) -> str:
    """The page as text; names from checkpoints and paths are escaped, since they may come from anyone."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    from compressor.measure import EPSILON

    # Trimmed blocks leave no empty lines where the template has conditions.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["size"] = format_size
    template = environment.from_string(_part("report.html"))
    compression = _portable(compression)
    plan, evaluation, script = compression.plan, compression.evaluation, _part("report.js")
    layers = layer_rows(compression)
    points, sizes = curve_points(compression), other_sizes(compression)
    plot = None if sizes is None else loss_plot(compression, points, sizes)
    search = plan.search
    table = None if plan.initial is None or not plan.initial.layers else initial_table(plan.initial)
    times = () if plan.device is None else ("predicted", "measured")[: 1 + measured_alone(plan.layers)]
    return template.render(
        title=f"Compression of {one_line(compression.source)}",
        style=Markup(_part("report.css")),
        script=Markup(script),
        script_hash=_hash(script),
        shapes=SHAPES,
        breakable=_breakable,
        verdict=compression.verdict.remarks,
        outcomes=outcomes(compression),
        tiles=list(_tiles(compression)),
        source=one_line(compression.source),
        output=one_line(compression.output) if compression.output else None,
        facts=list(_facts(compression)),
        advice=plan.advice,
        warnings=compression.warnings,
        stored_only=stored_only_words(plan.layers),
        above_one=above_one_words(plan.layers),
        left_out=left_out_words(compression.left_out, compression.weights_at) if compression.left_out else None,
        initial_headers=[] if table is None else [header.replace("\n", " ") for header in table[0]],
        initial_layers=[] if table is None else [(_breakable(name), *cells) for name, *cells in table[1]],
        initial_terms=[] if plan.initial is None else list(initial_terms(plan.initial)),
        calibration=plan.calibration is not None,
        points=points,
        loss_plot=plot,
        loss_name="" if compression.curve is None else loss_name(compression.curve.unit),
        curve_words="" if compression.curve is None else _curve_words(compression.curve.unit),
        sizes=sizes,
        chosen_size=0 if sizes is None else sizes.made,
        listed_sizes=() if sizes is None else _listed_sizes(sizes),
        sizes_json=None if sizes is None or plot is None else Markup(_sizes_json(compression, sizes, plot)),
        uniform=uniform_table(compression),
        better=None if compression.better_uniform is None else str(compression.better_uniform),
        search_plot=None
        if search is None
        else search_plot(search, eligible=plan.eligible_before, limit=plan.budget.drop_limit),
        tried_sizes=search_rows(search) if search is not None else [],
        search_headers=SEARCH_HEADERS,
        layers=layers,
        unfolded=len(plan.layers) <= _MOST_UNFOLDED,
        times=times,
        measured_alone=measured_alone(plan.layers),
        planned_for=plan.device,
        bits_note=BITS_NOTE if quantizes(plan.layers) else None,
        error_name=plan.error_name,
        started=bool(started_layers(plan.layers)),
        edges=any(row.ranks is not None and row.ranks.edge is not None for row in layers.rows),
        bounds=any(row.ranks is not None and row.ranks.bound is not None for row in layers.rows),
        epsilon=f"{EPSILON:g}",
        comparisons=compression_rows(compression),
        evaluation=evaluation,
        timed_on=timed_on(compression),
        measured_count=None if evaluation is None else count_words(evaluation),
        recipe=recipe_words(compression.recipe),
        hyperparameters=_hyperparameters(compression.recipe),
    )


# More layers than these are folded into their blocks when the page opens.
_MOST_UNFOLDED = 60

# No more rows has the table of other sizes.
_LISTED_SIZES = 12


def _part(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    """By which the page allows its own script and no other."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _tiles(compression: Compression) -> Iterator[Comparison]:
    """Size, quality and speed before and after; what was not measured is said to be so."""
    rows = compression_rows(compression)
    yield replace(next(row for row in rows if row.label == "weight files"), label="size of the weight files")
    evaluation, calibration = compression.evaluation, compression.plan.calibration
    if evaluation is not None:
        quality = next(row for row in rows if row.label == evaluation.metric)
        yield replace(quality, label=f"{evaluation.metric} on {evaluation.data}")
    elif calibration is not None:
        lost = f"{calibration.holdout_loss:+.2g}"
        yield Comparison("quality on the holdout of the calibration", "", lost, loss_name(calibration.unit))
    else:
        yield Comparison("quality", "", "not measured", "give data to have it measured")
    timed = [row for row in rows if row.label.startswith("latency, ")]
    predicted = compression.latency_changes
    if timed:
        yield from timed[:2]
    elif predicted:
        worst = max(predicted, key=lambda each: each.ratio)
        words = f"{worst.ratio:.2f} x the time"
        where = f"predicted for {worst.predicted_on}"
        yield Comparison(f"latency of the layers, {worst.workload}", "", words, where, worst.change)
    else:
        yield Comparison("speed", "", "not measured", "give data, or prefer speed, to know it")


def _facts(compression: Compression) -> Iterator[tuple[str, str]]:
    """How the model was made, with labels."""
    plan = compression.plan
    yield from base_facts(compression)
    if (widths := widths_words(compression)) is not None:
        yield "bits", widths
    if (squeezed := squeezed_words(plan)) is not None:
        yield "already", squeezed
    yield from ((label or "", words) for label, words in initial_facts(plan))
    if plan.calibration is not None:
        yield "calibration", calibration_words(plan.calibration)
    if plan.search is not None:
        yield "search", search_words(plan.search)
    if compression.command:
        yield "command", compression.command
    yield "took", f"{format_seconds(compression.seconds)}, peak memory {format_size(compression.peak_memory_bytes)}"


def _curve_words(unit: str) -> str:
    if unit == "relative error":
        return "what the allocation gives at other sizes: the relative error of the layers, root mean square"
    return f"what the allocation is predicted to lose at other sizes: {loss_name(unit)}, to second order"


def _listed_sizes(sizes: OtherSizes) -> list[OtherSize]:
    last = len(sizes.sizes) - 1
    places = {round(last * number / (_LISTED_SIZES - 1)) for number in range(_LISTED_SIZES)}
    return [sizes.sizes[place] for place in sorted(places)]


def _sizes_json(compression: Compression, sizes: OtherSizes, plot: Plot) -> str:
    """What the slider shows, as JSON that cannot end its script element."""
    unit = "" if compression.curve is None else compression.curve.unit
    content = {
        "before": compression.bytes.before,
        "sizes": [
            each.to_dict(unit) | {"x": plot.x.place(each.bytes), "y": plot.y.place(each.loss)} for each in sizes.sizes
        ],
    }
    return script_text(content)


def _breakable(name: str) -> str:
    """A name that may be broken after its dots."""
    from markupsafe import Markup

    return Markup(".<wbr>").join(name.split("."))


def _portable(compression: Compression) -> Compression:
    """A compression without absolute paths of this machine, for a page that is shared."""
    from compressor.io import portable_name

    evaluation = compression.evaluation
    return replace(
        compression,
        source=portable_name(compression.source),
        output=None if compression.output is None else portable_name(compression.output),
        plan=compression.plan.portable(),
        evaluation=None if evaluation is None else replace(evaluation, data=portable_name(evaluation.data)),
    )


def _listed(value: object) -> object:
    """A value of the recipe as text, without Python's brackets and quotes."""
    if not isinstance(value, tuple):
        return value
    return ", ".join(f"{e[0]}: {e[1]:g}" if isinstance(e, tuple) else str(e) for e in value) or "none"


def _hyperparameters(recipe: TrainingRecipe) -> list[dict[str, Any]]:
    """The known fields, each with its source."""
    return [
        {"name": entry.name.replace("_", " "), "value": _listed(value), "source": recipe.sources.get(entry.name, "")}
        for entry in fields(recipe)
        if entry.name != "sources" and (value := getattr(recipe, entry.name)) is not None
    ]
