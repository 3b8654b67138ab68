"""Reading bytes from files; a failure is reported in one line."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import Any

from compressor.documents import read_json, reading
from compressor.errors import BadInput
from compressor.io.remote_file import RemoteFile

AnyFile = Path | RemoteFile
"""A file on this machine, or one of the hub that is read by ranges."""


def regular_file_size(path: AnyFile) -> int:
    """Size in bytes of a file; `BadInput` when it is missing, unreadable, or no regular file."""
    if isinstance(path, RemoteFile):
        return path.size
    with reading(path):
        status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise BadInput("is not a regular file", where=path, remedy="give a weight file or a model folder")
    return status.st_size


def read_at(path: AnyFile, offset: int, buffer: memoryview) -> None:
    """Fill `buffer` (bytes, writable) from `offset` of a file with positional reads.

    Not memory-mapped: mapped pages count as resident until the kernel takes them back, and a file that
    shrinks under a map kills the process.

    Raises:
        BadInput: the file ends before the buffer is full.
    """
    if isinstance(path, RemoteFile):
        path.read_at(offset, buffer)
        return
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


def read_bytes_at(path: AnyFile, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` of a file; errors as `read_at`."""
    buffer = bytearray(size)
    read_at(path, offset, memoryview(buffer))
    return bytes(buffer)


def sha256_of_file(path: Path) -> str:
    """The SHA-256 of what is in a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model; `BadInput` when it holds anything else."""
    require_content(path, read_bytes_at(path, 0, min(regular_file_size(path), 256)))
    return read_json(path, remedy="restore the file that came with the model")


def require_content(path: AnyFile, head: bytes) -> None:
    """Refuse what is often in the place of a model file: nothing, a git-LFS pointer, a web page.

    Args:
        path: The file, for the message.
        head: Its first bytes.

    Raises:
        BadInput: naming what the file is and how to get the real one.
    """
    if not head:
        raise BadInput("is empty", where=str(path), remedy="download or export it again")
    if head.startswith(b"version https://git-lfs"):
        raise BadInput("is a git-LFS pointer, not the file itself", where=str(path), remedy="run `git lfs pull`")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:5].lower() in (b"<!doc", b"<html", b"<?xml", b"<head"):
        remedy = "download the file itself (a direct link, logged in where that is needed)"
        raise BadInput("is a web page, not a model file", where=str(path), remedy=remedy)
