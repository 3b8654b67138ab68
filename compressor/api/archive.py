"""The checkpoints of one training run as changes from where it started and from one another."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from compressor.api.initial import with_initial
from compressor.api.keywords import ArchiveKeywords
from compressor.api.option import verb
from compressor.api.options import ArchiveOptions
from compressor.archiving import TrainingRun, write_archive
from compressor.errors import BadInput
from compressor.initial import starts_of
from compressor.io import Checkpoint, check_output, open_checkpoint, refuse_adapter, staged_folder
from compressor.io.output import files_below
from compressor.io.steps import steps_in_order
from compressor.measure import uses_per_example
from compressor.model import open_model
from compressor.results import Archiving, BeforeAfter
from compressor.torch_state import neutral_torch_state


@neutral_torch_state()
@verb(ArchiveOptions)
def archive(
    checkpoints: Sequence[str | Path], options: ArchiveOptions | None = None, **given: Unpack[ArchiveKeywords]
) -> Archiving:
    """Store the checkpoints of one training run as changes from its initial weights or from one another.

    Each tensor is stored as `share * earlier + change`, where what is earlier is the initial weights or the checkpoint
    before, whichever takes fewer bytes at the same error. The change is a pair of factors, rounded numbers, or both.
    What is earlier is taken as it will be restored, so errors do not add up from checkpoint to checkpoint. Where the
    recipe says so, the memory window gives the share and bounds the rank of the pair: `B R n` after n steps. Weights
    are stored, and no states of optimizers. `restore` gives any of the checkpoints back.

    Args:
        checkpoints: Weight files or model folders, whose names or `trainer_state.json` tell their steps.
        options: The options as an object; keywords take precedence.

    Returns:
        What each checkpoint takes, and how.

    Raises:
        BadInput: the checkpoints are not of one run, cannot be read or ordered, or the output cannot be written.

    Example:
        >>> compressor.archive(sorted(Path("run").glob("checkpoint-*")), output="run-archive", tolerance=0.001)
        >>> compressor.restore("run-archive", checkpoint="checkpoint-500", output="checkpoint-500")
    """
    started = time.monotonic()
    asked = ArchiveOptions.of(options, given)
    run = _opened(checkpoints, asked)
    check_output(asked.output, sources=run.checkpoints, form="folder", overwrite=asked.overwrite)
    with staged_folder(asked.output, overwrite=asked.overwrite) as folder:
        index = write_archive(folder, run, asked.tolerance, progress=asked.progress)
    stored = sum((asked.output / file).stat().st_size for file in files_below(asked.output))
    return Archiving(
        output=str(asked.output),
        tolerance=asked.tolerance,
        unit=index.unit,
        recipe=run.recipe,
        initial=None if run.initial is None else run.initial.source,
        checkpoints=tuple(index.checkpoints),
        bytes=BeforeAfter(sum(each.bytes for each in index.checkpoints), stored),
        left_out=tuple(each for checkpoint in run.checkpoints for each in checkpoint.left_out),
        seconds=time.monotonic() - started,
    )


def _opened(checkpoints: Sequence[str | Path], asked: ArchiveOptions) -> TrainingRun:
    """The run: its checkpoints in order, and what the last of them tells of the layers and of the training."""
    if isinstance(checkpoints, str | Path) or not checkpoints:
        what, remedy = "there are no checkpoints to archive", "give a list of weight files or model folders"
        raise BadInput(what, option="checkpoints", remedy=remedy)
    paths = [_existing(each) for each in checkpoints]
    unit, ordered = steps_in_order(paths)
    opened = [_checkpoint(path) for _, path in ordered]
    last = open_model(ordered[-1][1], recipe=asked.recipe, factory=asked.factory)
    # The first checkpoint has most of what a seed draws; it may be the one that is given.
    drawn = asked.initial is None or asked.initial == "auto" or isinstance(asked.initial, int)
    subject = replace(last, checkpoint=opened[0]) if drawn else last
    initial = with_initial(asked, subject, asked.progress)[0].initial
    if asked.initial is None and initial is not None:
        eligible = [layer for layer in subject.layers if layer.eligible]
        initial = initial if starts_of(eligible, subject.checkpoint, initial) else None
    recipe, numbers = last.recipe, [number for number, _ in ordered]
    if unit == "step" and recipe.total_steps is None:
        recipe = replace(recipe, steps=numbers[-1])
    uses = uses_per_example(
        last.layers, last.architecture, last.checkpoint.directory, sequence_length=recipe.sequence_length
    )
    return TrainingRun(
        checkpoints=opened,
        numbers=numbers,
        unit=unit,
        layers={layer.tensor: layer for layer in last.layers},
        uses=uses,
        recipe=recipe,
        initial=initial,
    )


def _existing(checkpoint: str | Path) -> Path:
    """The path of a checkpoint; `BadInput` for a pattern that the shell did not replace, as nothing matches it."""
    if not isinstance(checkpoint, str | Path):
        what = f"one of `checkpoints` is of type {type(checkpoint).__name__}"
        raise BadInput(what, option="checkpoints", remedy="give weight files or model folders")
    path = Path(checkpoint)
    if not os.path.lexists(path) and any(sign in path.name for sign in "*?["):
        raise BadInput("matches no checkpoint", where=path, remedy="check the path")
    return Path(os.path.normpath(path))


def _checkpoint(path: Path) -> Checkpoint:
    checkpoint = open_checkpoint(path)
    refuse_adapter(checkpoint)
    return checkpoint
