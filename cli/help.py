"""The help of the commands: what is needed most comes first, and it is readable in a narrow window."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

from compressor.api.option import Options
from compressor.api.options import GENERAL, PANELS
from compressor.cli.routes import MAIN

WIDEST, TERMS, NARROW = 100, 26, 56
STATUSES = (
    ("0", "done"),
    ("1", "failed"),
    ("2", "the request or an input is bad"),
    ("3", "a quality gate was not met"),
    ("130", "interrupted"),
)


@dataclass(frozen=True)
class Section:
    """Terms, such as flags, with what they mean beside them; from the column `at` on where that is given."""

    title: str
    rows: tuple[tuple[str, str], ...]
    at: int | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        width = min(options.max_width, WIDEST)
        at = self.at or max(len(term) for term, _ in self.rows) + 4
        if width < NARROW:
            at = 6
        yield Text(self.title, style="bold")
        for term, words in self.rows:
            first = Text(f"  {term}", style="cyan", no_wrap=True, overflow="ignore")
            lines = wrap(words, max(width - at, 20), break_on_hyphens=False)
            if len(term) + 4 <= at and lines:
                first.append(" " * (at - len(first)) + lines.pop(0), style="default")
            yield first
            for line in lines:
                yield Text(" " * at + line, no_wrap=True, overflow="ignore")


@dataclass(frozen=True)
class Examples:
    """Commands, each below what it does."""

    of: type[Options]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield Text("Examples" if len(self.of.examples) > 1 else "Example", style="bold")
        for example in self.of.examples:
            yield Text(f"  {MAIN} {example.command}", style="cyan", no_wrap=True, overflow="ignore")
            yield from (Text(f"      {line}") for line in wrap(example.does, min(options.max_width, WIDEST) - 6))


@dataclass(frozen=True)
class Sentences:
    """Paragraphs, not wider than they are well read."""

    words: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        for line in self.words.splitlines():
            yield from (Text(each) for each in wrap(line, min(options.max_width, WIDEST)) or [""])


@dataclass(frozen=True)
class Help:
    """The parts of a help, with an empty line between them."""

    parts: tuple[Section | Examples | Sentences, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        for number, part in enumerate(self.parts):
            if number:
                yield Text()
            yield part


def command_help(of: type[Options], parameters: Sequence[Any], *, about: str, commands: Sequence[Any]) -> Help:
    """All of a command's help: usage, the commands beside it, the main options, examples, and the others in groups."""
    groups = _groups(of, parameters)
    main = groups.pop("Main options")
    return Help(
        (
            _usage(of, parameters),
            Sentences(about),
            *_beside(commands),
            *([Section("Main options", main, TERMS)] if main else ()),
            Examples(of),
            *(Section(title, rows, TERMS) for title, rows in groups.items() if rows),
            Section("Exit status", STATUSES),
        )
    )


def short_help(of: type[Options], parameters: Sequence[Any], commands: Sequence[Any]) -> Help:
    """The commands, the first sentences on the main options, and examples."""
    main = tuple((term, first_sentence(words)) for term, words in _groups(of, parameters)["Main options"])
    more = f"All options: {MAIN} --help. Those of a command: {MAIN} COMMAND --help."
    return Help(
        (
            _usage(of, parameters),
            *_beside(commands),
            Section("Main options", main, TERMS),
            Examples(of),
            Sentences(more),
        )
    )


def first_sentence(words: str) -> str:
    """The first sentence of some."""
    return words.partition(". ")[0].removesuffix(".") + "."


def _usage(of: type[Options], parameters: Sequence[Any]) -> Sentences:
    arguments = [each.metavar for each in parameters if _is_argument(each)]
    name = [] if of.verb == MAIN else [of.verb]
    words = " ".join(["Usage:", MAIN, *name, *arguments, "[OPTIONS]"])
    return Sentences(f"{words}\n       {MAIN} COMMAND ..." if of.verb == MAIN else words)


def _beside(commands: Sequence[Any]) -> Iterator[Section | Sentences]:
    if commands:
        yield Section(
            "Commands, each with a --help of its own", tuple((each.name, _summary(each)) for each in commands)
        )
        yield Sentences(f"For a model named like a command, write a path: ./{commands[0].name}.")


def _summary(command: Any) -> str:
    return str(command.help).partition("\n\n")[0].replace("\n", " ")


def _groups(of: type[Options], parameters: Sequence[Any]) -> dict[str, tuple[tuple[str, str], ...]]:
    """The rows of each group of options, and those of arguments among the main ones."""
    rows: dict[str, list[tuple[str, str]]] = {title: [] for title in ("Main options", *PANELS)}
    main = {name: rank for rank, name in enumerate(of.main)}
    for each in sorted(parameters, key=lambda each: -1 if _is_argument(each) else main.get(each.name, len(main))):
        argument = _is_argument(each)
        own = argument or each.name in main or (each.rich_help_panel is None and each.name != "help")
        rows["Main options" if own else each.rich_help_panel or GENERAL].append((_term(each), _words(each)))
    return {title: tuple(found) for title, found in rows.items()}


def _is_argument(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "argument")


def _term(parameter: Any) -> str:
    """What is written: the flags, the short one first, and what follows them."""
    if _is_argument(parameter):
        return str(parameter.metavar)
    flags = ", ".join(sorted(_flags(parameter), key=len))
    return f"{flags} {parameter.metavar or ''}".rstrip()


def _flags(parameter: Any) -> Iterable[str]:
    return (*parameter.opts, *parameter.secondary_opts)


def _words(parameter: Any) -> str:
    """The help, and the default where that says something."""
    shown = getattr(parameter, "show_default", False)
    default = shown if isinstance(shown, str) else str(parameter.default) if shown else None
    return str(parameter.help) + ("" if default is None else f" (Default: {default}.)")
