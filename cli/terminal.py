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

# The least time that an estimate of the whole is made from.
SHORTEST_MEASUREMENT = 2.0


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
            if "torch" not in sys.modules:
                write_error("loading the libraries")
            yield ProgressLines(write_error, time.monotonic)


class _Bars:
    """Progress as one bar for each stage, and beside it the time left in all where it is known."""

    def __init__(self, bars: Any) -> None:
        self._bars, self._pace = bars, Pace(time.monotonic)
        # Importing the libraries takes seconds.
        self._starting = bars.add_task("starting", total=None, left="")
        self._tasks: dict[str, Any] = {}

    def expect(self, costs: Mapping[str, float]) -> None:
        self._pace.expect(costs)

    def __call__(self, stage: str, done: int, total: int) -> None:
        self._pace.note(stage, done, total)
        self._bars.update(self._starting, visible=False)
        left = self._pace.left()
        words = "" if left is None else f"about {_duration(left)} left in all"
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total, left="")
        for task in self._tasks.values():
            self._bars.update(task, left="")
        self._bars.update(self._tasks[stage], completed=done, total=total, left=words)


@contextmanager
def _bars(console: Console) -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description:10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, TextColumn("{task.fields[left]}"), console=console, transient=True) as bars:
        yield _Bars(bars)


class Pace:
    """The time left of a whole command, from what its stages were said to cost and the time that was taken so far.

    Nothing is said before a twentieth is done and two seconds have passed: a shorter measurement is none.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._started: float | None = None
        self._costs: dict[str, float] = {}
        self._done: dict[str, float] = {}

    def expect(self, costs: Mapping[str, float]) -> None:
        """Take what all stages will cost, in their order and in one unit."""
        self._started, self._costs, self._done = self._clock(), dict(costs), {}

    def note(self, stage: str, done: int, total: int) -> None:
        """Take how far a stage is; those before it are over."""
        if stage in self._costs:
            before = list(self._costs)[: list(self._costs).index(stage)]
            self._done |= dict.fromkeys(before, 1.0) | {stage: done / max(total, 1)}

    def left(self) -> float | None:
        """The seconds left; None while they are not known."""
        whole = sum(self._costs.values())
        done = sum(cost * self._done.get(stage, 0.0) for stage, cost in self._costs.items())
        if self._started is None or done < whole / 20:
            return None
        taken = self._clock() - self._started
        return taken * (whole - done) / done if taken >= SHORTEST_MEASUREMENT else None


class ProgressLines:
    """Progress as plain lines for a log: stage, steps done, the time left; and when a stage is done.

    The time left is that of the whole command where its stages have said what they cost, else of the stage at its own
    pace. What takes less than `LINE_SECONDS` in all writes nothing.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._write, self._clock, self._pace = write, clock, Pace(clock)
        # The first call of a stage may come after its first step and other work, so its pace counts from it.
        self._first_calls: dict[str, tuple[float, int]] = {}
        self._began = self._written_at = clock()
        self._written_done = 0

    def expect(self, costs: Mapping[str, float]) -> None:
        self._pace.expect(costs)

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = self._clock()
        self._pace.note(stage, done, total)
        if stage not in self._first_calls:
            self._first_calls[stage], self._written_done = (now, done), 0
        waited, a_tenth_more = now - self._written_at, 10 * (done - self._written_done) >= total
        if done >= total:
            if now - self._began < LINE_SECONDS:
                return
            self._write(f"{stage}: all {total} done" if total > 1 else f"{stage}: done")
        elif waited < LINE_SECONDS or (not a_tenth_more and waited < SILENCE_SECONDS):
            return
        else:
            self._write(f"{stage}: {done} of {total}{self._left(stage, now, done, total)}")
        self._written_at, self._written_done = now, done

    def _left(self, stage: str, now: float, done: int, total: int) -> str:
        if (left := self._pace.left()) is not None:
            return f", about {_duration(left)} left in all"
        first_at, first_done = self._first_calls[stage]
        steps = done - first_done
        return f", about {_duration((now - first_at) * (total - done) / steps)} left of this step" if steps > 0 else ""


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
