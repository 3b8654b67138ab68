"""One compressed model into the format of one target; the only place that knows all of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from compressor.api.fine_tune import write_adapter
from compressor.api.restore import restore
from compressor.documents import read_text
from compressor.errors import BadInput
from compressor.exporting.onnx import example_inputs, require_onnx, write_onnx
from compressor.exporting.remote import remote_configuration, write_remote
from compressor.fine_tuning import adapter_of_file, is_difference, materialize_fine_tune
from compressor.io import (
    ADAPTER_CONFIG,
    Checkpoint,
    check_output,
    local_model,
    open_checkpoint,
    parse_size,
    staged_file,
)
from compressor.io.destination import form_of, not_copied_from, shard_limit, staged_output, target_of
from compressor.lowrank import stored_pairs, write_weights
from compressor.measure import image_size
from compressor.model import Factory, load_model, require_architecture
from compressor.model.opened import folder_of
from compressor.progress import Progress
from compressor.report.fine_tune_card import applied_card
from compressor.report.model_card import CARD_FILE, describe_remote
from compressor.results import BeforeAfter, Export, Target
from compressor.torch_state import neutral_torch_state

logger = logging.getLogger(__name__)


@neutral_torch_state()
def export(
    model: str | Path,
    *,
    to: Target,
    output: str | Path | None = None,
    base: str | Path | None = None,
    factory: Factory | None = None,
    input_shape: Sequence[int] | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Export:
    """Write a compressed model, a folder or a file, in the form in which something else runs it.

    `dense` multiplies the pairs back, as `restore` does. `hf-remote` is a folder with the code of its low-rank layers,
    for transformers with `trust_remote_code=True`. `onnx` is a file for any batch size and sequence length, computed in
    float32; weights without a transformers folder need the `factory` of their architecture and, unless it begins with
    a linear layer, the `input_shape` of one example. A file of what a fine-tune adds to its `base` becomes the `dense`
    fine-tune, or a `lora` adapter folder for PEFT.

    Raises `BadInput` for a model that cannot be exported so, or an output that cannot be written.
    """
    if to not in get_args(Target):
        raise BadInput(f"there is no export to {to!r}", remedy=f"choose one of {', '.join(get_args(Target))}")
    started = time.monotonic()
    checkpoint = open_checkpoint(model)
    base = None if base is None else local_model(base)
    layers = len(stored_pairs(checkpoint))
    _require_base(checkpoint, to, base)
    _require_use(to, base, factory, input_shape)
    shard_size = parse_size(max_shard_size) if isinstance(max_shard_size, str) else max_shard_size
    if to == "dense" and base is None:
        restored = restore(
            model,
            output=output,
            factory=factory,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            progress=progress,
        )
        return Export(
            source=restored.source,
            output=restored.output,
            to=to,
            layers=len(restored.layers),
            bytes=restored.bytes,
            difference=None,
            load="as the original model",
            seconds=restored.seconds,
            not_copied=restored.not_copied,
        )
    difference = None
    if to == "hf-remote":
        place, load = _to_remote(checkpoint, output, shard_size, overwrite=overwrite)
    elif base is not None and to == "dense":
        place, load = _applied(checkpoint, base, output, shard_size, overwrite=overwrite), "as the base model"
    elif base is not None:
        place = _to_adapter(checkpoint, base, output, overwrite=overwrite)
        load = f"peft.PeftModel.from_pretrained(base, {str(place)!r})"
    else:
        place, difference = _to_onnx(checkpoint, output, factory, input_shape, overwrite=overwrite)
        load = f"onnxruntime.InferenceSession({str(place)!r})"
    size = place.stat().st_size if place.is_file() else open_checkpoint(place).weight_bytes
    return Export(
        source=str(model),
        output=str(place),
        to=to,
        layers=layers,
        bytes=BeforeAfter(checkpoint.weight_bytes, size),
        difference=difference,
        load=load,
        seconds=time.monotonic() - started,
        not_copied=not_copied_from(checkpoint) if to == "hf-remote" else (),
    )


def _require_base(checkpoint: Checkpoint, to: Target, base: str | Path | None) -> None:
    """Differences go with their base to dense and lora, and nothing else does."""
    where = checkpoint.source
    if checkpoint.folder is not None and (checkpoint.folder / ADAPTER_CONFIG).is_file():
        raise BadInput(
            "is a LoRA adapter already",
            where=where,
            remedy="peft makes it dense: PeftModel.from_pretrained(base, adapter).merge_and_unload()",
        )
    if is_difference(checkpoint):
        if to not in ("dense", "lora"):
            what = f"holds what a fine-tune adds to its base, which `to='{to}'` cannot take"
            raise BadInput(what, where=where, remedy="export it with `to='dense'` first")
        if base is None:
            remedy = "name the base with `base=ORIGINAL`"
            raise BadInput("holds what a fine-tune adds to its base", where=where, remedy=remedy)
    elif base is not None or to == "lora":
        raise BadInput(
            "holds no difference to a base model",
            where=where,
            remedy="make a LoRA adapter of a fine-tune with 'compress MODEL --base ORIGINAL -o FOLDER'"
            if to == "lora"
            else "leave out `base`",
        )


def _require_use(
    to: Target, base: str | Path | None, factory: Factory | None, input_shape: Sequence[int] | None
) -> None:
    """Refuse what was asked for and would change nothing."""
    if factory is not None and (to in ("hf-remote", "lora") or base is not None):
        raise BadInput(f"`{to=}` takes the architecture from the folder", remedy="leave out `factory`")
    if input_shape is not None and to != "onnx":
        raise BadInput(f"`{to=}` runs nothing", remedy="leave out `input_shape`")


def _applied(
    checkpoint: Checkpoint, base: str | Path, output: str | Path | None, shard_size: int, *, overwrite: bool
) -> Path:
    """Write the dense fine-tune: a folder where the base is one."""
    assert checkpoint.source is not None
    tuned, _, start = materialize_fine_tune(checkpoint.source, base)
    named = output or checkpoint.source.with_name(
        checkpoint.source.stem + ("-dense" if start.folder is not None else "-dense.safetensors")
    )
    target = target_of(start, named)
    infos = list(tuned.tensors.values())
    for source in (checkpoint, start):
        needed = sum(info.nbytes for info in infos)
        check_output(target, source=source, form=form_of(start), overwrite=overwrite, needed_bytes=needed)
    tensors = ((name, tuned.read(name)) for name in tuned.tensors)
    with staged_output(target, start, overwrite) as staged:
        write_weights(staged, infos, tensors, {"format": "pt"}, shard_limit(start, shard_size))
        if start.folder is not None:
            _describe_applied(staged, target.name, start, checkpoint)
    return target


def _describe_applied(folder: Path, name: str, base: Checkpoint, difference: Checkpoint) -> None:
    """A card in place of the base's, which is of other weights."""
    card = folder / CARD_FILE
    original = read_text(card) if card.is_file() else ""
    text = applied_card(name=name, base=base.name, difference=difference.name, config=base.config, original=original)
    card.write_text(text, encoding="utf-8", errors="backslashreplace")


def _to_adapter(checkpoint: Checkpoint, base: str | Path, output: str | Path | None, *, overwrite: bool) -> Path:
    assert checkpoint.source is not None
    target = Path(output or checkpoint.source.with_name(checkpoint.source.stem + "-adapter"))
    for source in (checkpoint, open_checkpoint(base)):
        check_output(target, source=source, form="folder", overwrite=overwrite)
    adapter = adapter_of_file(checkpoint.source, base)
    write_adapter(target, adapter, torch.device("cpu"), lambda name, error: None, overwrite=overwrite)
    return target


def _to_remote(
    checkpoint: Checkpoint, output: str | Path | None, shard_size: int, *, overwrite: bool
) -> tuple[Path, str]:
    config = remote_configuration(checkpoint)
    auto = next((name for name in config["auto_map"] if name != "AutoConfig"), "AutoModel")
    target = target_of(checkpoint, output, suffix="-remote")
    needed = checkpoint.weight_bytes
    check_output(target, source=checkpoint, form="folder", overwrite=overwrite, needed_bytes=needed)
    with staged_output(target, checkpoint, overwrite) as staged:
        write_remote(staged, checkpoint, config, shard_size)
        describe_remote(staged, auto_class=auto, name=target.name)
    return target, f"transformers.{auto}.from_pretrained({str(target)!r}, trust_remote_code=True)"


def _to_onnx(
    checkpoint: Checkpoint,
    output: str | Path | None,
    factory: Factory | None,
    input_shape: Sequence[int] | None,
    *,
    overwrite: bool,
) -> tuple[Path, float]:
    require_onnx()
    assert checkpoint.source is not None
    target = Path(output) if output is not None else _onnx_target(checkpoint)
    if target.suffix != ".onnx":
        raise BadInput("an ONNX model is one file", where=target, remedy="name it with .onnx")
    check_output(target, source=checkpoint, form="file", overwrite=overwrite)
    require_architecture(checkpoint, factory)
    module = load_model(checkpoint.source, factory)
    config = getattr(module, "config", None)
    size = None if config is None else image_size(config, folder_of(checkpoint))
    inputs = example_inputs(module, size, input_shape)
    with staged_file(target, overwrite=overwrite) as staged:
        difference = write_onnx(module, inputs, staged)
    return target, difference


def _onnx_target(checkpoint: Checkpoint) -> Path:
    """Beside a folder under all of its name, which may have dots, and beside a file under its stem."""
    place = target_of(checkpoint, None, suffix="")
    stem = place.stem if place.suffix == ".safetensors" and checkpoint.folder is None else place.name
    return place.with_name(f"{stem}.onnx")
