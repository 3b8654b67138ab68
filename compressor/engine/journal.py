"""What a run has done, kept on disk: results that are recorded once they are durable, and not computed again.

A journal is a folder with `journal.jsonl` and a file for each unit of tensors. A unit is written under a temporary
name, flushed to the disk, renamed, and then recorded with its size and SHA-256; each line carries a digest of its own.
So whatever ends a process, what is recorded is whole or is found to be damaged, and then computed again.
"""

from __future__ import annotations

import copy
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.errors import BadInput
from compressor.io import temporary_workspace
from compressor.io.files import sha256_of_file
from compressor.io.tensors import bytes_of
from compressor.io.workspace import is_temporary, remove_abandoned
from compressor.system_errors import explained, temporary_space

Value = TypeVar("Value")

logger = logging.getLogger(__name__)

_LOG, _LOCK, _UNITS, _JOBS = "journal.jsonl", "lock", "units", "jobs"
_FIRST = b'{"sha256": "'
# What a unit is called, and what safetensors calls one that it has not finished writing.
_UNIT = re.compile(r"[0-9a-f]{32}\.(safetensors|partial)|\.tmp\w{6}")


@dataclass(frozen=True)
class Fingerprint:
    """What the results of a run depend on, by what each is called.

    Args:
        contents: Digests of what was read, such as "the model".
        settings: What was asked for and runs it, in words, such as "`keep`": "0.6".
    """

    contents: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)

    def differences(self, recorded: Fingerprint) -> list[str]:
        """What is not as it was recorded, of all that both know, in words."""
        changed = [f"{name} changed" for name, old in recorded.contents.items() if self.contents.get(name, old) != old]
        other = [f"{name} was {old}" for name, old in recorded.settings.items() if self.settings.get(name, old) != old]
        return changed + other

    def joined(self, other: Fingerprint) -> Fingerprint:
        """What both say."""
        return Fingerprint({**self.contents, **other.contents}, {**self.settings, **other.settings})


@dataclass(frozen=True)
class _File:
    """A file of a unit, as it was recorded."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Units:
    """Units of tensors of a journal as they are now, which other processes may read."""

    folder: Path
    prefix: str
    names: frozenset[str]

    def path(self, name: str) -> Path:
        """The file of a unit."""
        return self.folder / _file_name(self.prefix + name)

    @property
    def are_seen(self) -> bool:
        """Whether this process sees all of them: on another machine there may be no such folder, or another one."""
        return all(self.path(name).is_file() for name in self.names)


class Journal:
    """The units of a run by name: tensors in files, and values in the journal itself.

    A new journal is a temporary folder, made when something is first written, which goes with the object: `tensors` and
    `value` then compute what they are asked for and keep nothing. One that is opened by its folder keeps all.

    Example:
        >>> journal = Journal.open(Path("work"), Fingerprint({"the model": digest}), option="work_dir")
        >>> journal.tensors("layers/0", factorize)  # computed once, read by every later run
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._log: _Log | None = None
        self._files: dict[str, _File] = {}
        self._values: dict[str, Any] = {}
        self._unchecked: set[str] = set()
        self._prefix = ""
        self._whole: Journal | None = None
        self._beside: Journal | None = None
        self._others: Units | None = None
        self._close: Callable[[], object] = lambda: None

    @classmethod
    def open(cls, folder: Path, fingerprint: Fingerprint, *, option: str, patience: float = 0.0) -> Self:
        """Open the journal of a folder, or begin one in a folder that is new or empty.

        Another process that uses it is waited for, for `patience` seconds.

        Raises:
            BadInput: the folder holds something else, is used by another process, belongs to a run of another
                fingerprint, or cannot be written; `option` is the one that named it.
        """
        remove_abandoned(Path(tempfile.gettempdir()))
        journal = cls()
        journal._folder = folder
        with _explained(folder, option):
            _require_ours(folder, option)
            (folder / _UNITS).mkdir(parents=True, exist_ok=True)
            descriptor = _locked(folder, option, patience)
            journal._close = weakref.finalize(journal, os.close, descriptor)
            remove_abandoned(folder)
            journal._log = _Log(folder, option)
            journal._read()
        try:
            journal.expect(fingerprint)
        except BadInput:
            journal.close()
            raise
        journal._remove_unrecorded()
        return journal

    @property
    def kept(self) -> bool:
        """Whether the units outlive the process."""
        return self._log is not None

    def __len__(self) -> int:
        return len(self._files) + len(self._values)

    def part(self, name: str) -> Journal:
        """The units whose names begin so, without it; of a temporary journal a folder of its own."""
        if not self.kept:
            return Journal()
        part = copy.copy(self)
        part._prefix, part._whole, part._others = f"{self._prefix}{name}/", self, None
        return part

    def units(self) -> Units:
        """The units of tensors that are whole now, for other processes."""
        known = [name.removeprefix(self._prefix) for name in list(self._files) if name.startswith(self._prefix)]
        return Units(self._place().absolute(), self._prefix, frozenset(filter(self.holds, known)))

    def beside(self, others: Units) -> Journal:
        """The same journal, in which the units of another are read too; of two that have one name this one's."""
        both = copy.copy(self)
        both._whole, both._others = self, others
        return both

    def go_with_object(self) -> None:
        """Remove all of it when nobody holds the journal, or a part of it, any more."""
        assert self._folder is not None
        self._close = weakref.finalize(self, _removed, self._folder, self._close)

    def temporary(self) -> Journal:
        """A temporary journal on the disk of this one."""
        made = Journal()
        made._beside = self if self.kept else None
        return made

    def expect(self, fingerprint: Fingerprint) -> None:
        """Record what the units depend on, too; `BadInput` where it is not as it was recorded."""
        if self._log is None:
            return
        recorded = self._log.fingerprint
        if different := fingerprint.differences(recorded):
            remedy = f"give what it began with, or another `{self._log.option}`; to begin anew remove the folder"
            what = f"belongs to another run: {', '.join(different)}"
            raise BadInput(what, where=self._folder, option=self._log.option, remedy=remedy)
        joined = fingerprint.joined(recorded)
        if joined != recorded:
            self._log.write({"contents": dict(joined.contents), "settings": dict(joined.settings)})
            self._log.fingerprint = joined

    def tensors(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """The tensors of a unit: those that were recorded, on the CPU, or else those that are made now."""
        if not self.kept:
            return make()
        if not self.holds(name):
            self.write(name, make())
        return self.read(name)

    def value(self, name: str, make: Callable[[], Value]) -> Value:
        """What was recorded under a name, or else what is made now: something that JSON can hold."""
        if self._log is None:
            return make()
        full = self._prefix + name
        if full not in self._values:
            made = make()
            self._log.write({"unit": full, "value": made})
            self._values[full] = made
        value: Value = self._values[full]
        return value

    def knows(self, name: str) -> bool:
        """Whether a value was recorded under a name."""
        return self._prefix + name in self._values

    def file(self, name: str, make: Callable[[Path], object]) -> Path:
        """The file of a unit, which `make` writes where there is none: at a path where nothing is."""
        if not self._has(name):
            path = self._path(name)
            partial = path.with_suffix(".partial")
            with self._space():
                try:
                    partial.unlink(missing_ok=True)
                    make(partial)
                    recorded = _File(0, "")
                    if self._log is not None:
                        recorded = _flushed(partial)
                    # Readers of a file that is still mapped keep what they have.
                    partial.replace(path)
                except BaseException:
                    with suppress(OSError):
                        partial.unlink(missing_ok=True)
                    raise
                if self._log is not None:
                    record = {"unit": self._prefix + name, "bytes": recorded.bytes, "sha256": recorded.sha256}
                    self._log.write(record)
            self._files[self._prefix + name] = recorded
        return self._path(name)

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors under a name, in place of those before."""
        on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        self._files.pop(self._prefix + name, None)
        self._unchecked.discard(self._prefix + name)
        self.file(name, lambda path: save_file(on_cpu, path))

    def read(self, name: str) -> dict[str, Tensor]:
        """The tensors of a unit, on the CPU. KeyError where there is none."""
        if not self.holds(name):
            raise KeyError(name)
        path = self._path(name) if self._others is None or self._has(name) else self._others.path(name)
        with self._space():
            tensors: dict[str, Tensor] = load_file(path)
        return tensors

    def holds(self, name: str) -> bool:
        """Whether there is a unit of tensors, or a file, of that name, and it is as it was recorded."""
        return self._has(name) or (self._others is not None and name in self._others.names)

    def _has(self, name: str) -> bool:
        """Whether there is one of this journal's own."""
        full = self._prefix + name
        if full in self._unchecked:
            self._unchecked.discard(full)
            path, recorded = self._path(name), self._files[full]
            whole = path.is_file() and path.stat().st_size == recorded.bytes and sha256_of_file(path) == recorded.sha256
            if not whole:
                logger.warning("%s: %s is damaged, and is computed again", self._folder, full)
                del self._files[full]
        return full in self._files

    def take(self, name: str, other: Journal) -> None:
        """Move a unit here from another journal on the same disk, if it is there."""
        if other._has(name):
            self.file(name, other._path(name).replace)
            other.drop(name)

    def folder(self, name: str) -> Path:
        """A folder beside the units for journals that other processes keep, which goes with this one."""
        place = self._place() if self._log is None or self._folder is None else self._folder / _JOBS
        made = place / _hashed(self._prefix + name)
        with self._space():
            made.mkdir(parents=True, exist_ok=True)
        return made

    def drop(self, name: str) -> None:
        """Remove a unit, or a value, that is not needed any more."""
        full = self._prefix + name
        if full not in self._files and full not in self._values:
            return
        self._unchecked.discard(full)
        self._values.pop(full, None)
        self._files.pop(full, None)
        if self._log is not None:
            self._log.write({"dropped": full})
        with self._space():
            self._path(name).unlink(missing_ok=True)

    def keep_only(self, part: str) -> None:
        """Remove all units and values but those of a part."""
        begin = f"{self._prefix}{part}/"
        for full in [*self._files, *self._values]:
            if full.startswith(self._prefix) and not full.startswith(begin):
                self.drop(full.removeprefix(self._prefix))

    def close(self) -> None:
        """Let other processes use the folder."""
        self._close()

    def remove(self) -> None:
        """Remove all of it: what was to be done is done."""
        if self._log is not None and self._folder is not None:
            for name in (_UNITS, _JOBS):
                shutil.rmtree(self._folder / name, ignore_errors=True)
            for name in (_LOG, _LOCK):
                (self._folder / name).unlink(missing_ok=True)
            with suppress(OSError):
                for path in filter(is_temporary, self._folder.iterdir()):
                    shutil.rmtree(path, ignore_errors=True)
                self._folder.rmdir()
        for known in (self._files, self._values, self._unchecked):
            known.clear()
        self._close()

    def _path(self, name: str) -> Path:
        """Where the file of a unit is: a name may be anything, also too long for a file."""
        return self._place() / _file_name(self._prefix + name)

    def _place(self) -> Path:
        if self._log is not None:
            assert self._folder is not None
            return self._folder / _UNITS
        if self._folder is None:
            beside = None if self._beside is None else self._beside._folder
            with self._space():
                workspace = temporary_workspace(beside or Path(tempfile.gettempdir()))
                self._close = weakref.finalize(self, workspace.remove)
                self._folder = workspace.new(_UNITS)
                self._folder.mkdir()
        return self._folder

    @contextmanager
    def _space(self) -> Iterator[None]:
        if self._beside is not None:
            with self._beside._space():
                yield
        elif self._log is None:
            with temporary_space(Path(tempfile.gettempdir())):
                yield
        else:
            assert self._folder is not None
            with _explained(self._folder, self._log.option):
                yield

    def _read(self) -> None:
        assert self._log is not None
        for record in self._log.records():
            match record:
                case {"unit": str(name), "bytes": int(size), "sha256": str(digest)}:
                    self._files[name] = _File(size, digest)
                case {"unit": str(name), "value": value}:
                    self._values[name] = value
                case {"dropped": str(name)}:
                    self._files.pop(name, None)
                    self._values.pop(name, None)
                case {"contents": dict(contents), "settings": dict(settings)}:
                    self._log.fingerprint = Fingerprint(contents, settings)
        self._unchecked = set(self._files)

    def _remove_unrecorded(self) -> None:
        """Remove what a run left that died while it wrote a unit, or after it had dropped one."""
        known = {self._path(name).name for name in self._files}
        with self._space():
            for path in self._place().iterdir():
                if path.name not in known:
                    path.unlink()


class _Log:
    """The lines of a journal: each a record and its digest, flushed to the disk before anything builds on it."""

    def __init__(self, folder: Path, option: str) -> None:
        self.fingerprint = Fingerprint()
        self.option = option
        self._path = folder / _LOG

    def records(self) -> Iterator[Any]:
        """All records that are whole; what a process left that died while it wrote a line is removed."""
        self._path.touch()
        content = self._path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self._path, whole)
        for line in content[:whole].splitlines():
            with suppress(ValueError, TypeError, KeyError):
                document = json.loads(line)
                if document["sha256"] == _of_text(json.dumps(document["record"])):
                    yield document["record"]

    def write(self, record: Mapping[str, Any]) -> None:
        text = json.dumps(record)
        line = f'{{"sha256": "{_of_text(text)}", "record": {text}}}\n'.encode()
        before = self._path.stat().st_size
        try:
            with self._path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):
                os.truncate(self._path, before)
            raise


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors: their names, shapes, dtypes, and numbers."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(bytes_of(tensor.detach().cpu().contiguous()))
    return digest.hexdigest()


def _file_name(name: str) -> str:
    return f"{_hashed(name)}.safetensors"


def _hashed(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:32]


def _of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _flushed(path: Path) -> _File:
    """Flush a file to the disk, and say what is in it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return _File(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _locked(folder: Path, option: str, patience: float) -> int:
    """A descriptor that holds the lock of a folder, which goes with the process."""
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    until = time.monotonic() + patience
    try:
        while time.monotonic() < until:
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.1)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        remedy = f"wait for it, or give another `{option}`"
        raise BadInput("is used by another run", where=folder, option=option, remedy=remedy) from None
    except OSError:
        pass  # a file system without locks
    return descriptor


def _require_ours(folder: Path, option: str) -> None:
    """Raise `BadInput` where a folder holds something else."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise BadInput(
            "is not a folder", where=folder, option=option, remedy="give a folder, or a path where nothing is"
        )
    if folder.is_dir() and (foreign := min(_foreign(folder), default=None)) is not None:
        what = f"holds {foreign}, which is no work of a run"
        raise BadInput(what, where=folder, option=option, remedy="give a new or an empty folder")


def _foreign(folder: Path) -> Iterator[str]:
    """What lies in a folder that no journal has written, and so must not remove."""
    for path in folder.iterdir():
        if path.is_symlink() or (path.name not in {_LOG, _LOCK, _UNITS, _JOBS} and not is_temporary(path)):
            yield path.name
        elif is_temporary(path):
            continue
        elif path.name == _UNITS:
            names = [each.name for each in path.iterdir()] if path.is_dir() else [""]
            yield from (f"{_UNITS}/{name}" for name in names if not _UNIT.fullmatch(name))
        elif path.name == _JOBS:
            yield from (f"{_JOBS}/{name}" for name in _foreign_to_jobs(path))
        elif not path.is_file() or not _begins_as_ours(path):
            yield path.name


def _foreign_to_jobs(folder: Path) -> Iterator[str]:
    """What lies in the folder of other processes' journals and is none of these."""
    for path in [folder] if not folder.is_dir() else [*folder.iterdir(), *folder.glob("*/*")]:
        if path.is_symlink() or not path.is_dir():
            yield path.name
        elif path.parent != folder:
            yield from _foreign(path)


def _begins_as_ours(path: Path) -> bool:
    """Whether a lock is empty, and a log begins as those of journals do, as far as it goes."""
    first = _FIRST if path.name == _LOG else b""
    with path.open("rb") as file:
        return first.startswith(file.read(len(_FIRST)))


def _removed(folder: Path, close: Callable[[], object]) -> None:
    """Remove the folder of a journal, and then let it go."""
    shutil.rmtree(folder, ignore_errors=True)
    close()


@contextmanager
def _explained(folder: Path, option: str) -> Iterator[None]:
    """Say in a line what the operating system refuses."""
    try:
        yield
    except Exception as error:
        if isinstance(error, BadInput):
            raise
        elsewhere = f"give a folder on another disk as `{option}`"
        bad = explained(error, doing="cannot keep the work", folder=folder, elsewhere=elsewhere, where=folder)
        if bad is None and isinstance(error, OSError) and str(error.filename).startswith(str(folder)):
            bad = BadInput(f"cannot keep the work ({error.strerror})", where=folder, option=option, remedy=elsewhere)
        if bad is None:
            raise
        raise bad from error
