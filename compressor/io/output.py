"""Where outputs go, and whether they may be written there: found out before the work starts."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from compressor.errors import BadInput
from compressor.io.checkpoint import ADAPTER_CONFIG, WEIGHT_SUFFIXES, Checkpoint
from compressor.io.companions import CODE_FILE, OPTIONS_FILE, PLAN_FILE, companions
from compressor.io.hub import check_push, hub_model, push_folder
from compressor.io.workspace import remove_abandoned
from compressor.system_errors import explained

# What a model folder is written as, beside the companions of its weights.
_WRITTEN = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|adapter_model\.safetensors"
    rf"|config\.json|README\.md|{re.escape(CODE_FILE)}|{re.escape(PLAN_FILE)}|{re.escape(OPTIONS_FILE)}|{re.escape(ADAPTER_CONFIG)}"
)


Container = Literal["file", "folder"]

WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".bin", ".th", ".ckpt")
"""What the name of a file of dense weights may end with: all but the first are written as torch does."""


@dataclass(frozen=True)
class Naming:
    """What an output is: a file or a folder, what its name ends with, and what is added to the input's for it."""

    form: Container
    suffix: str
    endings: tuple[str, ...] = (".safetensors",)
    """Those that the name of a file may have; the first where no name is given."""

    def place(self, source: Checkpoint, output: str | Path | None) -> Path:
        """Where the output goes: as asked, or beside the input under its name and the suffix.

        What was fetched from the hub has its place in the working directory. `BadInput` where there is no name.
        """
        if output is not None:
            if self.form == "file" and Path(output).suffix not in self.endings:
                kinds = {".onnx": "an ONNX model is one file", ".gguf": "a GGUF model is one file"}
                what = kinds.get(self.endings[0], "a file is written as safetensors")
                raise BadInput(what, where=output, remedy=f"name it with {' or '.join(self.endings)}")
            return Path(output)
        if source.source is None:
            raise BadInput("a module has no place beside it", option="output", remedy="name one with `output`")
        end = self.suffix + (self.endings[0] if self.form == "file" else "")
        if hub_model(source.source) is not None:
            return Path(source.name.rpartition("/")[2] + end)
        if source.folder is not None:
            beside = Path(os.path.abspath(source.source))  # noqa: PTH100 - a link is not followed, so it is beside it
            return beside.with_name(beside.name + end)
        return source.source.with_name(Path(source.source.name.removesuffix(".index.json")).stem + end)


@dataclass(frozen=True)
class Target:
    """Where a model is written.

    Args:
        path: The file or folder.
        form: What is written there.
        sources: What is read, and must stay untouched.
        overwrite: Whether something that exists there may be replaced.
        push_to: The repository of the hub that the folder is sent to.
    """

    path: Path
    form: Container
    sources: tuple[Checkpoint, ...]
    overwrite: bool = False
    push_to: str | None = None

    @property
    def name(self) -> str:
        """What the output is loaded by."""
        return self.push_to or self.path.name

    def pushed_to(self, repository: str | None) -> Target:
        """The target whose folder is sent to a repository of the hub too.

        Raises:
            BadInput: no folder will be written, or it cannot be sent there without a loss.
        """
        if repository is None:
            return self
        if self.form != "folder":
            raise _no_folder_to_push()
        folder = self.sources[0].folder
        check_push(repository, None if folder is None else hub_model(folder), overwrite=self.overwrite)
        return replace(self, push_to=repository)

    def check(self, needed_bytes: int = 0) -> None:
        """Raise `BadInput` where the output could not be written, by `check_output`."""
        check_output(
            self.path, sources=self.sources, form=self.form, overwrite=self.overwrite, needed_bytes=needed_bytes
        )

    def push(self) -> str | None:
        """Send the finished folder to the hub, where that was asked for; the address of the commit."""
        if self.push_to is None:
            return None
        return push_folder(self.path, self.push_to, overwrite=self.overwrite)


def require_no_output(output: str | Path | None, push_to: str | None) -> None:
    """Raise `BadInput` where an output is asked for of a module, which stays in memory."""
    if output is not None:
        what, remedy = "a module is compressed in memory", "leave out `output`, and save Compression.model"
        raise BadInput(what, option="output", remedy=remedy)
    if push_to is not None:
        raise _no_folder_to_push()


def _no_folder_to_push() -> BadInput:
    what, remedy = "`push_to` sends a model folder, and none is written", "compress a folder, or leave it out"
    return BadInput(what, option="push_to", remedy=remedy)


def form_of(checkpoint: Checkpoint) -> Container:
    """What is written for a checkpoint: a folder for a folder, else a file."""
    return "folder" if checkpoint.folder is not None else "file"


def checked_target(
    source: Checkpoint, output: str | Path | None, naming: Naming, *, overwrite: bool, others: Sequence[Checkpoint] = ()
) -> Target:
    """Where the output goes, known to be writable before any work is done, and none of the inputs.

    Raises:
        BadInput: as `check_output`; or the name is none of such a file.
    """
    target = Target(naming.place(source, output), naming.form, (source, *others), overwrite)
    target.check()
    return target


def check_output(
    path: Path,
    *,
    sources: Sequence[Checkpoint | Path],
    form: Container,
    overwrite: bool,
    needed_bytes: int = 0,
) -> None:
    """Refuse an output that could not be written, or that would harm the input, before any work is done.

    What a run that was killed has left beside it is removed first, and what it was about to replace is replaced.

    Args:
        path: The file or folder to be written.
        sources: What is being read; it must stay untouched.
        form: What will be written at `path`.
        overwrite: Whether something that exists at `path` may be replaced. A folder is replaced only when it
            is a model, by `require_replaceable`.
        needed_bytes: What will be written, for the check of free space.

    Raises:
        BadInput: saying which of these it is and what to do.
    """
    path = located(path)
    for source in sources:
        _require_apart(path, source)
    remove_abandoned(path.parent)
    if os.path.lexists(path):
        if not overwrite:
            remedy = "choose another output, or replace it with `overwrite`"
            raise BadInput("already exists", where=path, remedy=remedy)
        folders = {source.folder for source in sources if isinstance(source, Checkpoint) and source.folder is not None}
        require_replaceable(path, form, {file for folder in folders for file in companions(folder).files})
    _require_writable(path)
    free = shutil.disk_usage(path.parent).free
    if needed_bytes > free:
        what = f"needs {_size_words(needed_bytes)}, and the disk has {_size_words(free)} free"
        raise BadInput(what, where=path, remedy="free some space or choose an output on another disk")


def located(path: Path) -> Path:
    """The absolute path whose last part is kept as it is, because a link there is replaced and not followed."""
    if path.name in ("", ".."):
        return path.resolve()
    return path.parent.resolve() / path.name


def _require_apart(path: Path, source: Checkpoint | Path) -> None:
    inputs: list[Path | None] = [source] if isinstance(source, Path) else [source.source, source.folder]
    if not isinstance(source, Path):
        inputs += [file for file in source.files if isinstance(file, Path)]
    for given in filter(None, inputs):
        for place in {located(given), given.resolve()}:
            for target in {path, path.resolve()}:
                if target == place:
                    what = "is the input itself"
                elif place in target.parents and place.is_dir():
                    what = "lies inside the input folder"
                elif target in place.parents:
                    what = "contains the input"
                else:
                    continue
                remedy = "choose an output elsewhere; the input is never changed"
                raise BadInput(what, where=path, remedy=remedy)


def require_replaceable(path: Path, form: Container, new: Set[Path]) -> None:
    """Refuse to replace anything but a file by a file, and a model folder by a model folder.

    Of a folder only those files are replaced that its `compression.json` says we wrote, that the new one has too, or
    that weights and their description are always written to; whatever else is there is named and nothing is touched.

    Args:
        path: Where something is.
        form: What is to be written there.
        new: The files of the new folder, relative to it.

    Raises:
        BadInput: naming what would be lost.
    """
    if path.is_dir() != (form == "folder"):
        what = f"is a {'folder' if path.is_dir() else 'file'}, and a {form} is to be written there"
        raise BadInput(what, where=path, remedy="choose another output")
    if form == "file" or path.is_symlink():
        return
    remove_abandoned(path)  # a run that was killed while it wrote its report there
    foreign = sorted(str(entry) for entry in _foreign_entries(path, new | noted_files(path)))
    if foreign:
        more = f" and {len(foreign) - 4} more" if len(foreign) > 4 else ""
        what = f"also holds {', '.join(foreign[:4])}{more}, which would be lost"
        raise BadInput(what, where=path, remedy="move that elsewhere, or choose another output")
    entries = {entry.name for entry in path.iterdir()}
    if entries and PLAN_FILE not in entries and not any(name.endswith(WEIGHT_SUFFIXES) for name in entries):
        what = "holds files but no weights, so it is no model and is not replaced"
        raise BadInput(what, where=path, remedy="choose another output, or remove it yourself")
    with suppress(FileNotFoundError):  # the working directory is gone already
        if Path.cwd().is_relative_to(path):
            what = "is or holds the working directory, and replacing it would leave the shell without one"
            raise BadInput(what, where=path, remedy="run the command from another folder, or choose another output")


def files_below(folder: Path) -> set[Path]:
    """All files of a folder and its subfolders, relative to it."""
    return {entry.relative_to(folder) for entry in folder.rglob("*") if not entry.is_dir()}


def _foreign_entries(root: Path, ours: Set[Path]) -> Iterator[Path]:
    """What is neither among some files nor leads to them, relative to the root; nothing below it is looked at."""
    folders = {folder for file in ours for folder in file.parents}

    def visit(folder: Path) -> Iterator[Path]:
        for entry in folder.iterdir():
            relative = entry.relative_to(root)
            if entry.is_dir() and not entry.is_symlink():
                if relative in folders:
                    yield from visit(entry)
                else:
                    yield relative
            elif relative not in ours and (folder != root or _WRITTEN.fullmatch(entry.name) is None):
                yield relative

    return visit(root)


def noted_files(folder: Path) -> set[Path]:
    """The files that we wrote into a folder, by its `compression.json`."""
    try:
        noted = json.loads((folder / PLAN_FILE).read_bytes())["files"]
        return {Path(name) for name in noted if isinstance(name, str)}
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        return set()


def _require_writable(path: Path) -> None:
    if not path.name:
        raise BadInput("cannot be replaced", where=path, remedy="choose another output")
    if not path.parent.is_dir():
        what = f"cannot be written: {path.parent} is not an existing folder"
        raise BadInput(what, where=path, remedy="create the folder or choose another output")
    # Permissions do not tell: root is above them, and file systems can be read-only.
    probe = path.with_name(f".{path.name[:40]}.{secrets.token_hex(6)}.partial")
    try:
        with suppress(FileNotFoundError):
            path.lstat()  # a name that the file system does not allow
        probe.mkdir()
        with suppress(FileNotFoundError):
            probe.rmdir()
    except OSError as error:
        remedy = "choose an output in a writable folder"
        bad = explained(error, doing="cannot be written", folder=path.parent, elsewhere=remedy, where=path)
        raise bad or BadInput(f"cannot be written ({error.strerror})", where=path, remedy=remedy) from error


def _size_words(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 10**6 else f"{size / 1e3:.1f} kB"
