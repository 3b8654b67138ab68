"""GGUF, of llama.cpp: a file as the transformers folder that it was made of, dequantized a tensor at a time.

The configuration and the tokenizer are those that transformers makes of its metadata; names, the order of the rows of
queries and keys, and norms are turned back here.
"""

from __future__ import annotations

import atexit
import json
import logging
import shutil
import tempfile
from collections.abc import Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.encodings.gguf_architectures import ARCHITECTURES, GgufArchitecture
from compressor.errors import BadInput
from compressor.formatting import format_shape
from compressor.io import Checkpoint, RemoteModel, StoredTensor, TensorInfo, open_checkpoint
from compressor.io.files import read_bytes_at, regular_file_size
from compressor.io.tensors import TensorOnDisk
from compressor.network.architecture import transformers_module

logger = logging.getLogger(__name__)

_MAGIC = b"GGUF"
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What llama.cpp computes from, and transformers has in its configuration.
_BESIDE = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_REMEDY = "download it again, or give the model that it was converted from"


@dataclass(frozen=True, eq=False)
class GgufTensor:
    """A tensor of a GGUF file, as transformers has it: in its order of rows, and rounded once to its dtype."""

    stored: TensorOnDisk
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    heads: int | None = None
    less_one: bool = False

    @property
    def region(self) -> Hashable:
        return self.stored.region

    def read(self) -> Tensor:
        """Its values, in memory of their own."""
        values = self.stored.read()
        if self.kind not in _PLAIN:
            import gguf

            blocks = gguf.quants.dequantize(values.numpy(), gguf.GGMLQuantizationType[self.kind])
            values = torch.from_numpy(np.ascontiguousarray(blocks, dtype=np.float32))
        values = values.to(torch.float32).reshape(self.shape)
        if self.heads is not None:
            # Pairs of neighbors in a head come apart: the first of each into the first half, the second into the other.
            apart = values.reshape(self.heads, self.shape[0] // self.heads // 2, 2, *self.shape[1:])
            values = apart.swapaxes(1, 2).reshape(self.shape)
        return (values - 1.0 if self.less_one else values).to(self.dtype).contiguous()


def is_gguf(model: object) -> bool:
    """Whether this is the path of a GGUF file."""
    if not isinstance(model, str | Path) or not Path(model).is_file():
        return False
    return regular_file_size(Path(model)) > len(_MAGIC) and bytes(read_bytes_at(Path(model), 0, 4)) == _MAGIC


def read_checkpoint(model: str | Path | nn.Module | RemoteModel) -> Checkpoint:
    """What `open_checkpoint` opens, and a GGUF file."""
    return gguf_checkpoint(model) if isinstance(model, str | Path) and is_gguf(model) else open_checkpoint(model)


def is_of_gguf(checkpoint: Checkpoint) -> bool:
    """Whether the tensors of a checkpoint are those of a GGUF file."""
    return any(isinstance(checkpoint.stored(name), GgufTensor) for name in checkpoint.tensors)


def words_of_gguf(checkpoint: Checkpoint, name: str) -> str | None:
    """How a GGUF file stores a tensor, in words; None for a tensor of another file."""
    stored = checkpoint.stored(name)
    return f"GGUF {stored.kind}" if isinstance(stored, GgufTensor) else None


def gguf_checkpoint(path: str | Path) -> Checkpoint:
    """The transformers folder that a GGUF file was made of; no tensor is read yet.

    Its configuration and tokenizer are in a folder that is removed when the process ends.

    Raises:
        BadInput: the library is not installed, the file is damaged, or of an architecture or type that is not read.
    """
    state = Path(path).stat()
    try:
        return _opened(Path(path), Path(path).resolve(), (state.st_size, state.st_mtime_ns))
    except BadInput as error:
        raise error.in_file(path) from error


@cache
def _opened(path: Path, file: Path, _version: tuple[int, int]) -> Checkpoint:
    reader = _reader(file)
    _require_possible_blocks(reader)
    folder = Path(tempfile.mkdtemp(prefix="compressor-gguf-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    there = {each.name: each for each in reader.tensors}
    dtype = _dtype({each.tensor_type.name for each in reader.tensors})
    config, architecture = _described(reader, file, folder, dtype=dtype)
    names = _names(config, folder, architecture)
    stored: dict[str, StoredTensor] = {}
    for name, shape in names.items():
        own = there.pop(_named(name, config, architecture), None)
        if own is not None:
            stored[name] = _tensor(own, name, shape, file=file, dtype=dtype, model=(config, architecture))
    left = [name for name in there if name not in _BESIDE]
    missing = [name for name in names if name not in stored]
    if left or (missing and not (missing == ["lm_head.weight"] and config["tie_word_embeddings"])):
        what = f"has {left[0][:80]}, which its architecture has not" if left else f"lacks {missing[0][:80]}"
        raise BadInput(what, remedy=_REMEDY)
    tensors = {name: TensorInfo(name, each.shape, each.dtype) for name, each in stored.items()}
    return Checkpoint(path, "folder", (file,), folder, tensors, {}, {}, config, stored)


def _reader(file: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        remedy = "pip install 'compressor[gguf]'"
        raise BadInput("reading GGUF needs gguf, which is not installed", remedy=remedy) from error
    try:
        return gguf.GGUFReader(file)
    except Exception as error:  # whatever the header makes the library raise, in words about its own arrays
        said = bytes(read_bytes_at(file, 4, 4)) if regular_file_size(file) >= 8 else b""
        version = min(int.from_bytes(said, "little"), int.from_bytes(said, "big"))
        if 0 < version < 100 and version not in gguf.gguf_reader.READER_SUPPORTED_VERSIONS:
            what, remedy = f"is a GGUF file of version {version}, which is not read", "convert its model again"
            raise BadInput(what, remedy=remedy) from error
        raise BadInput("is a GGUF file that is truncated or damaged", remedy=_REMEDY) from error


def _require_possible_blocks(reader: Any) -> None:
    """Refuse metadata of more blocks than there are tensors, before a configuration lists them all."""
    for name, field in reader.fields.items():
        blocks = field.contents() if name.endswith(".block_count") else 0
        if type(blocks) is not int or blocks > len(reader.tensors):
            what = f"has {str(blocks)[:40]} blocks by its metadata, and {len(reader.tensors):,} tensors"
            raise BadInput(what, remedy=_REMEDY)


def _dtype(types: set[str]) -> torch.dtype:
    """What its tensors are read in: the widest that it has of halves, and bfloat16 where it has integers."""
    if types == {"F32"}:
        return torch.float32
    return torch.float16 if types <= {"F32", "F16"} else torch.bfloat16


def _described(reader: Any, file: Path, folder: Path, *, dtype: torch.dtype) -> tuple[dict[str, Any], GgufArchitecture]:
    """The configuration, which is written to the folder with the tokenizer, and what llama.cpp does otherwise."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except Exception as error:  # whatever the metadata make transformers raise
        raise _undescribed(reader) from error
    named = str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, config.model_type))
    if (architecture := ARCHITECTURES.get(named)) is None:
        known = ", ".join(each.removesuffix("ForCausalLM") for each in ARCHITECTURES)
        remedy = "give the model that it was converted from"
        raise BadInput(f"is of {named[:40]}; GGUF is read of {known}", remedy=remedy)
    try:
        _complete(config, reader, architecture)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise _undescribed(reader) from error
    config.architectures, config.dtype = [named], dtype
    config.save_pretrained(folder)
    with suppress(Exception):  # a file need not have a tokenizer that transformers knows
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False
        )
        tokenizer.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text(encoding="utf-8")), architecture


def _undescribed(reader: Any) -> BadInput:
    """What refuses metadata that describe no model."""
    field = reader.get_field("general.architecture")
    named = "" if field is None else str(field.contents())
    if named in {each.name for each in ARCHITECTURES.values()}:
        return BadInput(f"is a GGUF file that is damaged: its metadata describe no {named}", remedy=_REMEDY)
    what = f"is of {named[:40] or 'no name'}, an architecture that is not read"
    return BadInput(what, remedy="give the model that it was converted from")


def _complete(config: Any, reader: Any, architecture: GgufArchitecture) -> None:
    """Set what the metadata say and transformers leaves at its defaults."""

    def said(key: str) -> Any:
        field = reader.get_field(f"{architecture.name}.{key}")
        return None if field is None else field.contents()

    size = said("attention.key_length") or config.hidden_size // config.num_attention_heads
    if hasattr(config, "head_dim"):
        config.head_dim = size
    if architecture.sliding:
        # As llama.cpp has it, which tells the largest models by their blocks.
        largest = {"gemma2": 46, "gemma3": 62}.get(architecture.name) == config.num_hidden_layers
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if largest else size
        config.sliding_window = said("attention.sliding_window") or config.sliding_window
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if (value := said(key)) is not None:
            setattr(config, key, value)
    parameters = getattr(config, "rope_parameters", None) or {}
    for kind, key in (("full_attention", "rope.freq_base"), ("sliding_attention", "rope.freq_base_swa")):
        if isinstance(parameters.get(kind), dict) and (base := said(key)) is not None:
            parameters[kind]["rope_theta"] = base


def _names(config: Mapping[str, Any], folder: Path, architecture: GgufArchitecture) -> dict[str, tuple[int, ...]]:
    """The tensors of the model that a configuration describes, with their shapes."""
    model = transformers_module(folder)
    if model is None:
        what = f"transformers cannot build the {architecture.name} that its metadata describe"
        raise BadInput(what, remedy=_REMEDY)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _named(name: str, config: Mapping[str, Any], architecture: GgufArchitecture) -> str:
    """What llama.cpp calls a tensor; empty where it has none."""
    return _map(architecture.name, int(config["num_hidden_layers"])).get_name(name, (".weight", ".bias")) or ""


@cache
def _map(architecture: str, layers: int) -> Any:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    [known] = [key for key, name in MODEL_ARCH_NAMES.items() if name == architecture]
    return get_tensor_name_map(known, layers)


def _tensor(
    own: Any,
    name: str,
    shape: tuple[int, ...],
    *,
    file: Path,
    dtype: torch.dtype,
    model: tuple[Mapping[str, Any], GgufArchitecture],
) -> GgufTensor:
    import gguf

    config, architecture = model
    there = tuple(int(side) for side in reversed(own.shape.tolist()))
    kind = own.tensor_type.name
    if there != shape:
        what = f"{own.name} is {format_shape(there)}, and {format_shape(shape)} by its metadata"
        raise BadInput(what, remedy=_REMEDY)
    sides, stored_in = there, _PLAIN.get(kind)
    if stored_in is None:
        if own.tensor_type not in gguf.quants._type_traits:
            what = f"{own.name} is stored as {kind}, which is not read"
            raise BadInput(what, remedy="give the model that it was converted from")
        numbers, size = gguf.GGML_QUANT_SIZES[own.tensor_type]
        sides, stored_in = (*there[:-1], there[-1] // numbers * size), torch.uint8
    strides = tuple(int(np.prod(sides[place + 1 :])) for place in range(len(sides)))
    placed = TensorOnDisk(file, int(own.data_offset), sides, strides, stored_in)
    if placed.offset + placed.span * stored_in.itemsize > regular_file_size(file):
        raise BadInput(f"is truncated: {own.name} ends after it", remedy=_REMEDY)
    layer = name.rpartition(".")[0]
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    permuted = heads.get(layer.rpartition(".")[2]) if architecture.permuted else None
    less_one = architecture.norms_less_one and name.endswith("norm.weight")
    return GgufTensor(placed, kind, shape, dtype, permuted, less_one)
