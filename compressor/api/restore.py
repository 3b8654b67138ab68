"""A compressed checkpoint multiplied back to the dense one that its original code loads."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from compressor.api.requests import as_size
from compressor.errors import BadInput
from compressor.fine_tuning import is_difference
from compressor.io import (
    PLAN_FILE,
    Checkpoint,
    TensorInfo,
    check_output,
    open_checkpoint,
    write_config,
    write_state_dict_file,
)
from compressor.io.destination import form_of, not_copied_from, shard_limit, staged_output, target_of
from compressor.lowrank import (
    METADATA_KEY,
    dense_aliases,
    dense_config,
    dense_infos,
    dense_tensors,
    file_record,
    stored_pairs,
    write_weights,
)
from compressor.model import Factory
from compressor.model.opened import known_architecture, text_mapping
from compressor.network import architecture_mismatch, in_natural_order
from compressor.progress import Progress
from compressor.report.model_card import restore_card
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
    target = target_of(checkpoint, output, suffix="-restored", torch_files=True)
    planned = {name: info for name, (info, _) in dense_infos(checkpoint, pairs).items()}
    if factory is not None:
        _require_fit(checkpoint, planned, factory)
    recorded = text_mapping(file_record(checkpoint).get("aliases"))
    in_safetensors = checkpoint.folder is not None or target.suffix == ".safetensors"
    # Names that the metadata note as tied are stored in no safetensors file: its loader has them from the module.
    noted = checkpoint.metadata if in_safetensors else {}
    aliases = {
        alias: name
        for alias, name in (dense_aliases(checkpoint, pairs) | recorded).items()
        if name in planned and alias not in {*planned, *noted}
    }
    infos = [*planned.values(), *(replace(planned[name], name=alias) for alias, name in aliases.items())]
    check_output(
        target,
        source=checkpoint,
        form=form_of(checkpoint),
        overwrite=overwrite,
        needed_bytes=sum(info.nbytes for info in infos),
    )
    shard_size = as_size(max_shard_size, "max_shard_size")
    copies: dict[str, list[str]] = {}
    for alias, name in aliases.items():
        copies.setdefault(name, []).append(alias)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for done, (name, tensor) in enumerate(dense_tensors(checkpoint, pairs), start=1):
            yield name, tensor
            for alias in copies.get(name, ()):
                yield alias, tensor
            if progress:
                progress("restore", done, len(planned))

    metadata = {key: text for key, text in checkpoint.metadata.items() if key != METADATA_KEY}
    with staged_output(target, checkpoint, overwrite) as staged:
        if in_safetensors:
            shards = shard_limit(checkpoint, shard_size)
            write_weights(staged, infos, tensors(), {"format": "pt"} | metadata, shards)
        else:
            write_state_dict_file(staged, dict(tensors()))
        if checkpoint.folder is not None:
            write_config(staged, dense_config(checkpoint.config or {}))
            (staged / PLAN_FILE).unlink(missing_ok=True)
            restore_card(staged)
        after_bytes = open_checkpoint(staged).weight_bytes
    return Restoration(
        source=str(model),
        output=str(target),
        layers=tuple(in_natural_order(pairs)),
        bytes=BeforeAfter(checkpoint.weight_bytes, after_bytes),
        seconds=time.monotonic() - started,
        not_copied=not_copied_from(checkpoint),
    )


def _require_fit(checkpoint: Checkpoint, planned: dict[str, TensorInfo], factory: Factory) -> None:
    """Raise `BadInput` where the dense tensors are not those of the model that the user's code builds."""
    architecture = known_architecture(checkpoint, factory)
    mismatch = (
        None if architecture is None else architecture_mismatch(replace(checkpoint, tensors=planned), architecture)
    )
    if mismatch is not None:
        raise BadInput(
            f"the model that `factory` builds does not fit: {mismatch}",
            where=checkpoint.source,
            remedy="use the function that builds the model that was compressed",
        )
