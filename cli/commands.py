"""The commands: each parses its request, calls one function of the public API, and shows the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from compressor.api import options as asked
from compressor.api.flags import in_flags, with_flags
from compressor.api.option import Options
from compressor.cli.parameters import given, typer_command
from compressor.cli.terminal import (
    document_text,
    shown_progress,
    write_rendered,
    write_text,
    writing_to_standard_output,
)
from compressor.errors import CompressorError

if TYPE_CHECKING:
    from compressor.report.blocks import Page
    from compressor.results import Compression

# The blank lines keep typer from joining these into one paragraph.
EXIT_STATUSES = (
    "[bold]Exit status[/bold]: 0 done; 1 failed; 2 the request or an input is bad; "
    "3 a quality gate was not met; 130 interrupted."
)
MAIN_EPILOG = f"""
[bold]Other commands[/bold] (each has its own --help):

[cyan]compress inspect MODEL[/cyan]   effective ranks and memory windows, layer by layer

[cyan]compress plan MODEL[/cyan]      the ranks without the work, to edit and apply

[cyan]compress evaluate MODEL[/cyan]  a compressed model beside its baseline, on data

[cyan]compress restore MODEL[/cyan]   factor pairs multiplied back to a dense checkpoint

[cyan]compress export MODEL[/cyan]    dense, ONNX, GGUF, a LoRA adapter, or with its own code for transformers

[cyan]compress diagnose MODEL[/cyan]  what training forgot, how close to a stationary point it got, what collapsed

[cyan]compress merge MODEL ...[/cyan]  networks added, or put side by side in one

[cyan]compress archive CHECKPOINT ...[/cyan]  the checkpoints of one run, as changes from one another

[cyan]compress explore[/cyan]         a page that shows how SGD writes a matrix and weight decay forgets it

A model that is named like one of these commands is written ./inspect.

{EXIT_STATUSES}"""


class _Command(TyperCommand):
    """A command whose help may be read by `head`, or be sent to a full disk."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)
        if option is not None:
            option.metavar = ""  # it takes no value, as no switch does
        return option

    def get_help(self, ctx: Any) -> NoReturn:  # typer does not export the type that this takes
        # Where the reader has gone rich leaves with SystemExit; and nothing may be printed after it has.
        with writing_to_standard_output(), suppress(SystemExit):
            super().get_help(ctx)
        raise typer.Exit


def _app() -> typer.Typer:
    return typer.Typer(
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


main_command, subcommands = _app(), _app()


def _show(document: Mapping[str, Any], page: Page, *, json: bool, written: str | Path | None) -> None:
    """Write a result to standard output; if that fails, the error says what was `written` before."""
    try:
        if json:
            write_text(document_text(document))
        else:
            write_rendered(page.reworded(with_flags))
    except CompressorError as error:
        if written is None:
            raise
        raise CompressorError(f"{written} was written, but {error}") from error


def _write_report(compression: Compression, path: Path, *, overwrite: bool) -> None:
    """Write the report last, so that the model is there even if that fails; the error then says so."""
    from compressor.report import write_report

    try:
        write_report(in_flags(compression), path, overwrite=overwrite)
    except (CompressorError, OSError) as error:
        model = (
            "no model was to be written"
            if compression.output is None
            else f"the model was written to {compression.output}"
        )
        raise CompressorError(f"{model}; the report was not: {error}") from error


def _print_version(asked: bool) -> None:
    if asked:
        from compressor.version import VERSION

        write_text(f"compress {VERSION}\n")
        raise typer.Exit


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        parser=given("MODEL", str),
        help="A .safetensors, index, .bin, .pt or .gguf file, a Hugging Face folder, or org/name on the Hugging Face "
        "hub; to compress, inspect, plan and export also a LoRA adapter.",
        show_default=False,
    ),
]
Models = Annotated[
    list[str],
    typer.Argument(
        metavar="A B [C ...]",
        parser=given("MODEL", str),
        help="Two or more networks of one architecture: weight files, or Hugging Face folders; or LoRA adapters of one "
        "base.",
        show_default=False,
    ),
]
Checkpoints = Annotated[
    list[str],
    typer.Argument(
        metavar="CHECKPOINT ...",
        parser=given("CHECKPOINT", str),
        help="The checkpoints of one run: weight files or model folders whose names tell their steps.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON document and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", metavar="", help="No progress; only warnings and the result.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", metavar="", help="Replace a file that exists.")]
Report = Annotated[
    Path | None,
    typer.Option(metavar="FILE.html", parser=given("--report"), help="Write a one-file report with figures."),
]
PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE.json",
        parser=given("--output"),
        help="Write the plan, to edit and apply.",
    ),
]
Figure = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE.svg",
        parser=given("--output"),
        help="Draw how ranks evolved over --series, as .svg or .png.",
    ),
]
Version = Annotated[
    bool, typer.Option("--version", metavar="", is_eager=True, callback=_print_version, help="Print the version.")
]


def _command(app: typer.Typer, of: type[Options], epilog: str = EXIT_STATUSES) -> Callable[[Any], Any]:
    """Register a function as the command of a verb, with a flag for each of the verb's options."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        app.command(of.verb, cls=_Command, epilog=epilog)(typer_command(function, of))
        return function

    return register


@_command(main_command, asked.CompressOptions, MAIN_EPILOG)
def compress(
    model: Model,
    options: asked.CompressOptions,
    *,
    report: Report = None,
    json: Json = False,
    quiet: Quiet = False,
    version: Version = False,
) -> None:
    """Make a trained checkpoint smaller by low-rank factorization, and measure what that cost.

    Without a budget the training recipe decides where that is safe, and elsewhere a tolerance that needs no data.
    """
    with shown_progress(quiet=quiet) as progress:
        from compressor import compress as compress_model
        from compressor.report import check_report_path, compression_page

        if report is not None:
            check_report_path(report, source=Path(model), overwrite=options.overwrite)
        compression = compress_model(model, options, progress=progress)
    _show(compression.to_dict(), compression_page(compression), json=json, written=compression.output)
    if report is not None:
        _write_report(compression, report, overwrite=options.overwrite)
        if not json:
            write_text(f"report  {report}\n")


@_command(subcommands, asked.InspectOptions)
def inspect(model: Model, options: asked.InspectOptions, *, json: Json = False, quiet: Quiet = False) -> None:
    """Show effective ranks and memory windows, layer by layer."""
    with shown_progress(quiet=quiet) as progress:
        from compressor import inspect as inspect_model
        from compressor.report import inspection_page

        inspection = inspect_model(model, options, progress=progress)
    _show(inspection.to_dict(), inspection_page(inspection), json=json, written=None)


@_command(subcommands, asked.PlanOptions)
def plan(
    model: Model,
    options: asked.PlanOptions,
    *,
    output: PlanFile = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose the ranks without doing the work; edit the file and apply it with 'compress MODEL --plan FILE'."""
    with shown_progress(quiet=quiet) as progress:
        from compressor import plan as plan_model
        from compressor.io import check_output, staged_file
        from compressor.report import plan_page

        if output is not None:
            check_output(output, sources=[Path(model)], form="file", overwrite=overwrite)
        chosen = plan_model(model, options, progress=progress)
        if output is not None:
            with staged_file(output, overwrite=overwrite) as staged:
                staged.write_bytes(document_text(chosen.portable().to_dict()).encode())
    _show(chosen.to_dict(), plan_page(chosen, output=output), json=json, written=output)


@_command(subcommands, asked.EvaluateOptions)
def evaluate(model: Model, options: asked.EvaluateOptions, *, json: Json = False, quiet: Quiet = False) -> None:
    """Measure a compressed model beside its baseline: quality, size, arithmetic, memory, latency."""
    with shown_progress(quiet=quiet) as progress:
        from compressor import evaluate as evaluate_model
        from compressor.report import evaluation_page
        from compressor.results import SCHEMA_VERSION

        evaluation = evaluate_model(model, options, progress=progress)
    document = {"schema_version": SCHEMA_VERSION, "source": model, **evaluation.to_dict()}
    _show(document, evaluation_page(evaluation), json=json, written=None)


@_command(subcommands, asked.RestoreOptions)
def restore(model: Model, options: asked.RestoreOptions, *, json: Json = False, quiet: Quiet = False) -> None:
    """Multiply factor pairs back to a dense checkpoint that the original code loads."""
    with shown_progress(quiet=quiet) as progress:
        from compressor import restore as restore_model
        from compressor.report import restoration_page

        restored = restore_model(model, options, progress=progress)
    _show(restored.to_dict(), restoration_page(restored), json=json, written=restored.output)


@_command(subcommands, asked.ExportOptions)
def export(model: Model, options: asked.ExportOptions, *, json: Json = False, quiet: Quiet = False) -> None:
    """Write a compressed model in a format that other software runs."""
    with shown_progress(quiet=quiet) as progress:
        from compressor import export as export_model
        from compressor.report import export_page

        exported = export_model(model, options, progress=progress)
    _show(exported.to_dict(), export_page(exported), json=json, written=exported.output)


@_command(subcommands, asked.DiagnoseOptions)
def diagnose(
    model: Model,
    options: asked.DiagnoseOptions,
    *,
    output: Figure = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find out what training did to a model: what it forgot, how close to a stationary point it got, what collapsed."""
    with shown_progress(quiet=quiet) as progress:
        from compressor import diagnose as diagnose_model
        from compressor.errors import BadInput
        from compressor.report import check_figure_path, diagnosis_page, write_rank_figure

        if output is not None:
            if options.series is None:
                raise BadInput("`output` is for the figure of `series`", remedy="give `series`, or leave it out")
            check_figure_path(output, source=Path(model), overwrite=overwrite)
        found = diagnose_model(model, options, progress=progress)
        if output is not None and found.series is not None:
            write_rank_figure(found.series, output, overwrite=overwrite)
    _show(found.to_dict(), diagnosis_page(found, figure=output), json=json, written=output)


@_command(subcommands, asked.MergeOptions)
def merge(models: Models, options: asked.MergeOptions, *, json: Json = False, quiet: Quiet = False) -> None:
    """Merge networks of one architecture into one, and measure what that costs each of their tasks."""
    with shown_progress(quiet=quiet) as progress:
        from compressor import merge as merge_models
        from compressor.report import merging_page
        from compressor.results import MergeRefused

        refused = None
        try:
            merged = merge_models(models, options, progress=progress)
        except MergeRefused as error:
            refused, merged = error, error.merging
    _show(merged.to_dict(), merging_page(merged), json=json, written=merged.output)
    if refused is not None:
        raise refused


@_command(subcommands, asked.ArchiveOptions)
def archive(
    checkpoints: Checkpoints, options: asked.ArchiveOptions, *, json: Json = False, quiet: Quiet = False
) -> None:
    """Store the checkpoints of one training run as changes; 'compress restore' gives any of them back."""
    with shown_progress(quiet=quiet) as progress:
        from compressor import archive as archive_checkpoints
        from compressor.report import archive_page

        archived = archive_checkpoints(checkpoints, options, progress=progress)
    _show(archived.to_dict(), archive_page(archived), json=json, written=archived.output)


@_command(subcommands, asked.ExploreOptions)
def explore(options: asked.ExploreOptions, *, quiet: Quiet = False) -> None:
    """Write a page that shows how SGD writes a matrix and weight decay forgets it; it opens in a browser, offline."""
    with shown_progress(quiet=quiet) as progress:
        from compressor import explore as write_explorer

        path = write_explorer(None, options, progress=progress)
    write_text(f"explorer  {path}\n")
