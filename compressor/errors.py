"""The three ways in which a request can end badly, each with its exit status."""

from __future__ import annotations

from functools import partial
from pathlib import Path


class CompressorError(Exception):
    """Something failed that neither the request nor its inputs are to blame for; the base class of the errors below.

    Attributes:
        exit_status: The exit status of the command line.
    """

    exit_status = 1


class BadInput(CompressorError):  # noqa: N818 - it names the input's state, as FileExistsError does not
    """The request or one of its inputs is bad: one line says what, where, and what to do about it.

    Messages name options as Python does, in backticks: `keep` or `keep=0.8`. The command line shows its flags instead.

    Attributes:
        what: What is wrong.
        where: The file that it is about, or None.
        option: The option that it is about, or None.
        remedy: What to do.
        exit_status: 2.
    """

    exit_status = 2

    def __init__(self, what: str, *, where: str | Path | None = None, option: str | None = None, remedy: str) -> None:
        self.what, self.where, self.option, self.remedy = what, where, option, remedy
        line = f"{what}; {remedy}" if where is None else f"{where}: {what}; {remedy}"
        super().__init__(" ".join(line.split()))

    def in_file(self, path: str | Path) -> BadInput:
        """The same error about a file, unless it is about another already."""
        return BadInput(self.what, where=self.where or path, option=self.option, remedy=self.remedy)

    def __reduce__(self) -> tuple[object, ...]:
        # Worker processes hand exceptions back by pickling them, which knows only positional arguments.
        return partial(BadInput, self.what, where=self.where, option=self.option, remedy=self.remedy), ()


class QualityGateNotMet(CompressorError):  # noqa: N818 - the gate's name, not the error's
    """The best result is worse than what was asked for; nothing was written.

    Attributes:
        exit_status: 3.
    """

    exit_status = 3


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
