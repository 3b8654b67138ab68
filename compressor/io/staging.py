"""The two ways in which anything is written, a file and a folder: complete at its path, or not there at all.

The new output is made in a workspace beside its path and moved there in one step. What it replaces stays at the path
until then.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from compressor.errors import BadInput
from compressor.io.companions import PLAN_FILE
from compressor.io.output import files_below, located, noted_files, require_replaceable
from compressor.io.workspace import Workspace, is_workspace, remove_abandoned, workspace_beside
from compressor.io.writer import write_json
from compressor.system_errors import error_number, explained

_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_AT_FDCWD = -100
# The number of the system call, for C libraries that have no function for it.
_RENAMEAT2 = {"x86_64": 316, "aarch64": 276, "riscv64": 276}
# The errors of Linux for a file system, or a kernel, that does not know the flags.
_UNKNOWN_FLAGS = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


@contextmanager
def staged_file(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a path to write to; the file becomes `path` if the block succeeds, and leaves no trace if it fails.

    A symbolic link at `path` is replaced, and its target is left alone.

    Raises:
        BadInput: the folder is not writable or full, `path` is a folder, or it exists without `overwrite`.
    """
    path = located(path)
    with _staged(path) as workspace:
        new = workspace.new(path.name)
        yield new
        _sync(new)
        if overwrite:
            new.replace(path)
        elif not _create_file(new, path):
            raise _made_by_somebody_else(path)


@contextmanager
def staged_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new folder that becomes `path` when the block ends well, and leaves no trace when it does not.

    An existing folder is replaced only after the new one is complete, and only by `require_replaceable`. Where the new
    one has a `compression.json`, the names of all its files are noted in it.

    Raises:
        BadInput: the place is not writable or full, or something exists that may not be replaced.
    """
    path = located(path)
    with _staged(path) as workspace:
        new = workspace.new(path.name)
        new.mkdir()
        yield new
        _note_files(new)
        _sync(new)
        if not _create_folder(new, path):
            if not overwrite:
                raise _made_by_somebody_else(path)
            require_replaceable(path, "folder", files_below(new))
            _replace_folder(new, path, workspace)


@contextmanager
def _staged(path: Path) -> Iterator[Workspace]:
    """A workspace for an output at `path`; failures of the operating system are attributed to the output."""
    remove_abandoned(path.parent)
    try:
        with workspace_beside(path) as workspace:
            yield workspace
        _sync_folder(path.parent)
    except Exception as error:
        if isinstance(error, BadInput) or not _concerns(error, path):
            raise
        elsewhere = "choose an output elsewhere; nothing was left behind"
        doing = "cannot be written"
        bad = explained(error, doing=doing, folder=path.parent, elsewhere=elsewhere, where=path)
        if bad is None:
            reason = error.strerror if isinstance(error, OSError) else error
            bad = BadInput(f"{doing} ({reason})", where=path, remedy="choose an output in a writable folder")
        raise bad from error


def _concerns(error: Exception, path: Path) -> bool:
    """Whether a failure is one of writing the output: its file is in the workspace, or it has no file's name."""
    if error_number(error) is None:
        return False
    name = getattr(error, "filename", None)
    if not isinstance(name, str | bytes):
        return True
    named = Path(os.fsdecode(name))
    return named == path or any(is_workspace(part) and part.parent == path.parent for part in (named, *named.parents))


def _made_by_somebody_else(path: Path) -> BadInput:
    what = "was created by another process in the meantime"
    return BadInput(what, where=path, remedy="choose another output, or replace it with `overwrite`")


def _create_file(new: Path, path: Path) -> bool:
    """Move a file to its path; False if something exists there."""
    if (done := _created(new, path)) is not None:
        return done
    try:
        os.link(new, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, *_UNKNOWN_FLAGS):
            raise
        # A file system without links either, such as FAT.
        if os.path.lexists(path):
            return False
        new.rename(path)
    return True


def _create_folder(new: Path, path: Path) -> bool:
    """Move a folder to its path; False if something exists there."""
    if (done := _created(new, path)) is not None:
        return done
    # A folder that has come in the meantime is not replaced by a rename either, unless it is empty.
    if os.path.lexists(path):
        return False
    new.rename(path)
    return True


def _created(new: Path, path: Path) -> bool | None:
    """Move to a path that must not exist: whether it did not, or None if the file system cannot tell."""
    try:
        return True if _renameat2(new, path, _RENAME_NOREPLACE) else None
    except FileExistsError:
        return False


def _replace_folder(new: Path, path: Path, workspace: Workspace) -> None:
    if _renameat2(new, path, _RENAME_EXCHANGE):
        return  # what was replaced is in the workspace now
    old = workspace.old(path.name)
    try:
        path.rename(old)
        new.rename(path)
    except BaseException:
        if os.path.lexists(old) and not os.path.lexists(path):
            old.rename(path)
        raise


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Rename with the flags of Linux; False if the platform or the file system does not support them."""
    function = _system_call()
    if function is None:
        return False
    sys.audit("os.rename", str(source), str(target), -1, -1)  # as `os.rename` does
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNKNOWN_FLAGS:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


@functools.cache
def _system_call() -> Callable[..., int] | None:
    if platform.system() != "Linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    types = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    with suppress(AttributeError):
        libc.renameat2.argtypes = types
        function: Callable[..., int] = libc.renameat2
        return function
    number = _RENAMEAT2.get(platform.machine())
    if number is None:
        return None
    libc.syscall.argtypes = (ctypes.c_long, *types)
    return functools.partial(libc.syscall, number)


def _note_files(folder: Path) -> None:
    """Write into `compression.json`, where there is one, which files came with it: these may be replaced again."""
    manifest = folder / PLAN_FILE
    if not manifest.is_file():
        return
    write_json(manifest, _with_files(manifest, files_below(folder)))


def note_file(path: Path) -> None:
    """Note a file that was written into a folder of ours in its `compression.json`, so that it is replaced with it."""
    path = located(path)
    manifest, ours = path.parent / PLAN_FILE, noted_files(path.parent)
    if not ours or Path(path.name) in ours:
        return
    with staged_file(manifest, overwrite=True) as staged:
        write_json(staged, _with_files(manifest, ours | {Path(path.name)}))


def _with_files(manifest: Path, files: Set[Path]) -> dict[str, Any]:
    """The document in a `compression.json`, with these files noted in it."""
    document: dict[str, Any] = json.loads(manifest.read_bytes())
    return document | {"files": sorted(map(str, files))}


def _sync(path: Path) -> None:
    """Flush the contents of a file, or of all files of a folder, to the disk before they get their names."""
    if not path.is_dir():
        _sync_contents(path)
        return
    for entry in sorted(path.rglob("*")):
        if entry.is_file() and not entry.is_symlink():
            _sync_contents(entry)
        elif entry.is_dir():
            _sync_folder(entry)
    _sync_folder(path)


def _sync_contents(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Ask for renames inside a folder to be durable; some network file systems do not know the request."""
    with suppress(OSError):
        _sync_contents(folder)
