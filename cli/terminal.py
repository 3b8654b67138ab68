"""Standard output and standard error: one place that writes to each."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

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
    """Write what a person reads to standard output: coloured on a terminal, 80 columns wide elsewhere."""
    from rich.console import Console

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 80, highlight=False, emoji=False)
    with console.capture() as capture:
        console.print(content, crop=False)
    # Trailing blanks only wrap in a narrow window.
    write_text("".join(line.rstrip() + "\n" for line in capture.get().splitlines()))


def write_text(text: str) -> None:
    """Write to standard output; a reader that has gone, as `head` does, is no failure."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        silence_broken_output()


def silence_broken_output() -> None:
    """Let standard output lead nowhere once its reader has gone, as in `compress inspect MODEL | head`."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def shown_progress(*, quiet: bool) -> Iterator[Progress | None]:
    """Show logs and progress on standard error while the block runs: bars on a terminal, a line now and then elsewhere.

    With `quiet` there are no progress and no logs below a warning, and what is yielded is None.
    """
    from rich.console import Console

    # The libraries underneath draw bars of their own.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
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
    """Progress as plain lines for a log: stage, steps done, and the time left at the pace of the stage so far."""
    stage_began: dict[str, float] = {}
    written_at, written_done = clock(), 0

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal written_at, written_done
        now = clock()
        if stage not in stage_began:
            stage_began[stage], written_done = now, 0
        waited, a_tenth_more = now - written_at, 10 * (done - written_done) >= total
        if waited < LINE_SECONDS or (not a_tenth_more and waited < SILENCE_SECONDS):
            return
        left = f", about {_duration((now - stage_began[stage]) * (total - done) / done)} left" if done else ""
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
            from compressor.report.wording import one_line

            line = one_line(f"{record.levelname.lower()}: {record.getMessage()}")
            self.console.print(Text(line), soft_wrap=True)


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
