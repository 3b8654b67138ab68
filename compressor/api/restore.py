"""A compressed checkpoint multiplied back to the dense one that its original code loads."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Unpack

from compressor.api.initial import require_use
from compressor.api.keywords import RestoreKeywords
from compressor.api.option import verb
from compressor.api.options import RestoreOptions
from compressor.api.stored_base import with_base
from compressor.api.write import written
from compressor.archiving import archived_checkpoint, is_archive, read_index
from compressor.encodings import read_checkpoint
from compressor.errors import BadInput
from compressor.fine_tuning import applied_artifact
from compressor.io import Naming, checked_target, form_of, local_model, refuse_adapter
from compressor.io.output import WEIGHT_FILES
from compressor.lowrank import decoded_checkpoint, restored_artifact
from compressor.model import Model, ModelLike, given_initial, open_runnable
from compressor.model.opened import fitting_architecture
from compressor.network import in_natural_order, layer_name
from compressor.report.fine_tune_card import applied_card
from compressor.report.model_card import restored_card
from compressor.results import BeforeAfter, Restoration
from compressor.torch_state import neutral_torch_state


@neutral_torch_state()
@verb(RestoreOptions)
def restore(model: ModelLike, options: RestoreOptions | None = None, **given: Unpack[RestoreKeywords]) -> Restoration:
    """Multiply the factors of a compressed checkpoint back to dense weights that its original code loads.

    A folder gives a folder; a file gives safetensors, or a torch state dict where `output` is named like one (.pt,
    .pth, .bin, .th, .ckpt). The file says itself how each layer is laid out; with a `factory` of the dense architecture
    the weights are checked to fit it before anything is written. Of an archive of checkpoints the one that
    `checkpoint` names is restored, and of a stored difference the fine-tune that it and its `base` make.

    Args:
        model: A compressed weight file or folder, a file of what a fine-tune adds to its base, an archive of
            checkpoints, or a module with low-rank layers, which wants an `output`.
        options: The options as an object; keywords take precedence.

    Returns:
        What was restored, and where it was written.

    Raises:
        BadInput: the model is not a compressed one, does not fit, or the output cannot be written.

    Example:
        >>> compressor.restore("small/", output="dense/")
    """
    started = time.monotonic()
    asked = RestoreOptions.of(options, given)
    if isinstance(model, str | Path) and is_archive(Path(model)):
        if asked.base is not None:
            what = "an archive of checkpoints has no base"
            raise BadInput(what, where=str(model), option="base", remedy="leave out `base`")
        return _restored_from_archive(Path(model), asked, started)
    if asked.checkpoint is not None:
        what = "`checkpoint` is about an archive, and this is none"
        raise BadInput(what, where=str(model), option="checkpoint", remedy="leave it out")
    opened = open_runnable(model, initial=asked.initial)
    if (tuned := with_base(opened, asked.base)) is not opened:
        return _restored_fine_tune(opened, tuned, asked, started=started)
    _require_pairs(opened)
    require_use(asked, opened)
    checkpoint, pairs = opened.checkpoint, opened.pairs
    if asked.factory is not None:
        fitting_architecture(checkpoint, asked.factory)
    named = Naming(form_of(checkpoint), "-restored", WEIGHT_FILES)
    target = checked_target(checkpoint, asked.output, named, overwrite=asked.overwrite)
    artifact = restored_artifact(
        checkpoint,
        pairs,
        asked.max_shard_size,
        torch_file=target.form == "file" and target.path.suffix != ".safetensors",
        progress=asked.progress,
    )
    with written(artifact, target) as made:
        made.write_card(restored_card)
    return Restoration(
        source=opened.name,
        output=str(target.path),
        layers=tuple(in_natural_order([*pairs, *opened.formed, *map(layer_name, opened.decoded)])),
        bytes=BeforeAfter(checkpoint.weight_bytes, made.bytes),
        seconds=time.monotonic() - started,
        not_copied=made.not_copied,
    )


def _restored_fine_tune(stored: Model, tuned: Model, asked: RestoreOptions, *, started: float) -> Restoration:
    """The fine-tune that a stored difference and its base make: a folder where the base is one."""
    assert asked.base is not None
    difference, base = stored.checkpoint, decoded_checkpoint(read_checkpoint(local_model(asked.base)))
    if asked.factory is not None:
        fitting_architecture(tuned.checkpoint, asked.factory)
    named = Naming(form_of(base), "-restored")
    target = checked_target(difference, asked.output, named, overwrite=asked.overwrite, others=[base])
    card = partial(applied_card, name=target.name, base=base.name, difference=difference.name, config=base.config)
    with written(applied_artifact(tuned.checkpoint, base, asked.max_shard_size), target) as made:
        made.write_card(card)
    return Restoration(
        source=stored.name,
        output=str(target.path),
        layers=tuple(in_natural_order(list(stored.pairs))),
        bytes=BeforeAfter(difference.weight_bytes, made.bytes),
        seconds=time.monotonic() - started,
        not_copied=made.not_copied,
    )


def _restored_from_archive(folder: Path, asked: RestoreOptions, started: float) -> Restoration:
    """A checkpoint of an archive, as the file or folder that it was."""
    index = read_index(folder)
    if asked.checkpoint is None:
        what, names = "is an archive of checkpoints", [each.name for each in index.checkpoints]
        remedy = f"name one of them with `checkpoint`, such as {names[-1]}"
        raise BadInput(what, where=folder, option="checkpoint", remedy=remedy)
    stored = index.checkpoint(asked.checkpoint, folder)
    if asked.initial is not None and (index.initial is None or index.initial.draws is not None):
        raise BadInput("needs no initial weights", where=folder, option="initial", remedy="leave out `initial`")
    initial = None if asked.initial is None else given_initial(asked.initial, factory=asked.factory)
    checkpoint = archived_checkpoint(folder, index, stored, initial=initial)
    named = Naming(index.form, "", WEIGHT_FILES)
    target = checked_target(
        checkpoint, asked.output or folder.absolute().with_name(stored.name), named, overwrite=asked.overwrite
    )
    artifact = restored_artifact(
        checkpoint,
        {},
        asked.max_shard_size,
        torch_file=target.form == "file" and target.path.suffix != ".safetensors",
        progress=asked.progress,
    )
    if checkpoint.config is None:
        artifact = replace(artifact, documents=dict)
    with written(artifact, target) as made:
        pass
    return Restoration(
        source=str(folder),
        output=str(target.path),
        layers=(),
        bytes=BeforeAfter(stored.stored_bytes, made.bytes),
        seconds=time.monotonic() - started,
        not_copied=made.not_copied,
        checkpoint=stored.name,
    )


def _require_pairs(model: Model) -> None:
    """Refuse a model without low-rank layers."""
    where = model.checkpoint.source
    if not model.pairs and not model.formed and not model.decoded:
        refuse_adapter(model.checkpoint)
        remedy = "give a checkpoint that 'compress MODEL' wrote"
        raise BadInput("holds no low-rank layer", where=where, remedy=remedy)
