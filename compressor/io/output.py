"""Which outputs may be written, found out before the work starts."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Set
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Literal

from compressor.errors import BadInput
from compressor.io.checkpoint import ADAPTER_CONFIG, WEIGHT_SUFFIXES, Checkpoint
from compressor.io.companions import CODE_FILE, PLAN_FILE, companions
from compressor.io.workspace import remove_abandoned
from compressor.system_errors import explained

_UNITS = {
    unit: base**power
    for base, infix in ((1000, ""), (1024, "I"))
    for power, letter in enumerate("KMGT", start=1)
    for unit in (letter + infix + "B",)
} | {"": 1, "B": 1}

# What a model folder is written as, beside the companions of its weights.
_WRITTEN = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|adapter_model\.safetensors"
    rf"|config\.json|README\.md|{re.escape(CODE_FILE)}|{re.escape(PLAN_FILE)}|{re.escape(ADAPTER_CONFIG)}"
)


def parse_size(text: str) -> int:
    """Bytes in a size such as `40MB`, `1.5GiB` or `4096`: KB is 1000 bytes, KiB is 1024.

    Raises:
        BadInput: the text is no positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)\s*", text, re.ASCII)
    unit = _UNITS.get(match[2].upper()) if match else None
    size = 0 if match is None or unit is None else int(Decimal(match[1]) * unit)
    if size <= 0:
        raise BadInput(f"{text!r} is not a size", remedy="write a number and a unit, such as 40MB or 1.5GiB")
    return size


def check_output(
    path: Path,
    *,
    source: Checkpoint | Path | None,
    form: Literal["file", "folder"],
    overwrite: bool,
    needed_bytes: int = 0,
) -> None:
    """Refuse an output that could not be written, or that would harm the input, before any work is done.

    What a run that was killed has left beside it is removed first, and what it was about to replace is replaced.

    Args:
        path: The file or folder to be written.
        source: What is being read; it must stay untouched.
        form: What will be written at `path`.
        overwrite: Whether something that exists at `path` may be replaced. A folder is replaced only when it
            is a model, by `require_replaceable`.
        needed_bytes: What will be written, for the check of free space.

    Raises:
        BadInput: saying which of these it is and what to do.
    """
    path = located(path)
    _require_apart(path, source)
    remove_abandoned(path.parent)
    if os.path.lexists(path):
        if not overwrite:
            remedy = "choose another output, or replace it with `overwrite`"
            raise BadInput("already exists", where=path, remedy=remedy)
        folder = source.folder if isinstance(source, Checkpoint) else None
        require_replaceable(path, form, set() if folder is None else set(companions(folder).files))
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


def _require_apart(path: Path, source: Checkpoint | Path | None) -> None:
    if source is None:
        return
    inputs = [source] if isinstance(source, Path) else [source.source, source.folder, *source.files]
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


def require_replaceable(path: Path, form: Literal["file", "folder"], new: Set[Path]) -> None:
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
