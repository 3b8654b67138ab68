"""The commands: each parses its request, calls one function of the public API, and shows the result."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperCommand

import compressor
from compressor.cli import options
from compressor.cli.terminal import (
    document_text,
    shown_progress,
    write_rendered,
    write_text,
    writing_to_standard_output,
)
from compressor.errors import CompressorError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from compressor.recipe import TrainingRecipe
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

[cyan]compress export MODEL[/cyan]    dense, ONNX, a LoRA adapter, or with its own code for transformers

[cyan]compress diagnose MODEL[/cyan]  what training forgot, how near a stationary point it ended, what collapsed

[cyan]compress merge MODEL ...[/cyan]  networks added, or put side by side in one

[cyan]compress explore[/cyan]         a page that plays how SGD writes a matrix and weight decay forgets it

A model that is named like one of these commands is written ./inspect.

{EXIT_STATUSES}"""


class _Command(TyperCommand):
    """A command whose help may be read by `head`, or be sent to a full disk."""

    def get_help(self, ctx: typer.Context) -> NoReturn:
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


def _show(document: Mapping[str, Any], rendered: RenderableType, *, json: bool, written: str | Path | None) -> None:
    """Write a result to standard output; where that fails the error says what was `written` nevertheless."""
    try:
        if json:
            write_text(document_text(document))
        else:
            write_rendered(rendered)
    except CompressorError as error:
        if written is None:
            raise
        raise CompressorError(f"{written} was written, but {error}") from error


def _write_report(compression: Compression, path: Path, *, overwrite: bool) -> None:
    """Write the report last: the model is there, whatever befalls the report, and the error says so."""
    from compressor.report import write_report

    try:
        write_report(compression, path, overwrite=overwrite)
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


@main_command.command("compress", cls=_Command, epilog=MAIN_EPILOG)
@options.with_training_flags
def compress(
    model: options.Model,
    *,
    revision: options.Revision = None,
    base: options.Base = None,
    output: options.Output = None,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="ORG/NAME",
            parser=options.given("--push", str),
            help="Send the written folder to the Hugging Face hub; a repository made for it is private, and weights of "
            "one are replaced only with --overwrite.",
            show_default=False,
        ),
    ] = None,
    keep: options.Keep = None,
    max_size: options.MaxSize = None,
    max_drop: options.MaxDrop = None,
    allow_miss: options.AllowMiss = False,
    tolerance: options.Tolerance = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            parser=options.given("--plan"),
            help="The ranks of an edited 'compress plan' file.",
            rich_help_panel=options.BUDGET,
        ),
    ] = None,
    recipe_file: options.RecipeFile = None,
    recipe: TrainingRecipe | None = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Measure what it cost on this: text, jsonl, csv, npz or safetensors file, image folder, "
            "builtin:digits, builtin:stdlib.",
        ),
    ] = None,
    data_samples: options.DataSamples = None,
    calibration: options.Calibration = None,
    calibration_samples: options.CalibrationSamples = None,
    refine: options.Refine = True,
    seed: options.Seed = 0,
    factory: options.Factory = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    embeddings: options.Embeddings = False,
    form: options.Form = "auto",
    max_shard_size: options.ShardSize = "5GB",
    device: options.Device = "auto",
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html", parser=options.given("--report"), help="Write a one-file report with figures."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write no model.")] = False,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Make a trained checkpoint smaller by low-rank factorization, and measure what that cost.

    Without a budget the training recipe decides where it is known to be safe, else a tolerance that is
    safe without data.
    """
    with shown_progress(quiet=quiet) as progress:
        from compressor.report import check_report_path, compression_text

        if report is not None:
            check_report_path(report, source=Path(model), overwrite=overwrite)
        recipe, sequence_length = options.training_and_windows(recipe, calibration)
        compression = compressor.compress(
            model,
            revision=revision,
            base=base,
            output=output,
            push_to=push,
            keep=keep,
            max_size=max_size,
            max_drop=max_drop,
            allow_miss=allow_miss,
            tolerance=tolerance,
            plan=plan,
            recipe=recipe,
            recipe_file=recipe_file,
            factory=factory,
            data=data,
            data_samples=data_samples,
            calibration=calibration,
            calibration_samples=calibration_samples,
            refine=refine,
            calibration_sequence_length=sequence_length,
            seed=seed,
            include=tuple(include or ()),
            exclude=tuple(exclude or ()),
            embeddings=embeddings,
            form=form,
            max_shard_size=max_shard_size,
            device=device,
            dry_run=dry_run,
            overwrite=overwrite,
            progress=progress,
        )
    _show(compression.to_dict(), compression_text(compression), json=json, written=compression.output)
    if report is not None:
        _write_report(compression, report, overwrite=overwrite)
        if not json:
            write_text(f"report  {report}\n")


@subcommands.command("inspect", cls=_Command, epilog=EXIT_STATUSES)
@options.with_training_flags
def inspect(
    model: options.Model,
    *,
    revision: options.Revision = None,
    epsilon: Annotated[float, typer.Option(help="Relative residual at which the memory window ends.")] = 0.1,
    recipe_file: options.RecipeFile = None,
    recipe: TrainingRecipe | None = None,
    factory: options.Factory = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    embeddings: options.Embeddings = False,
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show effective ranks and memory windows, layer by layer."""
    with shown_progress(quiet=quiet) as progress:
        from compressor.report import inspection_text

        inspection = compressor.inspect(
            model,
            revision=revision,
            recipe=recipe,
            recipe_file=recipe_file,
            factory=factory,
            include=tuple(include or ()),
            exclude=tuple(exclude or ()),
            embeddings=embeddings,
            epsilon=epsilon,
            device=device,
            progress=progress,
        )
    _show(inspection.to_dict(), inspection_text(inspection), json=json, written=None)


@subcommands.command("plan", cls=_Command, epilog=EXIT_STATUSES)
@options.with_training_flags
def plan(
    model: options.Model,
    *,
    revision: options.Revision = None,
    base: options.Base = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.json",
            parser=options.given("--output"),
            help="Write the plan, to edit and apply.",
        ),
    ] = None,
    keep: options.Keep = None,
    max_size: options.MaxSize = None,
    max_drop: options.MaxDrop = None,
    tolerance: options.Tolerance = None,
    recipe_file: options.RecipeFile = None,
    recipe: TrainingRecipe | None = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="What --max-drop is measured on.", rich_help_panel=options.BUDGET),
    ] = None,
    data_samples: options.DataSamples = None,
    calibration: options.Calibration = None,
    calibration_samples: options.CalibrationSamples = None,
    refine: options.Refine = True,
    seed: options.Seed = 0,
    factory: options.Factory = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    embeddings: options.Embeddings = False,
    form: options.Form = "auto",
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Choose the ranks without doing the work; edit the file and apply it with 'compress MODEL --plan FILE'."""
    with shown_progress(quiet=quiet) as progress:
        from compressor.io import check_output, staged_file
        from compressor.report import plan_text

        if output is not None:
            check_output(output, sources=[Path(model)], form="file", overwrite=overwrite)
        recipe, sequence_length = options.training_and_windows(recipe, calibration)
        chosen = compressor.plan(
            model,
            revision=revision,
            base=base,
            keep=keep,
            max_size=max_size,
            max_drop=max_drop,
            tolerance=tolerance,
            recipe=recipe,
            recipe_file=recipe_file,
            factory=factory,
            data=data,
            data_samples=data_samples,
            calibration=calibration,
            calibration_samples=calibration_samples,
            refine=refine,
            calibration_sequence_length=sequence_length,
            seed=seed,
            include=tuple(include or ()),
            exclude=tuple(exclude or ()),
            embeddings=embeddings,
            form=form,
            device=device,
            progress=progress,
        )
        if output is not None:
            with staged_file(output, overwrite=overwrite) as staged:
                staged.write_bytes(document_text(chosen.portable().to_dict()).encode())
    _show(chosen.to_dict(), plan_text(chosen, output=output), json=json, written=output)


@subcommands.command("evaluate", cls=_Command, epilog=EXIT_STATUSES)
def evaluate(
    model: options.Model,
    *,
    data: Annotated[
        str,
        typer.Option(
            metavar="DATA",
            help="Text, jsonl, csv, npz or safetensors file, image folder, builtin:digits, builtin:stdlib.",
            show_default=False,
        ),
    ],
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="ORIGINAL",
            parser=options.given("--baseline", str),
            help="The model to compare with.",
            show_default=False,
        ),
    ] = None,
    factory: options.Factory = None,
    data_samples: options.DataSamples = None,
    split: Annotated[Literal["train", "validation", "test"], typer.Option(help="Which part of the data.")] = "test",
    device: options.Device = "auto",
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure a compressed model beside its baseline: quality, size, arithmetic, memory, latency."""
    with shown_progress(quiet=quiet) as progress:
        from compressor.report import evaluation_text
        from compressor.results import SCHEMA_VERSION

        evaluation = compressor.evaluate(
            model,
            data=data,
            baseline=baseline,
            factory=factory,
            device=device,
            split=split,
            data_samples=data_samples,
            progress=progress,
        )
    document = {"schema_version": SCHEMA_VERSION, "source": model, **evaluation.to_dict()}
    _show(document, evaluation_text(evaluation), json=json, written=None)


@subcommands.command("restore", cls=_Command, epilog=EXIT_STATUSES)
def restore(
    model: options.Model,
    *,
    output: options.Output = None,
    factory: options.Factory = None,
    max_shard_size: options.ShardSize = "5GB",
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Multiply factor pairs back to a dense checkpoint that the original code loads."""
    with shown_progress(quiet=quiet) as progress:
        from compressor.report import restoration_text

        restored = compressor.restore(
            model, output=output, factory=factory, max_shard_size=max_shard_size, overwrite=overwrite, progress=progress
        )
    _show(restored.to_dict(), restoration_text(restored), json=json, written=restored.output)


@subcommands.command("export", cls=_Command, epilog=EXIT_STATUSES)
def export(
    model: options.Model,
    *,
    to: Annotated[
        Literal["dense", "hf-remote", "onnx", "lora"],
        typer.Option(
            help="dense: any engine. hf-remote: transformers with trust_remote_code. onnx: any onnxruntime. "
            "lora: a PEFT adapter, of the difference to --base.",
            show_default=False,
        ),
    ],
    output: options.Output = None,
    base: options.Base = None,
    factory: options.Factory = None,
    input_shape: Annotated[
        str | None,
        typer.Option(
            metavar="3x224x224",
            help="With onnx and --model, the shape of one example.",
            show_default=False,
        ),
    ] = None,
    max_shard_size: options.ShardSize = "5GB",
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a compressed model in the form in which something else runs it."""
    with shown_progress(quiet=quiet) as progress:
        from compressor.report import export_text

        exported = compressor.export(
            model,
            to=to,
            output=output,
            base=base,
            factory=factory,
            input_shape=None if input_shape is None else options.input_shape(input_shape),
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            progress=progress,
        )
    _show(exported.to_dict(), export_text(exported), json=json, written=exported.output)


@subcommands.command("diagnose", cls=_Command, epilog=EXIT_STATUSES)
@options.with_training_flags
def diagnose(
    model: options.Model,
    *,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="What the model was trained on, to compare weights with the gradient of the loss: text, jsonl, csv, "
            "npz or safetensors file, image folder, builtin:digits, builtin:stdlib.",
            show_default=False,
        ),
    ] = None,
    data_samples: options.DataSamples = None,
    series: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            parser=options.given("--series"),
            help="Checkpoints of the same run, files or folders whose names tell their step: how ranks evolved.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.svg",
            parser=options.given("--output"),
            help="Draw how ranks evolved over --series, as .svg or .png.",
            show_default=False,
        ),
    ] = None,
    recipe_file: options.RecipeFile = None,
    recipe: TrainingRecipe | None = None,
    factory: options.Factory = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Find out what training did to a model: what it forgot, how near a stationary point it ended, what collapsed."""
    with shown_progress(quiet=quiet) as progress:
        from compressor.errors import BadInput
        from compressor.report import check_figure_path, diagnosis_text, write_rank_figure

        if output is not None:
            if series is None:
                raise BadInput("--output is for the figure of --series", remedy="give --series DIR, or leave it out")
            check_figure_path(output, source=Path(model), overwrite=overwrite)
        found = compressor.diagnose(
            model,
            data=data,
            data_samples=data_samples,
            recipe=recipe,
            recipe_file=recipe_file,
            factory=factory,
            series=series,
            include=tuple(include or ()),
            exclude=tuple(exclude or ()),
            device=device,
            progress=progress,
        )
        if output is not None and found.series is not None:
            write_rank_figure(found.series, output, overwrite=overwrite)
    _show(found.to_dict(), diagnosis_text(found, figure=output), json=json, written=output)


@subcommands.command("explore", cls=_Command, epilog=EXIT_STATUSES)
def explore(
    *,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE.html", parser=options.given("--output"), help="The page to write."
        ),
    ] = Path("explorer.html"),
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|MODEL",
            parser=options.given("--recipe", str),
            help="Open it on these hyperparameters, or on a model's and its layers.",
            show_default=False,
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a page that plays how SGD writes a matrix and weight decay forgets it; it opens in a browser, offline."""
    with shown_progress(quiet=quiet) as progress:
        path = compressor.explore(output, recipe=recipe, overwrite=overwrite, progress=progress)
    write_text(f"explorer  {path}\n")


@subcommands.command("merge", cls=_Command, epilog=EXIT_STATUSES)
def merge(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="A B [C ...]",
            parser=options.given("MODEL", str),
            help="Two or more networks of one architecture: weight files, or Hugging Face folders.",
            show_default=False,
        ),
    ],
    *,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            parser=options.given("--output"),
            help="File or folder to write.",
            show_default=False,
        ),
    ],
    mode: Annotated[
        Literal["sum", "concat"],
        typer.Option(
            help="sum: add the weights, for weight decay and nearly orthogonal inputs. concat: side by side, safe.",
            show_default=False,
        ),
    ],
    head: Annotated[
        Literal["shared", "separate"],
        typer.Option(help="With concat, whether the outputs are added or put one after the other."),
    ] = "shared",
    base: Annotated[
        str | None,
        typer.Option(
            metavar="ORIGINAL",
            parser=options.given("--base", str),
            help="With sum, the model that all were fine-tuned from: what each changed in it is added.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DATA",
            help="Each network's data, once for each and in their order: measure interference and quality on it.",
            show_default=False,
        ),
    ] = None,
    data_samples: options.DataSamples = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Write nothing if a task loses more: a fraction of accuracy, or an increase in perplexity.",
            show_default=False,
        ),
    ] = None,
    factory: options.Factory = None,
    max_shard_size: options.ShardSize = "5GB",
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Merge networks of one architecture into one, and measure what that costs each of their tasks."""
    with shown_progress(quiet=quiet) as progress:
        from compressor.report import merging_text
        from compressor.results import MergeRefused

        refused = None
        try:
            merged = compressor.merge(
                models,
                output=output,
                mode=mode,
                head=head,
                base=base,
                data=tuple(data or ()),
                data_samples=data_samples,
                max_drop=max_drop,
                factory=factory,
                max_shard_size=max_shard_size,
                device=device,
                overwrite=overwrite,
                progress=progress,
            )
        except MergeRefused as error:
            refused, merged = error, error.merging
    _show(merged.to_dict(), merging_text(merged), json=json, written=merged.output)
    if refused is not None:
        raise refused
