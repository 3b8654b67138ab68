"""The report as one HTML file: no script, nothing loaded, the same bytes for the same result."""

from __future__ import annotations

from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.errors import BadInput
from compressor.evaluation import Change, LatencyChange
from compressor.formatting import format_percent, format_seconds, format_shape, format_size, one_line
from compressor.forms import has_own_errors
from compressor.report.comparison import compression_rows
from compressor.report.initial_words import initial_facts, initial_table, initial_terms, started_layers
from compressor.report.losses import curve_points
from compressor.report.wording import (
    BITS_NOTE,
    SEARCH_HEADERS,
    above_one_words,
    bits_words,
    budget_words,
    calibration_words,
    count_words,
    error_words,
    form_words,
    left_out_words,
    measured_alone,
    quantizes,
    rank_words,
    recipe_words,
    search_rows,
    search_words,
    slowest_times,
    squeezed_words,
    stored_only_words,
    timed_on,
    widths_words,
)

if TYPE_CHECKING:
    from compressor.recipe import TrainingRecipe
    from compressor.report.figures import RankMarks
    from compressor.results import Compression

TEMPLATE = Path(__file__).with_name("report.html")


def check_report_path(path: Path, *, source: Path | None, overwrite: bool) -> None:
    """Refuse a report that could not be written, before the work starts.

    Raises `BadInput` if the path is not named .html, exists and `overwrite` is not set, is not in a writable folder or
    is in the model folder `source`, or if the libraries that draw the report are not installed.
    """
    from compressor.io import check_output

    for library in ("jinja2", "matplotlib"):
        if find_spec(library) is None:
            raise BadInput(
                f"a report needs {library}, which is not installed",
                where=path,
                remedy="run pip install 'compressor[report]'",
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
        BadInput: the path cannot be written, or is in the source's folder; or matplotlib or jinja2 is not installed.

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
    from compressor.report.figures import curve_figure, ranks_figure, search_figure, sizes_figure, spectrum_figure

    # Trimmed blocks leave no empty lines where the template has conditions.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    compression = _portable(compression)
    plan, evaluation = compression.plan, compression.evaluation
    marks, points = _marks(compression), curve_points(compression)
    limit = plan.budget.drop_limit
    started = {layer.name for layer in started_layers(plan.layers)}
    whole = {each.layer.name: each.singular_values for each in compression.measured if each.layer.name in started}
    table = None if plan.initial is None or not plan.initial.layers else initial_table(plan.initial)
    return template.render(
        verdict=compression.verdict.remarks,
        source=one_line(compression.source),
        output=one_line(compression.output) if compression.output else None,
        command=compression.command,
        budget=budget_words(plan.budget),
        widths=widths_words(compression),
        squeezed=squeezed_words(plan),
        advice=plan.advice,
        initial=[words for _, words in initial_facts(plan)],
        started=bool(started),
        initial_headers=[] if table is None else [header.replace("\n", " ") for header in table[0]],
        initial_layers=[] if table is None else [(_breakable(name), *cells) for name, *cells in table[1]],
        initial_terms=[] if plan.initial is None else list(initial_terms(plan.initial)),
        calibration=calibration_words(plan.calibration) if plan.calibration is not None else None,
        search=search_words(plan.search) if plan.search is not None else None,
        tried_sizes=search_rows(plan.search) if plan.search is not None else [],
        search_headers=SEARCH_HEADERS,
        warnings=compression.warnings,
        stored_only=stored_only_words(plan.layers),
        above_one=above_one_words(plan.layers),
        error_name=plan.error_name,
        effort=f"{format_seconds(compression.seconds)}, peak memory {format_size(compression.peak_memory_bytes)}",
        comparisons=compression_rows(compression),
        left_out=left_out_words(compression.left_out, compression.weights_at) if compression.left_out else None,
        evaluation=evaluation,
        timed_on=timed_on(compression),
        bits_note=BITS_NOTE if quantizes(plan.layers) else None,
        planned_for=plan.device,
        measured_alone=measured_alone(plan.layers),
        measured_count=None if evaluation is None else count_words(evaluation),
        recipe=recipe_words(compression.recipe),
        hyperparameters=_hyperparameters(compression.recipe),
        points=points,
        better=None if compression.better_uniform is None else str(compression.better_uniform),
        curve=None
        if compression.curve is None
        else Markup(curve_figure(compression.curve, points, plan.eligible_before)),
        tried=None
        if plan.search is None
        else Markup(search_figure(plan.search, eligible=plan.eligible_before, limit=limit)),
        sizes=Markup(sizes_figure(plan.layers)),
        ranks=Markup(ranks_figure(plan.layers, [marks[layer.name] for layer in plan.layers])),
        edges=any(mark.edge is not None for mark in marks.values()),
        epsilon=f"{EPSILON:g}",
        bounds=any(mark.bound is not None for mark in marks.values()),
        layers=[
            {
                "name": _breakable(one_line(layer.name)),
                "shape": format_shape(layer.shape),
                "kind": layer.kind,
                "started": layer.name in started,
                "rank": rank_words(layer),
                "form": form_words(layer),
                "bits": bits_words(layer),
                "kept": format_percent(layer.parameters, layer.parameters_before),
                "error": error_words(layer.error, 4),
                "times": [_time(ratio) for ratio in slowest_times(layer)[: 1 + measured_alone(plan.layers)]],
                "reason": layer.reason,
                "marks": _mark_words(marks[layer.name]),
                "spectrum": Markup(
                    spectrum_figure(
                        compression.spectra[layer.name],
                        layer.truncated_to,
                        marks[layer.name],
                        prefix=f"s{number}",
                        whole=whole.get(layer.name),
                    )
                )
                if layer.name in compression.spectra
                else None,
            }
            for number, layer in enumerate(plan.layers)
        ],
    )


def _breakable(name: str) -> str:
    """A name that may be broken after its dots."""
    from markupsafe import Markup

    return Markup(".<wbr>").join(name.split("."))


def _time(ratio: float | None) -> tuple[str, Change | None]:
    """A layer's time over that of the dense one."""
    return ("-", None) if ratio is None else (f"{ratio:.2f}", LatencyChange("", ratio).change)


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


def _marks(compression: Compression) -> dict[str, RankMarks]:
    """The marks beside the ranks of every layer in the plan.

    The recipe says nothing about the matrix that a spatial pair factorizes.
    """
    from compressor.report.figures import RankMarks

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


def _mark_words(mark: RankMarks) -> str:
    above = [] if mark.above_edge is None else [f"{mark.above_edge} above the edge"]
    return ", ".join([*above, *([] if mark.bound is None else [f"bound {mark.bound}"])])


def _hyperparameters(recipe: TrainingRecipe) -> list[dict[str, Any]]:
    """The known fields, each with its source."""
    return [
        {"name": entry.name.replace("_", " "), "value": _listed(value), "source": recipe.sources.get(entry.name, "")}
        for entry in fields(recipe)
        if entry.name != "sources" and (value := getattr(recipe, entry.name)) is not None
    ]
