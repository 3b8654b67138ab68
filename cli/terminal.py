"""Standard output and standard error: one place that writes to each."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from compressor.errors import CompressorError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Progress = Callable[[str, int, int], None]

# Without a terminal a line of progress needs 10 s since the one before, and a tenth more done or a minute passed.
LINE_SECONDS, SILENCE_SECONDS = 10.0, 60.0


def write_error(text: str) -> None:
    """Write to standard error; where nobody reads it any more there is nobody to tell."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def document_text(document: Mapping[str, Any]) -> str:
    """One JSON document; NaN and infinities, which JSON has no word for, become null."""
    return json.dumps(_finite(document), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def write_rendered(content: RenderableType) -> None:
    """Write what a person reads to standard output: coloured on a terminal; elsewhere words are wrapped at 80 columns,
    and tables as wide as they are.
    """
    from rich.console import Console

    # Rendered apart, because rich would leave the program where standard output cannot be written.
    rendered = io.StringIO()
    terminal = sys.stdout.isatty()
    width = None if terminal else 80
    console = Console(file=rendered, force_terminal=terminal or None, width=width, highlight=False, emoji=False)
    console.print(content, crop=False)
    # Trailing blanks only wrap in a narrow window.
    write_text("".join(line.rstrip() + "\n" for line in rendered.getvalue().splitlines()))


def write_text(text: str) -> None:
    """Write to standard output; a reader that has gone, as in `compress inspect MODEL | head`, is no failure.

    Raises `CompressorError` where it cannot be written for another reason, such as a full disk.
    """
    with writing_to_standard_output():
        sys.stdout.write(text)
        sys.stdout.flush()


@contextmanager
def writing_to_standard_output() -> Iterator[None]:
    """Silence a reader that has gone, and turn other failures into `CompressorError`; later output leads nowhere."""
    try:
        yield
    except OSError as error:
        # What is still buffered would fail again when the program ends.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise CompressorError(f"standard output cannot be written ({error.strerror})") from error


@contextmanager
def shown_progress(*, quiet: bool) -> Iterator[Progress | None]:
    """Show logs and progress on standard error while the block runs: bars on a terminal, a line now and then elsewhere.

    With `quiet` there are no progress and no logs below a warning, and what is yielded is None.
    """
    from rich.console import Console

    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    console = Console(file=sys.stderr, highlight=False, emoji=False)
    with _logs_on(console, logging.WARNING if quiet else logging.INFO):
        if quiet:
            yield None
        elif console.is_terminal:
            with _bars(console) as progress:
                yield progress
        else:
            yield progress_lines(write_error, time.monotonic)


@contextmanager
def _bars(console: Console) -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description:10}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield progress


def progress_lines(write: Callable[[str], None], clock: Callable[[], float]) -> Progress:
    """Progress as plain lines for a log: stage, steps done, the time left at the stage's pace; and when it is done.

    What takes less than `LINE_SECONDS` in all writes nothing.
    """
    # The first call of a stage may come after its first step, and other work before that, so the pace counts from it.
    first_calls: dict[str, tuple[float, int]] = {}
    began = written_at = clock()
    written_done = 0

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal written_at, written_done
        now = clock()
        if stage not in first_calls:
            first_calls[stage], written_done = (now, done), 0
        waited, a_tenth_more = now - written_at, 10 * (done - written_done) >= total
        if done >= total:
            if now - began < LINE_SECONDS:
                return
            write(f"{stage}: all {total} done" if total > 1 else f"{stage}: done")
        elif waited < LINE_SECONDS or (not a_tenth_more and waited < SILENCE_SECONDS):
            return
        else:
            first_at, first_done = first_calls[stage]
            steps = done - first_done
            left = f", about {_duration((now - first_at) * (total - done) / steps)} left" if steps > 0 else ""
            write(f"{stage}: {done} of {total}{left}")
        written_at, written_done = now, done

    return progress


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class _ConsoleHandler(logging.Handler):
    """Log records as single lines above the progress bars."""

    def __init__(self, console: Console, level: int) -> None:
        super().__init__(level)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        from rich.text import Text

        with suppress(OSError):
            from compressor.cli.messages import with_flags
            from compressor.report.wording import one_line

            line = one_line(with_flags(f"{record.levelname.lower()}: {record.getMessage()}"))
            if self.console.is_terminal:
                self.console.print(Text(line), soft_wrap=True)
            else:
                # Where nobody reads it any more rich would leave the program.
                write_error(line)


@contextmanager
def _logs_on(console: Console, level: int) -> Iterator[None]:
    logger, handler = logging.getLogger("compressor"), _ConsoleHandler(console, level)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
