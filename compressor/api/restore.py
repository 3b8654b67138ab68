"""A compressed checkpoint multiplied back to the dense one that its original code loads."""

from __future__ import annotations

import time
from pathlib import Path

from compressor.api.requests import as_size
from compressor.api.write import written
from compressor.errors import BadInput
from compressor.fine_tuning import is_difference
from compressor.io import Checkpoint, Naming, checked_target, form_of, open_checkpoint
from compressor.io.output import WEIGHT_FILES
from compressor.lowrank import StoredPair, restored_artifact, stored_pairs
from compressor.model import Factory
from compressor.model.opened import fitting_architecture
from compressor.network import in_natural_order
from compressor.progress import Progress
from compressor.report.model_card import restored_card
from compressor.results import BeforeAfter, Restoration
from compressor.torch_state import neutral_torch_state


@neutral_torch_state()
def restore(
    model: str | Path,
    *,
    output: str | Path | None = None,
    factory: Factory | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Restoration:
    """Multiply the factors of a compressed checkpoint back to dense weights that its original code loads.

    A folder gives a folder; a file gives safetensors, or a torch state dict where `output` is named like one (.pt,
    .pth, .bin, .th, .ckpt). The file says itself how each layer is laid out; with a `factory` of the dense architecture
    the weights are checked to fit it before anything is written. Raises `BadInput` when the model is not a compressed
    one, does not fit, or the output cannot be written.
    """
    started = time.monotonic()
    checkpoint = open_checkpoint(model)
    pairs = _compressed_pairs(checkpoint)
    if factory is not None:
        fitting_architecture(checkpoint, factory)
    named = Naming(form_of(checkpoint), "-restored", WEIGHT_FILES)
    target = checked_target(checkpoint, output, named, overwrite=overwrite)
    artifact = restored_artifact(
        checkpoint,
        pairs,
        as_size(max_shard_size, "max_shard_size"),
        torch_file=target.form == "file" and target.path.suffix != ".safetensors",
        progress=progress,
    )
    with written(artifact, target) as made:
        made.write_card(restored_card)
    return Restoration(
        source=str(model),
        output=str(target.path),
        layers=tuple(in_natural_order(pairs)),
        bytes=BeforeAfter(checkpoint.weight_bytes, made.bytes),
        seconds=time.monotonic() - started,
        not_copied=made.not_copied,
    )


def _compressed_pairs(checkpoint: Checkpoint) -> dict[str, StoredPair]:
    """The low-rank layers of a checkpoint; BadInput where there are none, or they are to be added to a base."""
    if is_difference(checkpoint):
        raise BadInput(
            "holds what a fine-tune adds to its base",
            where=checkpoint.source,
            remedy="use 'compress export MODEL --to dense --base ORIGINAL'",
        )
    pairs = stored_pairs(checkpoint)
    if not pairs:
        raise BadInput(
            "holds no low-rank layer", where=checkpoint.source, remedy="give a checkpoint that 'compress MODEL' wrote"
        )
    return pairs
