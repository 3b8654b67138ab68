"""The commands: each parses its request, calls one function of the public API, and shows the result."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from compressor.api import options as asked
from compressor.api import shell_options as shell
from compressor.api.flags import in_flags, with_flags
from compressor.api.option import Options
from compressor.cli.completion import install_completion, show_completion
from compressor.cli.parameters import given, typer_command
from compressor.cli.routes import ANYWHERE, HELP, MAIN, route
from compressor.cli.terminal import document_text, shown_progress, write_rendered, write_text
from compressor.errors import BadInput, CompressorError

if TYPE_CHECKING:
    from compressor.report.blocks import Page
    from compressor.results import Compression

OF_VERBS = {of.verb: of for of in asked.VERBS}


class _Command(TyperCommand):
    """A command whose help begins with what is needed most, and may be read by `head` or be sent to a full disk."""

    def get_help(self, ctx: Any) -> NoReturn:  # typer does not export the type that this takes
        from compressor.cli.help import command_help

        about = _unwrapped(self.help or "")
        of = OF_VERBS[self.name or ""]
        write_rendered(command_help(of, self.get_params(ctx), about=about, commands=_beside(self)))
        raise typer.Exit

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        from compressor.cli.help import first_sentence

        items = super().shell_complete(ctx, incomplete)
        for item in items:
            item.help = item.help and first_sentence(item.help)
        return items


class _Commands(TyperGroup):
    """All commands; a shell completes their names, and the options of the main one, whose name need not be given."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:  # for completion
            args = _routed(args)
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        if not incomplete.startswith("-"):
            items = super().shell_complete(ctx, incomplete)
            for item in items:
                item.help = _unwrapped(self.commands[item.value].help or "").partition("\n")[0]
            return items
        main = self.commands[MAIN]
        with main.make_context(MAIN, [], parent=ctx, resilient_parsing=True) as own:
            return main.shell_complete(own, incomplete)


def _routed(words: list[str]) -> list[str]:
    """The name of the command that words are for, and the words; nothing where the name may be yet to come."""
    if all(word in ANYWHERE for word in words):
        return []
    with suppress(BadInput):
        found = route(words)
        if found.command != MAIN:
            return [found.command, *found.words]
    return [MAIN, *words]


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": list(HELP)},
)


def write_short_help() -> None:
    """Write to standard error what the commands are, and what the main one takes mostly."""
    from compressor.cli.help import short_help

    main = typer.main.get_group(app).commands[MAIN]
    context = main.make_context(MAIN, [], resilient_parsing=True)
    write_rendered(short_help(asked.CompressOptions, main.get_params(context), _beside(main)), sys.stderr)


def _beside(command: Any) -> list[Any]:
    """The commands beside the main one, for its help."""
    if command.name != MAIN:
        return []
    every = typer.main.get_group(app).commands
    return [each for name, each in every.items() if name != MAIN]


def _unwrapped(text: str) -> str:
    """Paragraphs as one line each."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _show(document: Mapping[str, Any], page: Page, shown: shell.ResultOptions, *, written: str | Path | None) -> None:
    """Write a result to standard output; if that fails, the error says what was `written` before."""
    try:
        if shown.json:
            write_text(document_text(document))
        else:
            layers = shown.layers if isinstance(shown, shell.TableOptions) else ()
            write_rendered(page.listing(layers, "`layers=all` lists each").reworded(with_flags))
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


def _print_version(context: Any, parameter: Any, asked_for: bool) -> None:
    if asked_for:
        from compressor.version import VERSION

        write_text(f"compress {VERSION}\n")
        raise typer.Exit


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        parser=given("MODEL", str),
        help="A .safetensors, index, .bin, .pt or .gguf file, a Hugging Face folder, or org/name on the Hugging Face "
        "hub. Also a LoRA adapter, to compress, inspect, plan, or export, and an archive, to restore.",
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


def _command(of: type[Options], instead: Mapping[str, Callable[..., Any]] | None = None) -> Callable[[Any], Any]:
    """Register a function as the command of a verb, with a flag for each of the verb's options."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        # What is left over is refused in words of our own.
        settings = {"allow_extra_args": True}
        command = typer_command(function, of, instead)
        app.command(of.verb, cls=_Command, hidden=of.verb == MAIN, context_settings=settings)(command)
        return function

    return register


_INSTEAD: Mapping[str, Callable[..., Any]] = {
    "version": _print_version,
    "install_completion": install_completion,
    "show_completion": show_completion,
}


@_command(asked.CompressOptions, _INSTEAD)
def compress(model: Model, options: asked.CompressOptions, shown: shell.ReportOptions) -> None:
    """Make a trained model smaller: low-rank pairs and few bits, chosen by one budget.

    Without a budget only what is safe is removed: what training did not write, where that is known, else what a
    relative error of 0.05 in each layer allows.
    """
    with shown_progress(shown) as progress:
        from compressor import compress as compress_model
        from compressor.report import check_report_path, compression_page

        if shown.report is not None:
            check_report_path(shown.report, source=Path(model), overwrite=options.overwrite)
        compression = compress_model(model, options, progress=progress)
    _show(compression.to_dict(), compression_page(compression), shown, written=compression.output)
    if shown.report is not None:
        _write_report(compression, shown.report, overwrite=options.overwrite)
        if not shown.json:
            write_text(f"report  {shown.report}\n")


@_command(asked.InspectOptions)
def inspect(model: Model, options: asked.InspectOptions, shown: shell.TableOptions) -> None:
    """Show effective ranks and memory windows, layer by layer."""
    with shown_progress(shown) as progress:
        from compressor import inspect as inspect_model
        from compressor.report import inspection_page

        inspection = inspect_model(model, options, progress=progress)
    _show(inspection.to_dict(), inspection_page(inspection), shown, written=None)


@_command(asked.PlanOptions)
def plan(model: Model, options: asked.PlanOptions, shown: shell.PlanFileOptions) -> None:
    """Choose ranks and bits without the work, to edit and apply.

    The edited file is applied by 'compress MODEL --plan FILE'.
    """
    with shown_progress(shown) as progress:
        from compressor import plan as plan_model
        from compressor.io import check_output, staged_file
        from compressor.report import plan_page

        output = shown.output
        if output is not None:
            check_output(output, sources=[Path(model)], form="file", overwrite=shown.overwrite)
        chosen = plan_model(model, options, progress=progress)
        if output is not None:
            with staged_file(output, overwrite=shown.overwrite) as staged:
                staged.write_bytes(document_text(chosen.portable().to_dict()).encode())
    _show(chosen.to_dict(), plan_page(chosen, output=output), shown, written=output)


@_command(asked.EvaluateOptions)
def evaluate(model: Model, options: asked.EvaluateOptions, shown: shell.ResultOptions) -> None:
    """Measure a compressed model beside its baseline, on data.

    Quality, size, arithmetic, memory, and latency of both.
    """
    with shown_progress(shown) as progress:
        from compressor import evaluate as evaluate_model
        from compressor.report import evaluation_page
        from compressor.results import SCHEMA_VERSION

        evaluation = evaluate_model(model, options, progress=progress)
    document = {"schema_version": SCHEMA_VERSION, "source": model, **evaluation.to_dict()}
    _show(document, evaluation_page(evaluation), shown, written=None)


@_command(asked.RestoreOptions)
def restore(model: Model, options: asked.RestoreOptions, shown: shell.ResultOptions) -> None:
    """Multiply pairs back to a dense checkpoint; unpack an archive."""
    with shown_progress(shown) as progress:
        from compressor import restore as restore_model
        from compressor.report import restoration_page

        restored = restore_model(model, options, progress=progress)
    _show(restored.to_dict(), restoration_page(restored), shown, written=restored.output)


@_command(asked.ExportOptions)
def export(model: Model, options: asked.ExportOptions, shown: shell.ResultOptions) -> None:
    """Write a form that other software runs: ONNX, GGUF, LoRA, ..."""
    with shown_progress(shown) as progress:
        from compressor import export as export_model
        from compressor.report import export_page

        exported = export_model(model, options, progress=progress)
    _show(exported.to_dict(), export_page(exported), shown, written=exported.output)


@_command(asked.DiagnoseOptions)
def diagnose(model: Model, options: asked.DiagnoseOptions, shown: shell.FigureOptions) -> None:
    """Find out what training did to a model.

    What it forgot, how close to a stationary point it got, and what collapsed.
    """
    with shown_progress(shown) as progress:
        from compressor import diagnose as diagnose_model
        from compressor.report import check_figure_path, diagnosis_page, write_rank_figure

        output = shown.output
        if output is not None:
            if options.series is None:
                raise BadInput("`output` is for the figure of `series`", remedy="give `series`, or leave it out")
            check_figure_path(output, source=Path(model), overwrite=shown.overwrite)
        found = diagnose_model(model, options, progress=progress)
        if output is not None and found.series is not None:
            write_rank_figure(found.series, output, overwrite=shown.overwrite)
    _show(found.to_dict(), diagnosis_page(found, figure=output), shown, written=output)


@_command(asked.MergeOptions)
def merge(models: Models, options: asked.MergeOptions, shown: shell.TableOptions) -> None:
    """Merge networks of one architecture, or LoRA adapters, into one.

    With --data, each network's task is measured before and after.
    """
    with shown_progress(shown) as progress:
        from compressor import merge as merge_models
        from compressor.report import merging_page
        from compressor.results import MergeRefused

        refused = None
        try:
            merged = merge_models(models, options, progress=progress)
        except MergeRefused as error:
            refused, merged = error, error.merging
    _show(merged.to_dict(), merging_page(merged), shown, written=merged.output)
    if refused is not None:
        raise refused


@_command(asked.ArchiveOptions)
def archive(checkpoints: Checkpoints, options: asked.ArchiveOptions, shown: shell.ResultOptions) -> None:
    """Store the checkpoints of one training run as changes.

    'compress restore' gives any of them back.
    """
    with shown_progress(shown) as progress:
        from compressor import archive as archive_checkpoints
        from compressor.report import archive_page

        archived = archive_checkpoints(checkpoints, options, progress=progress)
    _show(archived.to_dict(), archive_page(archived), shown, written=archived.output)


@_command(asked.ExploreOptions)
def explore(options: asked.ExploreOptions, shown: shell.ShownOptions) -> None:
    """Write a page to play with what training does to a rank.

    It shows how SGD writes a matrix and weight decay forgets it, and opens in a browser, offline.
    """
    with shown_progress(shown) as progress:
        from compressor import explore as write_explorer

        path = write_explorer(None, options, progress=progress)
    write_text(f"explorer  {path}\n")
