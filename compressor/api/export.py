"""One compressed model into the format of one target; the only place that knows all of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Unpack, get_args

import torch

from compressor.api.adapters import export_adapter, opened_adapter
from compressor.api.fine_tune import finish_adapter
from compressor.api.initial import require_use
from compressor.api.keywords import ExportKeywords
from compressor.api.option import verb
from compressor.api.options import ExportOptions, RestoreOptions
from compressor.api.restore import restore
from compressor.api.write import written
from compressor.choices import AdapterDialect, ExportTarget
from compressor.errors import BadInput
from compressor.exporting.gguf import gguf_artifact, gguf_file, require_equal, require_gguf
from compressor.exporting.onnx import largest_difference, onnx_artifact, require_onnx, traced_inputs
from compressor.exporting.remote import remote_artifact, remote_configuration
from compressor.fine_tuning import adapter_of_file, is_difference
from compressor.fine_tuning.adapter import adapter_artifact
from compressor.io import (
    Checkpoint,
    Naming,
    NotCopied,
    checked_target,
)
from compressor.lowrank import StoredErrors
from compressor.model import Model, ModelLike, on_device, open_model, open_runnable
from compressor.report.model_card import remote_card
from compressor.results import BeforeAfter, Export
from compressor.torch_state import CPU, neutral_torch_state


@neutral_torch_state()
@verb(ExportOptions)
def export(model: ModelLike, options: ExportOptions | None = None, **given: Unpack[ExportKeywords]) -> Export:
    """Write a compressed model, a folder or a file, in the form in which something else runs it.

    `dense` multiplies the pairs back, as `restore` does. `hf-remote` is a folder with the code of its low-rank layers,
    for transformers with `trust_remote_code=True`. `onnx` is a file for any batch size and sequence length, computed in
    float32; weights without a transformers folder need the `factory` of their architecture and, where its first layer
    does not tell, the `input_shape` of one example. `gguf` is a file for llama.cpp, of a transformers folder of an
    architecture that it has; its tensors are dense. A file of what a fine-tune adds to its `base` becomes the `dense`
    fine-tune, or a `lora` adapter folder for PEFT. A LoRA adapter is written in the names of `peft`, of `kohya`'s
    scripts, or of `diffusers`.

    Args:
        model: A compressed weight file or folder, or a module with low-rank layers, which wants an `output`.
        options: The options as an object; keywords take precedence.

    Returns:
        What was written, and how it is loaded.

    Raises:
        BadInput: a model that cannot be exported so, or an output that cannot be written.

    Example:
        >>> compressor.export("small/", to="onnx", output="small.onnx")
    """
    started = time.monotonic()
    asked = ExportOptions.of(options, given)
    if (adapter := opened_adapter(model)) is not None:
        return export_adapter(adapter, asked)
    opened = open_runnable(model, asked.factory if asked.to == "onnx" else None, initial=asked.initial)
    require_use(asked, opened)
    _require_base(opened.checkpoint, asked.to, asked.base)
    _require_use(asked)
    if asked.to == "dense":
        exported = _to_dense(model, asked)
    elif asked.to == "lora":
        exported = _to_adapter(opened, asked)
    elif asked.to == "hf-remote":
        exported = _to_remote(opened, asked)
    elif asked.to == "gguf":
        exported = _to_gguf(opened, asked)
    else:
        exported = _to_onnx(opened, asked)
    return Export(
        source=opened.name,
        output=str(exported.path),
        to=asked.to,
        layers=len(opened.pairs) + len(opened.formed) + len(opened.decoded),
        bytes=BeforeAfter(opened.checkpoint.weight_bytes, exported.bytes),
        difference=exported.difference,
        load=exported.load,
        seconds=time.monotonic() - started,
        not_copied=exported.not_copied,
        tensor_types=exported.tensor_types,
    )


@dataclass(frozen=True)
class _Exported:
    """What was written where, and how it is loaded."""

    path: Path
    bytes: int
    load: str
    difference: float | None = None
    not_copied: tuple[NotCopied, ...] = ()
    tensor_types: Mapping[str, int] | None = None


def _require_base(checkpoint: Checkpoint, to: ExportTarget, base: str | Path | None) -> None:
    """Differences go with their base to dense and lora, and nothing else does."""
    where = checkpoint.source
    if to in get_args(AdapterDialect):
        remedy = "give an adapter, or make one of a fine-tune with 'compress MODEL --base ORIGINAL -o FOLDER'"
        raise BadInput("is no LoRA adapter", where=where, option="to", remedy=remedy)
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


def _require_use(asked: ExportOptions) -> None:
    """Refuse what was asked for and would change nothing."""
    if asked.factory is not None and (asked.to in ("hf-remote", "gguf", "lora") or asked.base is not None):
        what, remedy = f"`to={asked.to!r}` takes the architecture from the folder", "leave out `factory`"
        raise BadInput(what, option="factory", remedy=remedy)
    if asked.input_shape is not None and asked.to != "onnx":
        raise BadInput(f"`to={asked.to!r}` runs nothing", option="input_shape", remedy="leave out `input_shape`")


def _to_dense(model: ModelLike, asked: ExportOptions) -> _Exported:
    """Restore the model, or with its base the fine-tune."""
    of_restore = {name: value for name, value in asked.as_given().items() if name != "to"}
    restored = restore(model, RestoreOptions(**of_restore))
    path, size = Path(restored.output), restored.bytes.after
    load = "as the original model" if asked.base is None else "as the base model"
    return _Exported(path, size, load=load, not_copied=restored.not_copied)


def _to_adapter(model: Model, asked: ExportOptions) -> _Exported:
    """Write a folder that PEFT loads beside the base."""
    assert asked.base is not None
    base = open_model(asked.base)
    named, others = Naming("folder", "-adapter"), [base.checkpoint]
    target = checked_target(model.checkpoint, asked.output, named, overwrite=asked.overwrite, others=others)
    adapter, errors = adapter_of_file(model.checkpoint, base), StoredErrors()
    with written(adapter_artifact(adapter, torch.device("cpu"), errors), target) as made:
        finish_adapter(made, adapter, name=target.name, errors=errors.of)
    load = f"peft.PeftModel.from_pretrained(base, {str(target.path)!r})"
    return _Exported(target.path, made.bytes, load)


def _to_remote(model: Model, asked: ExportOptions) -> _Exported:
    """Write a folder that transformers loads with the code in it."""
    config = remote_configuration(model.checkpoint)
    auto = next((name for name in config["auto_map"] if name != "AutoConfig"), "AutoModel")
    target = checked_target(model.checkpoint, asked.output, Naming("folder", "-remote"), overwrite=asked.overwrite)
    with written(remote_artifact(model.checkpoint, config, asked.max_shard_size), target) as made:
        made.write_card(partial(remote_card, auto_class=auto, name=target.name))
    load = f"transformers.{auto}.from_pretrained({str(target.path)!r}, trust_remote_code=True)"
    return _Exported(target.path, made.bytes, load, not_copied=made.not_copied)


def _to_onnx(model: Model, asked: ExportOptions) -> _Exported:
    """Write a file, once onnxruntime has been seen to compute with it what torch does."""
    require_onnx()
    named = Naming("file", "", (".onnx",))
    target = checked_target(model.checkpoint, asked.output, named, overwrite=asked.overwrite)
    module, inputs = model.module, traced_inputs(model, asked.input_shape)
    with on_device(CPU, module), written(onnx_artifact(module, inputs), target) as made:
        assert isinstance(made.model, Path)
        difference = largest_difference(module, inputs, made.model)
    load = f"onnxruntime.InferenceSession({str(target.path)!r})"
    return _Exported(target.path, made.bytes, load, difference)


def _to_gguf(model: Model, asked: ExportOptions) -> _Exported:
    """Write a file, once it was read back and every tensor in it is the model's."""
    require_gguf()
    file = gguf_file(model)
    target = checked_target(model.checkpoint, asked.output, Naming("file", "", (".gguf",)), overwrite=asked.overwrite)
    with written(gguf_artifact(file), target) as made:
        assert isinstance(made.model, Path)
        require_equal(file, made.model)
    return _Exported(target.path, made.bytes, f"llama-cli -m {target.path}", tensor_types=file.types)
