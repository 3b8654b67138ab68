"""Where results go: checked before the work starts, complete or absent afterwards."""

from __future__ import annotations

import itertools
import logging
import os
import re
import shutil
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from typing import BinaryIO, Literal

from compressor.checkpoint.files import full_disk_is_bad_input, hidden_sibling, sync_folder
from compressor.checkpoint.reader import WEIGHT_SUFFIXES, Checkpoint
from compressor.documents import reading
from compressor.errors import BadInput

_LOGGER = logging.getLogger(__name__)

_UNITS = {
    unit: base**power
    for base, infix in ((1000, ""), (1024, "I"))
    for power, letter in enumerate("KMGT", start=1)
    for unit in (letter + infix + "B",)
} | {"": 1, "B": 1}

# The same weights in the formats of other frameworks: dense, so stale beside compressed ones.
_OTHER_WEIGHT_SUFFIXES = (".h5", ".msgpack", ".ot", ".onnx", ".gguf", ".tflite")
# Measured on the weights that are replaced.
_RESULTS = ("metrics.json", "all_results.json", "eval_results.json", "test_results.json", "predict_results.json")
_TRAINING_ARGUMENTS = "training_args.bin"


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

    Args:
        path: The file or folder to be written.
        source: What is being read; it must stay untouched.
        form: What will be written at `path`.
        overwrite: Whether something that exists at `path` may be replaced. A folder is replaced only when it
            looks like a model folder: weights among its files, and in subfolders nothing that is not copied
            from `source` again.
        needed_bytes: What will be written, for the check of free space.

    Raises:
        BadInput: saying which of these it is and what to do.
    """
    path = _located(path)
    _require_apart(path, source)
    if os.path.lexists(path):
        if not overwrite:
            remedy = "choose another output, or replace it with `overwrite`"
            raise BadInput("already exists", where=path, remedy=remedy)
        folder = source.folder if isinstance(source, Checkpoint) else None
        _require_replaceable(path, form, set() if folder is None else set(_other_files(folder)[0]))
    _require_writable(path)
    free = shutil.disk_usage(path.parent).free
    if needed_bytes > free:
        what = f"needs {_size_words(needed_bytes)}, and the disk has {_size_words(free)} free"
        raise BadInput(what, where=path, remedy="free some space or choose an output on another disk")


@contextmanager
def output_folder(path: Path, *, copy_from: Path | None, overwrite: bool) -> Iterator[Path]:
    """A new folder that becomes `path` when the block ends well, and leaves no trace when it does not.

    Inside the block the folder, which is what the block is given, has a hidden name beside `path`. An
    existing `path` is replaced only after the new folder is complete.

    Args:
        path: The folder to make.
        copy_from: A model folder whose other files (configuration, tokenizer, card, training arguments) are
            copied first, without weights, their indices, what was measured on them (metrics.json), and optimizer,
            scheduler and random states. So are
            its subfolders, unless hidden, of checkpoints of the training (checkpoint-*), or with weights of their
            own. A link to a file is followed only inside the folder, or inside the Hugging Face cache that the
            folder is part of; a link to a folder is not followed. What is left out is logged.
        overwrite: Whether an existing folder may be replaced.

    Raises:
        BadInput: the place is not writable, exists, or the disk is full; a file of `copy_from` is unreadable.
    """
    path = _located(path)
    partial = hidden_sibling(path)
    _require_writable(path)
    try:
        with full_disk_is_bad_input(path):
            partial.mkdir()
            if copy_from is not None:
                _copy_other_files(copy_from, partial)
            yield partial
        sync_folder(partial)
        _move_into_place(partial, path, overwrite=overwrite)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    sync_folder(path.parent)


def _located(path: Path) -> Path:
    # The last part is kept as it is, because a link there is replaced and not followed.
    if path.name in ("", ".."):
        return path.resolve()
    return path.parent.resolve() / path.name


def _require_apart(path: Path, source: Checkpoint | Path | None) -> None:
    if source is None:
        return
    inputs = [source] if isinstance(source, Path) else [source.source, source.folder, *source.files]
    for given in filter(None, inputs):
        for place in {_located(given), given.resolve()}:
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


def _require_replaceable(path: Path, form: Literal["file", "folder"], again: Set[Path]) -> None:
    """Refuse to replace what is no model; `again` are the files, relative to the folder, that its successor has too."""
    if path.is_dir() != (form == "folder"):
        what = f"is a {'folder' if path.is_dir() else 'file'}, and a {form} is to be written there"
        raise BadInput(what, where=path, remedy="choose another output")
    if form == "file" or path.is_symlink():
        return
    entries = list(path.iterdir())
    subfolders = [entry for entry in entries if entry.is_dir() and not entry.is_symlink()]
    if not all(_is_within(subfolder, path, again) for subfolder in subfolders):
        what = "has subfolders with other files, so it is more than a compressed model and is not replaced"
    elif entries and not any(entry.name.endswith(WEIGHT_SUFFIXES) for entry in entries):
        what = "holds files but no weights, so it is no model and is not replaced"
    else:
        return
    raise BadInput(what, where=path, remedy="choose another output, or remove it yourself")


def _is_within(subfolder: Path, root: Path, files: Set[Path]) -> bool:
    """Whether a subfolder of `root` and all below it are among the files, or lead to some of them."""
    folders = {folder for file in files for folder in file.parents}
    entries = itertools.chain([subfolder], subfolder.rglob("*"))
    return all(entry.relative_to(root) in (folders if entry.is_dir() else files) for entry in entries)


def _require_writable(path: Path) -> None:
    if not path.name:
        raise BadInput("cannot be replaced", where=path, remedy="choose another output")
    if not path.parent.is_dir():
        what = f"cannot be written: {path.parent} is not an existing folder"
        raise BadInput(what, where=path, remedy="create the folder or choose another output")
    # Permissions do not tell: root is above them, and file systems can be read-only.
    probe = hidden_sibling(path)
    try:
        with suppress(FileNotFoundError):
            path.lstat()  # a name that the file system does not allow
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        what = f"cannot be written ({error.strerror})"
        raise BadInput(what, where=path, remedy="choose an output in a writable folder") from error


def _copy_other_files(source: Path, target: Path) -> None:
    files, left_out = _other_files(source)
    for reason, entries in left_out.items():
        _LOGGER.warning("not copied from %s: %s (%s)", source, ", ".join(map(str, entries)), reason)
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        # The contents alone: the new file gets the permissions that the umask asks for.
        with reading(source / file):
            contents = (source / file).open("rb")
        with contents, (target / file).open("wb") as copy:
            # Only a failure to read is the input's fault.
            while chunk := _read_chunk(contents, source / file):
                copy.write(chunk)


def _read_chunk(contents: BinaryIO, path: Path) -> bytes:
    with reading(path):
        return contents.read(2**20)


def _other_files(source: Path) -> tuple[list[Path], dict[str, list[Path]]]:
    """The files beside the weights of a model folder, relative to it; and what is left out besides weights, by reason.

    Raises:
        BadInput: a subfolder cannot be read.
    """
    inside = source.resolve()
    # huggingface_hub keeps snapshots/REVISION/NAME as links to blobs/HASH of the same repository.
    if inside.parent.name == "snapshots":
        inside = inside.parent.parent
    files: list[Path] = []
    left_out: dict[str, list[Path]] = {}

    def visit(folder: Path) -> None:
        for entry in _entries(folder):
            relative = entry.relative_to(source)
            if entry.is_dir():
                if (reason := _why_left_out(entry)) is None:
                    visit(entry)
                else:
                    left_out.setdefault(reason, []).append(relative)
            elif _holds_weights(entry) or str(relative) in _RESULTS:
                continue
            elif not entry.is_file():
                left_out.setdefault("a broken link or no regular file", []).append(relative)
            elif not entry.resolve().is_relative_to(inside):
                left_out.setdefault("a link out of the model folder", []).append(relative)
            else:
                files.append(relative)

    with reading(source):
        visit(source)
    return files, left_out


def _entries(folder: Path) -> list[Path]:
    with reading(folder):
        return sorted(folder.iterdir())


def _holds_weights(file: Path) -> bool:
    if file.name == _TRAINING_ARGUMENTS:
        return False
    indices = tuple(suffix + ".index.json" for suffix in WEIGHT_SUFFIXES)
    return file.name.endswith((*WEIGHT_SUFFIXES, *_OTHER_WEIGHT_SUFFIXES, *indices))


def _why_left_out(subfolder: Path) -> str | None:
    if subfolder.is_symlink():
        return "a link to a folder"
    if subfolder.name.startswith("."):
        return "hidden"
    if subfolder.name.startswith("checkpoint-"):
        return "checkpoints of the training"
    if any(_holds_weights(entry) for entry in _entries(subfolder) if not entry.is_dir()):
        return "with weights of its own"
    return None


def _move_into_place(partial: Path, path: Path, *, overwrite: bool) -> None:
    if not os.path.lexists(path):
        partial.rename(path)
        return
    if not overwrite:
        what = "was made by somebody else in the meantime"
        raise BadInput(what, where=path, remedy="choose another output, or replace it with `overwrite`")
    _require_replaceable(path, "folder", {file.relative_to(partial) for file in partial.rglob("*") if file.is_file()})
    old = hidden_sibling(path)
    path.rename(old)
    try:
        partial.rename(path)
    except BaseException:
        old.rename(path)
        raise
    if old.is_symlink():
        old.unlink()
    else:
        with suppress(OSError):
            shutil.rmtree(old)


def _size_words(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 10**6 else f"{size / 1e3:.1f} kB"
