"""Bytes in and out of files: a read that fails says so in one line, a write appears whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from compressor.documents import read_json, reading
from compressor.errors import BadInput

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def regular_file_size(path: Path) -> int:
    """Size in bytes of a file; `BadInput` when it is missing, unreadable, or no regular file."""
    with reading(path):
        status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise BadInput("is not a regular file", where=path, remedy="give a weight file or a model folder")
    return status.st_size


def read_at(path: Path, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` (bytes, writable) from `offset` of a file with positional reads.

    Not memory-mapped: mapped pages count as resident until the kernel takes them back, and a file that
    shrinks under a map kills the process.

    Raises:
        BadInput: the file ends before the buffer is full.
    """
    with reading(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            filled = 0
            while filled < len(buffer):
                count = os.preadv(descriptor, [buffer[filled:]], offset + filled)
                if count == 0:
                    what = f"ends at byte {offset + filled}, {len(buffer) - filled} bytes too early"
                    raise BadInput(what, where=path, remedy="download or copy it again")
                filled += count
        finally:
            os.close(descriptor)


def read_bytes_at(path: Path, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` of a file; errors as `read_at`."""
    buffer = bytearray(size)
    read_at(path, offset, memoryview(buffer))
    return bytes(buffer)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model; `BadInput` when it holds anything else."""
    require_content(path, read_bytes_at(path, 0, min(regular_file_size(path), 256)))
    return read_json(path, remedy="restore the file that came with the model")


def require_content(path: Path, head: bytes) -> None:
    """Refuse what is often found in the place of a model file: nothing, a git-LFS pointer, a web page.

    Args:
        path: The file, for the message.
        head: Its first bytes.

    Raises:
        BadInput: naming what the file is and how to get the real one.
    """
    if not head:
        raise BadInput("is empty", where=path, remedy="download or export it again")
    if head.startswith(b"version https://git-lfs"):
        raise BadInput("is a git-LFS pointer, not the file itself", where=path, remedy="run `git lfs pull`")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:5].lower() in (b"<!doc", b"<html", b"<?xml", b"<head"):
        remedy = "download the file itself (a direct link, logged in where that is needed)"
        raise BadInput("is a web page, not a model file", where=path, remedy=remedy)


@contextmanager
def full_disk_is_bad_input(path: Path) -> Iterator[None]:
    """Turn running out of disk space while `path` is written into `BadInput`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        what = f"cannot be written in full ({os.strerror(error.errno)})"
        remedy = "free some space or choose an output on another disk; no part of it was left behind"
        raise BadInput(what, where=path, remedy=remedy) from error


def hidden_sibling(path: Path) -> Path:
    """An unused hidden name in the folder of `path`, so that renaming it to `path` is atomic."""
    return path.with_name(f".{path.name[:40]}.{secrets.token_hex(6)}.partial")


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A new binary file that becomes `path` when the block ends well, and leaves no trace when it does not.

    The file gets the permissions that the umask asks for. An existing `path` is replaced; where it is a
    symbolic link the link is replaced, and the file that it points to is left alone.

    Raises:
        BadInput: the folder is missing or not writable, `path` is a folder, or the disk is full.
    """
    partial = hidden_sibling(path)
    try:
        with full_disk_is_bad_input(path):
            # O_EXCL follows no link that somebody may have put there.
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with os.fdopen(os.open(str(partial), flags, 0o666), "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(str(partial), path)  # noqa: PTH105 - the error below knows the name as a string
            sync_folder(path.parent)
    except OSError as error:
        # Only what befell this file is the output's fault; other errors of the block pass unchanged.
        if error.filename == str(partial):
            what = f"cannot be written ({error.strerror})"
            raise BadInput(what, where=path, remedy="choose an output in a writable folder") from error
        raise
    finally:
        with suppress(OSError):
            partial.unlink()


def sync_folder(folder: Path) -> None:
    """Ask for renames inside `folder` to be durable.

    They are atomic without it, so nothing is said where a folder may be written but not opened, or where a
    network file system does not know the request.
    """
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
