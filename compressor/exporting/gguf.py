"""GGUF of a transformers folder, for llama.cpp: every tensor as exactly as a type of ggml holds it."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor.errors import BadInput, CompressorError
from compressor.exporting.gguf_architectures import GgufModel, gguf_model
from compressor.exporting.gguf_tokenizer import write_tokenizer
from compressor.io import Artifact
from compressor.lowrank import dense_infos, dense_weight
from compressor.model import Model

if TYPE_CHECKING:
    from gguf import GGUFReader

_PLAIN_TYPES: Mapping[torch.dtype, str] = {torch.float16: "F16", torch.bfloat16: "BF16"}
# What `convert_hf_to_gguf.py` leaves out too: it is computed from the settings.
_COMPUTED = ("rotary_emb.inv_freq", ".masked_bias")


def require_gguf() -> None:
    """Raise `BadInput` where the library that writes GGUF is not installed."""
    try:
        importlib.import_module("gguf")
    except ImportError as error:
        remedy = "pip install 'compressor[gguf]'"
        raise BadInput("writing GGUF needs gguf, which is not installed", remedy=remedy) from error


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file: its name, shape, and type there, and the name of what it is read from."""

    name: str
    shape: tuple[int, ...]
    type: str
    source: str


@dataclass(frozen=True)
class GgufFile:
    """What is written into a GGUF file of a model."""

    model: Model
    described: GgufModel
    tensors: tuple[GgufTensor, ...]

    @property
    def types(self) -> dict[str, int]:
        """How many tensors there are of each type."""
        return dict(Counter(each.type for each in self.tensors))

    def values(self, tensor: GgufTensor) -> Tensor:
        """The values that it stands for, as the model has them."""
        extra = self.described.extra_tensors()
        if tensor.name in extra:
            return extra[tensor.name]
        return self.described.values(tensor.source, _read(self.model, tensor.source))


def _read(model: Model, name: str) -> Tensor:
    """A tensor of the dense model."""
    copied_from = dense_infos(model.checkpoint, model.pairs)[name][1]
    if copied_from is not None:
        return model.checkpoint.read(copied_from)
    return dense_weight(model.checkpoint, model.pairs[name.removesuffix(".weight")])


def gguf_file(model: Model) -> GgufFile:
    """What is written of a model; `BadInput` for one that llama.cpp does not have, or has otherwise."""
    checkpoint = model.checkpoint
    if checkpoint.folder is None or checkpoint.config is None:
        raise BadInput(
            "is no transformers folder, which GGUF is written of",
            where=checkpoint.source,
            remedy="give the folder that 'compress FOLDER' wrote",
        )
    described = gguf_model(checkpoint.config, checkpoint.source)
    names = _names(described)
    found = []
    for name, (info, _) in dense_infos(checkpoint, model.pairs).items():
        if name.endswith(_COMPUTED) or (name == "lm_head.weight" and described.config.tie_word_embeddings):
            continue
        if (there := names.get_name(name, (".weight", ".bias"))) is None:
            what = f"has {name}, which llama.cpp's {described.architecture.name} has not"
            raise BadInput(what, where=checkpoint.source, remedy="export it with `to='dense'`")
        single = len(info.shape) == 1 or name.endswith("norm.weight")
        kind = "F32" if single else _PLAIN_TYPES.get(info.dtype, "F32")
        found.append(GgufTensor(there, info.shape, kind, name))
    extra = [GgufTensor(name, tuple(each.shape), "F32", name) for name, each in described.extra_tensors().items()]
    return GgufFile(model, described, (*found, *extra))


def _names(described: GgufModel) -> Any:
    """What maps the names of transformers to those of llama.cpp."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    [architecture] = [key for key, name in MODEL_ARCH_NAMES.items() if name == described.architecture.name]
    return get_tensor_name_map(architecture, described.config.num_hidden_layers)


def gguf_artifact(file: GgufFile) -> Artifact:
    """The GGUF file of a model, which is compared with the model once it is written."""
    return Artifact("file", infos=(), tensors=lambda: iter(()), metadata={}, write=partial(_write, file))


def _write(file: GgufFile, path: Path) -> None:
    from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter

    folder = file.model.checkpoint.folder
    assert folder is not None
    writer = GGUFWriter(path, file.described.architecture.name)
    writer.add_type("model")
    writer.add_name(Path(file.model.checkpoint.name).name)
    file.described.write_settings(writer)
    writer.add_file_type(_file_type(file))
    writer.add_quantization_version(GGML_QUANT_VERSION)
    write_tokenizer(writer, folder, size=file.described.config.vocab_size)
    for tensor in file.tensors:
        kind = GGMLQuantizationType[tensor.type]
        shape = _byte_shape(tensor)
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=kind)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in file.tensors:
            writer.write_tensor_data(_bytes(file, tensor))
    finally:
        writer.close()


def _byte_shape(tensor: GgufTensor) -> tuple[int, ...]:
    """Its shape with bytes for the numbers of a row."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[tensor.type]]
    return (*tensor.shape[:-1], tensor.shape[-1] // block * size)


def _file_type(file: GgufFile) -> int:
    """The type that most of the numbers have, as llama.cpp names files by."""
    from gguf import LlamaFileType

    numbers: Counter[str] = Counter()
    for tensor in file.tensors:
        numbers[tensor.type] += int(np.prod(tensor.shape))
    [(most, _)] = numbers.most_common(1)
    return int(LlamaFileType.ALL_F32 if most == "F32" else LlamaFileType[f"MOSTLY_{most}"])


def _bytes(file: GgufFile, tensor: GgufTensor) -> NDArray[np.uint8]:
    values = file.values(tensor)
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(tensor.type, torch.float32)
    found: NDArray[np.uint8] = values.to(dtype).contiguous().view(torch.uint8).numpy()
    return found.reshape(_byte_shape(tensor))


def require_equal(file: GgufFile, path: Path) -> None:
    """Read a GGUF file back with the library's own reader, and compare every tensor with the model's.

    Raises `CompressorError` where one is missing or has other values.
    """
    from gguf import GGUFReader

    read = dict(_read_back(GGUFReader(path)))
    if missing := {each.name for each in file.tensors} ^ set(read):
        raise CompressorError(f"{path}: read back, it has other tensors: {', '.join(sorted(missing))}")
    for tensor in file.tensors:
        expected = file.values(tensor).float().numpy()
        if not np.array_equal(read[tensor.name].reshape(expected.shape), expected):
            raise CompressorError(f"{path}: read back, {tensor.name} has other values")


def _read_back(reader: GGUFReader) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """The tensors of a file as llama.cpp takes them."""
    from gguf.quants import dequantize

    for tensor in reader.tensors:
        yield tensor.name, dequantize(tensor.data, tensor.tensor_type)
