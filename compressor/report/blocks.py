"""The blocks of a page of results: each renders in a terminal, as plain text, and as HTML for a notebook."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from textwrap import wrap
from typing import Protocol, Self

from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

from compressor.evaluation import Remark
from compressor.formatting import one_line
from compressor.network import matches_any
from compressor.report.table_rows import rows_by_kind, rows_of_experts_together
from compressor.report.wording import shortened_apart

NARROWEST_NAME = 8
WORSE = "red"
PATHS = frozenset({"model", "base", "output", "plan"})

# Colors come from the notebook's theme. A table of a deep network scrolls.
STYLE = """<style>
.compressor-result {font-size: 0.9em}
.compressor-result .scroll {max-height: 32em; overflow: auto; margin: 0.6em 0}
.compressor-result table {border-collapse: collapse; margin: 0}
.compressor-result td, .compressor-result th {padding: 0.1em 0.8em 0.1em 0; text-align: right; vertical-align: top}
.compressor-result th {vertical-align: bottom; font-weight: 600}
.compressor-result .numbers thead th {border-bottom: 1px solid currentColor}
.compressor-result td:first-child, .compressor-result th:first-child {text-align: left}
.compressor-result .facts td {text-align: left}
.compressor-result .facts td:first-child, .compressor-result .dim {opacity: 0.65; white-space: nowrap}
.compressor-result p {margin: 0.3em 0}
.compressor-result .verdict {font-weight: 600}
.compressor-result .worse {color: #d1242f}
</style>"""


class Block(Protocol):
    """A part of a page."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]: ...

    def html(self) -> str:
        """The block as HTML."""
        ...

    def reworded(self, change: Callable[[str], str]) -> Self:
        """The block with its sentences changed; names and numbers stay."""
        ...


@dataclass(frozen=True)
class Page:
    """Blocks below each other, with an empty line between them."""

    blocks: tuple[Block, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        for number, block in enumerate(self.blocks):
            if number:
                yield Text()
            yield block

    def text(self) -> str:
        """The page as plain text; sentences are wrapped at 80 columns, and tables are as wide as they need to be."""
        buffer = io.StringIO()
        console = Console(
            file=buffer,
            width=80,
            color_system=None,
            force_terminal=False,
            force_jupyter=False,
            highlight=False,
            emoji=False,
        )
        console.print(self, crop=False)
        return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())

    def html(self) -> str:
        """The page as HTML that needs no other file."""
        blocks = "\n".join(block.html() for block in self.blocks)
        return f'<div class="compressor-result">\n{STYLE}\n{blocks}\n</div>'

    def reworded(self, change: Callable[[str], str]) -> Self:
        return replace(self, blocks=tuple(block.reworded(change) for block in self.blocks))

    def listing(self, layers: Sequence[str], hint: str) -> Page:
        """The page with these layers in its tables, by patterns or `all`; the `hint` says how to have them listed."""
        return replace(
            self,
            blocks=tuple(
                replace(block, listed=tuple(layers), hint=hint)
                if isinstance(block, LayerTable) and block.of_layers
                else block
                for block in self.blocks
            ),
        )


@dataclass(frozen=True)
class VerdictLine:
    """What became of a model in one line; what got worse is red."""

    remarks: tuple[Remark, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        parts = (Text(one_line(each.words), style=WORSE if each.change == "worse" else "") for each in self.remarks)
        line = Text(", ").join(parts)
        line.stylize("bold")
        yield line

    def html(self) -> str:
        parts = (
            f'<span class="worse">{escape(each.words)}</span>' if each.change == "worse" else escape(each.words)
            for each in self.remarks
        )
        return f'<p class="verdict">{", ".join(parts)}</p>'

    def reworded(self, change: Callable[[str], str]) -> Self:
        return self


@dataclass(frozen=True)
class Title:
    """The heading of the blocks that follow."""

    words: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield Text(self.words, style="bold")

    def html(self) -> str:
        return f"<p><b>{escape(self.words)}</b></p>"

    def reworded(self, change: Callable[[str], str]) -> Self:
        return self


@dataclass(frozen=True)
class Lines:
    """Sentences, each on a line of its own."""

    lines: tuple[str, ...]
    dim: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        for line in self.lines:
            yield Text(line, style="dim" if self.dim else "")

    def html(self) -> str:
        words = "<br>".join(map(escape, self.lines))
        return f'<p class="dim">{words}</p>' if self.dim else f"<p>{words}</p>"

    def reworded(self, change: Callable[[str], str]) -> Self:
        return replace(self, lines=tuple(map(change, self.lines)))


@dataclass(frozen=True)
class Facts:
    """Labels with their sentences, wrapped beside them; a path stays whole, to be copied and searched for."""

    facts: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, *facts: tuple[str, str]) -> Facts:
        return cls(facts)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        indent = max((len(label) for label, _ in self.facts), default=0) + 2
        for label, words in self.facts:
            width = len(words) if _is_path(label) else options.max_width - indent
            lines = wrap(one_line(words), max(width, 20), break_on_hyphens=False) or [""]
            for number, line in enumerate(lines):
                text = Text(no_wrap=True, overflow="ignore")
                text.append((label if number == 0 else "").ljust(indent), style="dim")
                yield text.append(line)

    def html(self) -> str:
        rows = (f"<tr><td>{escape(label)}</td><td>{escape(one_line(words))}</td></tr>" for label, words in self.facts)
        return f'<div class="scroll"><table class="facts">{"".join(rows)}</table></div>'

    def reworded(self, change: Callable[[str], str]) -> Self:
        facts = ((label, words if _is_path(label) else change(words)) for label, words in self.facts)
        return replace(self, facts=tuple(facts))


def _is_path(label: str) -> bool:
    """Whether the words beside a label are a path; several models are numbered."""
    return label.rstrip(" 0123456789") in PATHS


@dataclass(frozen=True)
class LayerTable:
    """A row per layer: its name, shortened where a terminal's window is narrow, and its numbers.

    Layers that do the same in many experts of a block are one row, with the range of their numbers. In a terminal or as
    text so are layers of one kind, where there are more than `most` rows. Where layers are `listed`, by patterns or
    `all`, each of these has a row.
    """

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    listed: tuple[str, ...] = ()
    hint: str = ""
    most: int = 40

    @property
    def of_layers(self) -> bool:
        """Whether the rows are layers, and not sizes or checkpoints."""
        return self.headers[0] in ("layer", "module")

    @property
    def shown(self) -> tuple[tuple[str, ...], ...]:
        """The rows as they are shown."""
        if not self.listed:
            return rows_of_experts_together(self.rows)
        return (
            self.rows if "all" in self.listed else tuple(row for row in self.rows if matches_any(self.listed, row[0]))
        )

    @property
    def _short(self) -> LayerTable:
        """The table with a row for each kind of layer, where there are many."""
        rows = self.shown
        if not self.of_layers or self.listed or len(rows) <= self.most:
            return self
        kinds = rows_by_kind(rows, most=self.most)
        first, *others = self.headers
        return replace(self, headers=(first, "layers", *others), rows=kinds, most=len(kinds))

    @property
    def _note(self) -> str:
        """What the rows are of, where they are not all."""
        if self.listed and not self.shown:
            return f"no layer here is called {' or '.join(self.listed)}"
        if not self.of_layers or self.listed or len(self.shown) <= self.most:
            return ""
        return f"{len(self.rows)} layers, a row for each kind" + (f"; {self.hint}" if self.hint else "")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        if (short := self._short) is not self:
            yield from short.__rich_console__(console, options)
            yield Text(self._note, style="dim")
            return
        columns = list(zip(*(header.split("\n") for header in self._padded_headers()), strict=True))
        rows = self.shown
        cells = [*columns, *rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.headers))]
        room = options.max_width - sum(widths[1:]) - 2 * (len(widths) - 1)
        if console.is_terminal:
            widths[0] = min(widths[0], max(room, NARROWEST_NAME))
        names = shortened_apart([name for name, *_ in rows], widths[0])
        for row in columns:
            yield Text(_aligned(row, widths), style="bold", no_wrap=True, overflow="ignore")
        yield Text("  ".join("─" * width for width in widths), style="dim", no_wrap=True, overflow="ignore")
        for name, (_, *numbers) in zip(names, rows, strict=True):
            line = _aligned((name, *numbers), widths)
            yield Text(line, no_wrap=True, overflow="ignore")
        if self._note:
            yield Text(self._note, style="dim")

    def _padded_headers(self) -> Iterator[str]:
        """Headers of the same number of lines, the last ones at the bottom."""
        tallest = max(header.count("\n") for header in self.headers)
        for header in self.headers:
            yield "\n" * (tallest - header.count("\n")) + header

    def html(self) -> str:
        # A header that is split within a word to be narrow ends its first line with a hyphen.
        headers = (header.replace("-\n", "").replace("\n", " ") for header in self.headers)
        return _html_table(tuple(headers), self.shown)

    def reworded(self, change: Callable[[str], str]) -> Self:
        return replace(self, hint=change(self.hint))


@dataclass(frozen=True)
class SideBySide:
    """Quantities before and after; a column without a value is left out, and the last cell of what is worse is red."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    worse: frozenset[int] = frozenset()

    def _known(self) -> tuple[tuple[str, ...], ...]:
        known = [i for i in range(len(self.headers)) if any(row[i] for row in self.rows)]
        return tuple(tuple(row[i] for i in known) for row in (self.headers, *self.rows))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        cells = self._known()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for number, row in enumerate(cells):
            line = Text(_aligned(row, widths), style="" if number else "bold", no_wrap=True, overflow="ignore")
            if number - 1 in self.worse:
                line.stylize(WORSE, len(line) - len(row[-1]))
            yield line

    def html(self) -> str:
        headers, *rows = self._known()
        return _html_table(headers, rows, self.worse)

    def reworded(self, change: Callable[[str], str]) -> Self:
        return self


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    name, *numbers = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
    return "  ".join([name.strip().ljust(widths[0]), *numbers])


def _html_table(headers: Sequence[str], rows: Sequence[Sequence[str]], worse: frozenset[int] = frozenset()) -> str:
    """A table; the last cells of the rows in `worse` are red."""
    head = "".join(f"<th>{escape(header)}</th>" for header in headers)
    body = ""
    for number, (*cells, last) in enumerate(rows):
        before = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        of_class = ' class="worse"' if number in worse else ""
        body += f"<tr>{before}<td{of_class}>{escape(last)}</td></tr>"
    return (
        f'<div class="scroll"><table class="numbers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
