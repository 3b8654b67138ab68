"""Standard output and standard error: one place that writes to each."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

from compressor.api.shell_options import ShownOptions
from compressor.cli.pace import Estimate, Pace
from compressor.errors import CompressorError
from compressor.formatting import format_estimate
from compressor.progress import Progress, Step, expect

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

logger = logging.getLogger("compressor.cli")

# Without a terminal a line of progress needs 10 s since the one before, and a tenth more done or a minute passed.
LINE_SECONDS, SILENCE_SECONDS = 10.0, 60.0


def write_error(text: str) -> None:
    """Write to standard error; ignore a closed pipe."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def document_text(document: Mapping[str, Any]) -> str:
    """One JSON document; NaN and infinities, which JSON lacks, become null."""
    return json.dumps(_finite(document), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def write_rendered(content: RenderableType, stream: TextIO | None = None) -> None:
    """Write a page to standard output, or to another stream: in color on a terminal; elsewhere as plain text.

    In plain text sentences are wrapped at 80 columns, and tables are as wide as they need to be.
    """
    from rich.console import Console

    # Rendered apart, because rich would leave the program where standard output cannot be written.
    rendered = io.StringIO()
    terminal = (stream or sys.stdout).isatty()
    width = None if terminal else 80
    console = Console(file=rendered, force_terminal=terminal or None, width=width, highlight=False, emoji=False)
    console.print(content, crop=False)
    # Trailing blanks only wrap in a narrow window.
    text = "".join(line.rstrip() + "\n" for line in rendered.getvalue().splitlines())
    if stream is None:
        write_text(text)
        return
    with suppress(OSError):
        stream.write(text)
        stream.flush()


def write_text(text: str) -> None:
    """Write to standard output; ignore a closed pipe, as in `compress inspect MODEL | head`.

    Raises `CompressorError` if it cannot be written for another reason, such as a full disk.
    """
    with writing_to_standard_output():
        sys.stdout.write(text)
        sys.stdout.flush()


@contextmanager
def writing_to_standard_output() -> Iterator[None]:
    """Ignore a closed pipe, and turn other failures into `CompressorError`; discard later output."""
    try:
        yield
    except OSError as error:
        # What is still buffered would fail again when the program ends.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise CompressorError(f"standard output cannot be written ({error.strerror})") from error


@contextmanager
def shown_progress(shown: ShownOptions) -> Iterator[Progress | None]:
    """Show logs and progress on standard error while the block runs: a bar on a terminal, some lines elsewhere.

    If it is to be `quiet` there are no progress and no logs below a warning, and what is yielded is None; if `verbose`,
    the logs have what is decided on the way and how long each step took.
    """
    from rich.console import Console

    if shown.quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    console = Console(file=sys.stderr, highlight=False, emoji=False)
    level = logging.WARNING if shown.quiet else logging.DEBUG if shown.verbose else logging.INFO
    with _logs_on(console, level):
        if shown.quiet:
            yield None
        elif console.is_terminal:
            with _bars(console, time.monotonic) as progress:
                yield _Timed(progress, time.monotonic) if shown.verbose else progress
        else:
            if "torch" not in sys.modules:
                write_error("loading the libraries")
            lines = ProgressLines(write_error, time.monotonic)
            yield _Timed(lines, time.monotonic) if shown.verbose else lines


class _Timed:
    """Progress that also tells the log how long each step took."""

    def __init__(self, progress: Progress, clock: Callable[[], float]) -> None:
        self._progress, self._clock = progress, clock
        self._step, self._began = "", clock()

    def expect(self, steps: Sequence[Step]) -> None:
        expect(self._progress, steps)

    def __call__(self, step: str, done: int, total: int) -> None:
        self._progress(step, done, total)
        if step != self._step and done < total:
            self._step, self._began = step, self._clock()
        if done >= total:
            logger.debug("%s: %d of %d, %.1f s", step, done, total, self._clock() - self._began)
            self._began = self._clock()


class _Bars:
    """One bar: of the whole command with the time left in all, or of the present step where no steps were announced."""

    def __init__(self, bars: Any, clock: Callable[[], float]) -> None:
        self._bars, self._pace, self._announced = bars, Pace(clock), False
        # Importing the libraries takes seconds.
        self._task = bars.add_task("starting", total=None, left="")
        self._step = ""

    def expect(self, steps: Sequence[Step]) -> None:
        self._announced = bool(steps)
        self._pace.expect(steps)
        # What went before, such as the search for a seed, is no part of these.
        self._bars.update(self._task, completed=0, left="")
        self._bars.tasks[0].total = None

    def __call__(self, step: str, done: int, total: int) -> None:
        self._pace.note(step, done, total)
        if not self._announced:
            self._bars.update(self._task, description=step, completed=done, total=total, left=f"{done} of {total}")
            if self._step not in ("", step):
                # How much further steps are of the whole is not known, and a bar that begins again would be of none.
                self._bars.tasks[0].total = None
        elif (estimate := self._pace.estimate()) is None:
            self._bars.update(self._task, description=step)
        else:
            left = f"{estimate.share:.0%}, {_left(estimate)}".removesuffix(" in all")
            self._bars.update(self._task, description=step, completed=estimate.share, total=1.0, left=left)
        self._step = step


@contextmanager
def _bars(console: Console, clock: Callable[[], float]) -> Iterator[Progress]:
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description:10}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}"))
    with Bars(*columns, console=console, transient=True) as bars:
        yield _Bars(bars, clock)


class ProgressLines:
    """Progress as plain lines for a log.

    Where steps were announced: the step, how much of the whole is done, and the time left in all. Where not: the step,
    its parts that are done, and the time left of it at its own pace; and when it is done. What takes less than
    `LINE_SECONDS` in all writes nothing.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._write, self._clock, self._pace, self._announced = write, clock, Pace(clock), False
        # The first call of a step may come after its first part and other work, so its pace counts from it.
        self._first_calls: dict[str, tuple[float, int]] = {}
        self._began = self._written_at = clock()
        self._written = 0.0

    def expect(self, steps: Sequence[Step]) -> None:
        self._announced = bool(steps)
        self._pace.expect(steps)

    def __call__(self, step: str, done: int, total: int) -> None:
        self._pace.note(step, done, total)
        if self._announced:
            self._of_the_whole(step, done, total)
        else:
            self._of_a_step(step, done, total)

    def _of_the_whole(self, step: str, done: int, total: int) -> None:
        estimate = self._pace.estimate()
        share = self._written if estimate is None else estimate.share
        if share >= 1.0 or not self._due(share - self._written):
            return
        of_all = "" if estimate is None else f"; {share:.0%} of all done, {_left(estimate)}"
        self._put(f"{step} {done} of {total}{of_all}", share)

    def _of_a_step(self, step: str, done: int, total: int) -> None:
        now = self._clock()
        if step not in self._first_calls:
            self._first_calls[step], self._written = (now, done), 0.0
        if done >= total:
            if now - self._began >= LINE_SECONDS:
                self._put(f"{step}: all {total} done" if total > 1 else f"{step}: done", 1.0)
        elif self._due(done / total - self._written):
            first_at, first_done = self._first_calls[step]
            parts = done - first_done
            left = (now - first_at) * (total - done) / parts if parts > 0 else None
            of_step = "" if left is None else f", about {format_estimate(left)} left of this step"
            self._put(f"{step}: {done} of {total}{of_step}", done / total)

    def _due(self, more: float) -> bool:
        waited = self._clock() - self._written_at
        return waited >= SILENCE_SECONDS or (waited >= LINE_SECONDS and more >= 0.1 - 1e-9)

    def _put(self, line: str, share: float) -> None:
        self._write(line)
        self._written_at, self._written = self._clock(), share


def _left(estimate: Estimate) -> str:
    return f"{'at most about' if estimate.at_most else 'about'} {format_estimate(estimate.seconds)} left in all"


class _ConsoleHandler(logging.Handler):
    """Log records as single lines above the progress bars."""

    def __init__(self, console: Console, level: int) -> None:
        super().__init__(level)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        from rich.text import Text

        with suppress(OSError):
            from compressor.api.flags import with_flags
            from compressor.formatting import one_line

            level = f"{record.levelname.lower()}: " if record.levelno >= logging.INFO else ""
            line = one_line(with_flags(f"{level}{record.getMessage()}"))
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
