"""The one way in which a model is written: whole with all that stands beside its weights, or not at all."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from compressor.documents import read_text
from compressor.errors import BadInput
from compressor.io import (
    CARD_FILE,
    Artifact,
    NotCopied,
    SafetensorsWriter,
    ShardedWriter,
    Target,
    copy_companions,
    staged_file,
    staged_folder,
    write_json,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Output:
    """A model that is complete but not yet in its place.

    Args:
        model: The file or folder where it is staged, or the module; None where nothing is made.
        bytes: Size of the weight files, or of the tensors of a module.
        not_copied: What of the source's folder did not go along, and why.
    """

    model: Path | nn.Module | None
    bytes: int
    not_copied: tuple[NotCopied, ...] = ()

    def write_card(self, text_of: Callable[[str], str]) -> None:
        """Write the card of a folder, and nothing for any other model.

        `text_of` makes it from the card that came along from the source, which is empty where there is none or it
        cannot be read.
        """
        if not isinstance(self.model, Path) or not self.model.is_dir():
            return
        path = self.model / CARD_FILE
        if path.is_dir():
            logger.warning("%s is a folder, so no card was written", CARD_FILE)
            return
        original = ""
        try:
            original = read_text(path) if path.is_file() else ""
        except BadInput as error:
            logger.warning("the card of the source is not kept: %s", error)
        if (text := text_of(original)) != original:
            path.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def written(artifact: Artifact, target: Target | None) -> Iterator[Output]:
    """Write a model to its target once the block ends well; where it does not, nothing is left behind.

    In the block the model is complete but for its card, so it can be loaded and measured. Without a target nothing is
    written; where the artifact builds a module, that is the model.

    Raises:
        BadInput: the target cannot be written.
    """
    if target is None:
        yield Output(None if artifact.module is None else artifact.module(), artifact.bytes)
    elif artifact.form == "file":
        target.check(artifact.bytes)
        with staged_file(target.path, overwrite=target.overwrite) as file:
            _write_file(file, artifact)
            yield Output(file, file.stat().st_size)
    else:
        target.check(artifact.bytes)
        with staged_folder(target.path, overwrite=target.overwrite) as folder:
            _write_folder(folder, artifact)
            yield Output(folder, artifact.bytes, artifact.not_copied)


def _write_file(file: Path, artifact: Artifact) -> None:
    if artifact.write is not None:
        artifact.write(file)
        return
    with SafetensorsWriter(file, artifact.infos, artifact.metadata) as writer:
        for name, tensor in artifact.tensors():
            writer.write(name, tensor)


def _write_folder(folder: Path, artifact: Artifact) -> None:
    source = artifact.companions_of
    if source is not None and source.folder is not None:
        copy_companions(source.folder, folder, left_out=artifact.left_out)
    with ShardedWriter(folder, artifact.shards, artifact.metadata) as writer:
        for name, tensor in artifact.tensors():
            writer.write(name, tensor)
    for name, document in artifact.documents().items():
        if isinstance(document, str):
            (folder / name).write_text(document, encoding="utf-8")
        else:
            write_json(folder / name, document)
