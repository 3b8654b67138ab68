"""Where the result of a run goes, and how it gets there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from compressor.errors import BadInput
from compressor.io.checkpoint import Checkpoint
from compressor.io.companions import NotCopied, companions, copy_companions
from compressor.io.hub import hub_model
from compressor.io.output import check_output
from compressor.io.staging import staged_file, staged_folder


def form_of(checkpoint: Checkpoint) -> Literal["file", "folder"]:
    """What is written for a checkpoint: a folder for a folder, else a file."""
    return "folder" if checkpoint.folder is not None else "file"


def checked_target(checkpoint: Checkpoint, output: str | Path | None, *, dry_run: bool, overwrite: bool) -> Path | None:
    """Where the result goes, known to be writable before any work is done; None where nothing is written."""
    if checkpoint.source is None and output is not None:
        raise BadInput("a module is compressed in memory", remedy="leave out the output, and save Compression.model")
    if dry_run or checkpoint.source is None:
        return None
    target = target_of(checkpoint, output)
    check_output(target, source=checkpoint, form=form_of(checkpoint), overwrite=overwrite)
    return target


def target_of(
    checkpoint: Checkpoint, output: str | Path | None, *, suffix: str = "-compressed", torch_files: bool = False
) -> Path:
    """Where the result goes: as asked, or beside the input under its name and the suffix.

    What was fetched from the hub has its place in the working directory.
    """
    source = checkpoint.source
    assert source is not None
    if output is None and hub_model(source) is not None:
        return Path(checkpoint.name.rpartition("/")[2] + suffix)
    if checkpoint.folder is not None:
        place = Path(os.path.abspath(source))  # noqa: PTH100 - a link is not followed, so the output is beside it
        return Path(output) if output is not None else place.with_name(place.name + suffix)
    if output is None:
        stem = source.name.removesuffix(".index.json")
        return source.with_name(Path(stem).stem + suffix + ".safetensors")
    allowed = (".safetensors", ".pt", ".pth", ".bin", ".th", ".ckpt") if torch_files else (".safetensors",)
    if Path(output).suffix not in allowed:
        raise BadInput("a file is written as safetensors", where=output, remedy=f"name it with {' or '.join(allowed)}")
    return Path(output)


def shard_limit(checkpoint: Checkpoint, shard_size: int) -> int | None:
    """The largest weight file of the output; None where it is a single file."""
    return shard_size if checkpoint.folder is not None else None


def not_copied_from(checkpoint: Checkpoint) -> tuple[NotCopied, ...]:
    """What of a checkpoint's folder does not go along with new weights, and why."""
    return () if checkpoint.folder is None else companions(checkpoint.folder).not_copied


@contextmanager
def staged_output(target: Path, checkpoint: Checkpoint, overwrite: bool) -> Iterator[Path]:
    """A staged file, or for a model folder a staged folder with what goes along with its weights."""
    if checkpoint.folder is None:
        with staged_file(target, overwrite=overwrite) as staged:
            yield staged
        return
    with staged_folder(target, overwrite=overwrite) as staged:
        copy_companions(checkpoint.folder, staged)
        yield staged
