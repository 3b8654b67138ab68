"""The options that only a shell has: what a command prints, and how; each once, as those of the verbs are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from compressor.api.kinds import PATH, PATTERNS, SWITCH, choice
from compressor.api.option import Options, option, options
from compressor.api.options import (
    GENERAL,
    OUTPUT,
    ArchiveOptions,
    CompressOptions,
    DiagnoseOptions,
    EvaluateOptions,
    ExploreOptions,
    ExportOptions,
    InspectOptions,
    MergeOptions,
    OverwriteOptions,
    PlanOptions,
    RestoreOptions,
)
from compressor.choices import Shell
from compressor.errors import BadInput

SHELL = choice(Shell)


@options
class ConfigOptions(Options):
    """Where the options of a verb may come from."""

    config: Path | None = option(
        "Options in YAML or JSON, by their names in Python; flags take precedence.", PATH, metavar="FILE", panel=GENERAL
    )


@options
class MainOptions(Options):
    """What `compress` does instead of a command."""

    version: bool = option("Print the version.", SWITCH, False, short="-V", panel=GENERAL)
    install_completion: str | None = option(
        "Complete commands, options, and fixed choices from now on in the shell at hand, or in bash, zsh, fish, or "
        "powershell.",
        SHELL,
        metavar="[SHELL]",
        panel=GENERAL,
    )
    show_completion: str | None = option(
        "Print the script that does so, to copy it.", SHELL, metavar="[SHELL]", panel=GENERAL
    )


@options
class ShownOptions(Options):
    """What a command tells on the way."""

    quiet: bool = option("No progress; only warnings and the result.", SWITCH, False, short="-q", panel=OUTPUT)
    verbose: bool = option(
        "Also what is decided on the way, how long each step took, and where an unexpected error comes from.",
        SWITCH,
        False,
        short="-v",
        panel=OUTPUT,
    )

    def check(self) -> None:
        if self.quiet and self.verbose:
            what = "`quiet` and `verbose` contradict each other"
            raise BadInput(what, option="quiet", remedy="leave one of them out")


@options
class ResultOptions(ShownOptions):
    """How a result is printed."""

    json: bool = option("Print one JSON document and nothing else.", SWITCH, False, panel=OUTPUT)


@options
class TableOptions(ResultOptions):
    """How a result with a table of layers is printed."""

    layers: tuple[str, ...] = option(
        "List these layers: globs, or re:EXPRESSION; all: every one. Without it a table of more than 40 has a row for "
        "each kind.",
        PATTERNS,
        (),
        metavar="PATTERN|all",
        panel=OUTPUT,
    )


@options
class ReportOptions(TableOptions):
    """What `compress MODEL` prints and writes beside the model."""

    report: Path | None = option("Write a one-file report with figures.", PATH, metavar="FILE.html", panel=OUTPUT)


@options
class PlanFileOptions(TableOptions, OverwriteOptions):
    """What `compress plan` prints and writes."""

    output: Path | None = option(
        "Write the plan, to edit and apply.", PATH, short="-o", metavar="FILE.json", panel=OUTPUT
    )


@options
class FigureOptions(TableOptions, OverwriteOptions):
    """What `compress diagnose` prints and writes."""

    output: Path | None = option(
        "Draw how ranks evolved over `series`, as .svg or .png.", PATH, short="-o", metavar="FILE.svg", panel=OUTPUT
    )


# What each verb's command takes beside the options of the verb.
OF_COMMANDS: Mapping[type[Options], type[ShownOptions]] = {
    CompressOptions: ReportOptions,
    InspectOptions: TableOptions,
    PlanOptions: PlanFileOptions,
    EvaluateOptions: ResultOptions,
    RestoreOptions: ResultOptions,
    ExportOptions: ResultOptions,
    DiagnoseOptions: FigureOptions,
    MergeOptions: TableOptions,
    ArchiveOptions: ResultOptions,
    ExploreOptions: ShownOptions,
}
