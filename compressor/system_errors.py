"""Failures of the operating system in one line: what is full, closed, or used up, and what to do."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compressor.errors import BadInput

# safetensors and torch give the number in the text of an error of their own: "(os error 28)", "No space ... (28)".
_NUMBER_IN_TEXT = re.compile(r"([A-Z][\w ]+) \((?:os error )?(\d{1,4})\)")
_OUT_OF_MEMORY = re.compile(
    r"out of memory|(can't|cannot|could not) allocate|not enough memory|bad_?alloc", re.IGNORECASE
)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)


def explained(
    error: BaseException, *, doing: str, folder: Path | None, elsewhere: str, where: str | Path | None = None
) -> BadInput | None:
    """What a failure of the operating system means for the user; None for any other error.

    Args:
        error: What was raised: `OSError`, `MemoryError`, or what torch and safetensors make of these.
        doing: What failed, such as "cannot be written".
        folder: The folder that was written to, if it is known.
        elsewhere: What else the user can do about a folder that cannot take it.
        where: The file that the message is about.
    """
    number = error_number(error)
    if number == errno.ENOMEM or is_out_of_memory(error):
        remedy = "give it more memory, or less to do at a time: fewer calibration examples, smaller data"
        return BadInput("memory is used up", where=where, remedy=remedy)
    if number is None:
        return None
    place = "the disk" if folder is None else str(folder)
    reason = os.strerror(number)
    if number in _FULL:
        what, remedy = f"{place} is full ({reason})", f"free some space there, or {elsewhere}"
    elif number == errno.EFBIG:
        what, remedy = f"a file is too large for {place} ({reason})", f"raise 'ulimit -f', or {elsewhere}"
    elif number in (errno.EMFILE, errno.ENFILE):
        what, remedy = f"too many files are open ({reason})", "allow more of them, for example with 'ulimit -n 4096'"
    elif number in _CLOSED:
        what, remedy = f"{place} may not be written to ({reason})", elsewhere
    elif number == errno.EIO:
        what, remedy = f"the disk of {place} fails ({reason})", f"check the disk, or {elsewhere}"
    else:
        return None
    return BadInput(f"{doing}: {what}", where=where, remedy=remedy)


def explained_anywhere(error: BaseException) -> BadInput | None:
    """`explained` for an unexpected error, with the folder of the file that it names."""
    name = getattr(error, "filename", None)
    if isinstance(error, FileNotFoundError) and name is None and not _has_working_directory():
        return BadInput("the working directory no longer exists", remedy="change into another folder")
    folder = Path(os.fsdecode(name)).parent if isinstance(name, str | bytes) else None
    elsewhere = f"choose an output on another disk, or set TMPDIR (now {tempfile.gettempdir()})"
    return explained(error, doing="stopped", folder=folder, elsewhere=elsewhere)


@contextmanager
def temporary_space(folder: Path) -> Iterator[None]:
    """Explain what the operating system refuses while temporary files are written to or read from `folder`."""
    try:
        yield
    except Exception as error:
        bad = explained(
            error,
            doing="temporary files cannot be kept",
            folder=folder,
            elsewhere="set TMPDIR to a folder on another disk",
        )
        if bad is None:
            raise
        raise bad from error


def error_number(error: BaseException) -> int | None:
    """The `errno` of an error, if it has one."""
    if isinstance(error, OSError):
        return error.errno
    for found in _NUMBER_IN_TEXT.finditer(str(error)):
        if found[1].endswith(os.strerror(int(found[2]))):
            return int(found[2])
    return None


def _has_working_directory() -> bool:
    try:
        return bool(Path.cwd())
    except FileNotFoundError:
        return False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, of a device or of the machine."""
    # torch has an error of its own for a GPU, and a RuntimeError for the rest.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None
