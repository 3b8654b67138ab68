"""Folders of a running process: locked while it lives, and removed by the next run if it died.

A workspace holds a file `lock` with an exclusive `flock`, which the kernel releases when the process ends, however it
ends. An output is made in `new/NAME` of a workspace beside it; `old/NAME` is the output that it replaces, if the file
system cannot exchange the two atomically.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_LOCK = "lock"
_TEMPORARY = "compressor-calibration-"
_NAMES = re.compile(rf"\..{{1,40}}\.[0-9a-f]{{12}}\.partial|{_TEMPORARY}[0-9a-f]{{12}}", re.DOTALL)


@dataclass(frozen=True)
class Workspace:
    """A folder that belongs to this process until it is removed."""

    path: Path
    _descriptor: int

    def new(self, name: str) -> Path:
        """The path at which an output of that name is made."""
        return self._place("new", name)

    def old(self, name: str) -> Path:
        """The path to which a replaced output is moved for a moment."""
        return self._place("old", name)

    def _place(self, folder: str, name: str) -> Path:
        (self.path / folder).mkdir(exist_ok=True)
        return self.path / folder / name

    def remove(self) -> None:
        """Remove the folder and its contents, and release the lock."""
        try:
            _settle_and_remove(self.path)
        finally:
            os.close(self._descriptor)


@contextmanager
def workspace_beside(path: Path) -> Iterator[Workspace]:
    """A hidden workspace in the folder of `path`, removed when the block ends.

    Raises:
        OSError: the folder of `path` cannot be written to.
    """
    workspace = _made(path.parent, f".{path.name[:40]}.", ".partial")
    try:
        yield workspace
    finally:
        workspace.remove()


def temporary_workspace(parent: Path) -> Workspace:
    """A workspace for temporary files, to be removed by the caller.

    Raises:
        OSError: `parent` cannot be written to.
    """
    remove_abandoned(parent)
    return _made(parent, _TEMPORARY, "")


def remove_abandoned(folder: Path) -> None:
    """Remove the workspaces in a folder whose process has died, and complete an interrupted replacement.

    If the old output had been moved away and the new one, complete by then, was not yet in its place, it is moved
    there. Workspaces of running processes, of other users, and on file systems without locks are left alone.
    """
    with suppress(OSError), os.scandir(folder) as entries:
        for path in [Path(entry.path) for entry in entries if _may_be_abandoned(entry)]:
            _remove_if_abandoned(path)


def is_workspace(path: Path) -> bool:
    """Whether a path is named as workspaces are."""
    return _NAMES.fullmatch(path.name) is not None


def is_temporary(path: Path) -> bool:
    """Whether a path is named as workspaces for temporary files are."""
    return re.fullmatch(rf"{_TEMPORARY}[0-9a-f]{{12}}", path.name) is not None


def _may_be_abandoned(entry: os.DirEntry[str]) -> bool:
    if _NAMES.fullmatch(entry.name) is None or not entry.is_dir(follow_symlinks=False):
        return False
    return entry.stat(follow_symlinks=False).st_uid == os.geteuid()


def _made(parent: Path, prefix: str, suffix: str) -> Workspace:
    while True:
        path = parent / f"{prefix}{secrets.token_hex(6)}{suffix}"
        path.mkdir(mode=0o700)
        try:
            descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # another run took the empty folder for an abandoned one
        with suppress(OSError):  # a file system without locks: nobody will remove it but this process
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_still(path / _LOCK, descriptor):
            return Workspace(path, descriptor)
        os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_if_abandoned(path: Path) -> None:
    try:
        descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        with suppress(OSError):
            path.rmdir()  # died before there was a lock, or after all else was removed
        return
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_still(path / _LOCK, descriptor):
            _settle_and_remove(path)
    except OSError:
        return
    finally:
        os.close(descriptor)


def _settle_and_remove(workspace: Path) -> None:
    """Remove a workspace, the lock last; an output that was moved away is restored first, and never removed."""
    with suppress(FileNotFoundError):
        if not all(_settle(workspace, old) for old in (workspace / "old").iterdir()):
            return
    for folder in (workspace / "new", workspace / "old"):
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        others = [entry for entry in workspace.iterdir() if entry.name != _LOCK]
        for entry in others:
            entry.unlink()
        (workspace / _LOCK).unlink(missing_ok=True)
        workspace.rmdir()


def _settle(workspace: Path, old: Path) -> bool:
    """Whether there is an output at the path that `old` was moved from: the new one, or else the old one again."""
    place = workspace.parent / old.name
    for candidate in (workspace / "new" / old.name, old):
        if os.path.lexists(place):
            return True
        with suppress(OSError):
            candidate.rename(place)
    return os.path.lexists(place)
