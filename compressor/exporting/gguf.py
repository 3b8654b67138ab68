"""GGUF of a transformers folder, for llama.cpp: every tensor as exactly as a type of ggml holds it."""

from __future__ import annotations

import importlib
import logging
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
from compressor.exporting.gguf_blocks import BLOCK, BLOCK_TYPES, BlockType, block_type_of
from compressor.exporting.gguf_tokenizer import write_tokenizer
from compressor.forms import DENSE, FORMS, pair_name, quantization_of
from compressor.io import Artifact, Checkpoint
from compressor.lowrank import StoredPair, dense_infos, dense_weight
from compressor.lowrank.stored_pairs import join
from compressor.model import Model
from compressor.quantize import QuantizedMatrix

if TYPE_CHECKING:
    from gguf import GGUFReader

logger = logging.getLogger(__name__)

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
    """A tensor of a GGUF file: its name, shape, and type there, and the name of what it is read from.

    `quantized` is the layer whose integers it holds, where it does.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    source: str
    quantized: StoredPair | None = None


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
        values = self.described.values(tensor.source, self._read(tensor))
        return values.to(torch.float16) if tensor.type == "F16" else values

    def _read(self, tensor: GgufTensor) -> Tensor:
        checkpoint, pairs = self.model.checkpoint, self.model.pairs
        if tensor.quantized is not None:
            return quantized_matrix(checkpoint, tensor.quantized).product(torch.float32)
        copied_from = dense_infos(checkpoint, pairs)[tensor.source][1]
        if copied_from is not None:
            return checkpoint.read(copied_from)
        return dense_weight(checkpoint, pairs[tensor.source.removesuffix(".weight")])


def quantized_matrix(checkpoint: Checkpoint, pair: StoredPair) -> QuantizedMatrix:
    """The integers and scales of a layer that is quantized, and nothing else."""
    tensors = {name: checkpoint.read(join(pair.name, name)) for name in FORMS[pair.form].names_at(0)}
    quantization = quantization_of(pair.form)
    assert quantization is not None
    return QuantizedMatrix.of_tensors(quantization, tensors)


def block_type(matrix: QuantizedMatrix) -> BlockType | None:
    """The smallest type of ggml that holds the same integers and scales; None where none does."""
    bits, groups = matrix.quantization.bits, matrix.scales.shape[1]
    if (matrix.shape[1] // groups) % BLOCK or not torch.equal(matrix.scales.half().float(), matrix.scales.float()):
        return None
    if matrix.zero_points is None:
        return block_type_of(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return block_type_of(1 - 2**bits, 2**bits - 1)


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
    found, rounded = [], list[str]()
    for name, (info, _) in dense_infos(checkpoint, model.pairs).items():
        if name.endswith(_COMPUTED) or (name == "lm_head.weight" and described.config.tie_word_embeddings):
            continue
        if (there := names.get_name(name, (".weight", ".bias"))) is None:
            what = f"has {name}, which llama.cpp's {described.architecture.name} has not"
            raise BadInput(what, where=checkpoint.source, remedy="export it with `to='dense'`")
        pair = model.pairs.get(name.removesuffix(".weight"))
        if pair is not None and pair_name(pair.form) == DENSE and pair.rank == 0:
            blocks = block_type(quantized_matrix(checkpoint, pair))
            found.append(GgufTensor(there, info.shape, "F16" if blocks is None else blocks.name, name, pair))
            rounded += [] if blocks is not None else [pair.name]
            continue
        single = len(info.shape) == 1 or name.endswith("norm.weight")
        kind = "F32" if single else _PLAIN_TYPES.get(info.dtype, "F32")
        found.append(GgufTensor(there, info.shape, kind, name))
    if rounded:
        logger.warning(
            "%d quantized layers, such as %s, are rounded to F16, 16 bits a number: no type of ggml has their groups or"
            " scales; groups of a multiple of 32 inputs stay integers",
            len(rounded),
            rounded[0],
        )
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
    blocks = {each.name: each for each in BLOCK_TYPES}.get(tensor.type)
    if blocks is not None:
        return _blocks(file, tensor, blocks)
    values = file.values(tensor)
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(tensor.type, torch.float32)
    found: NDArray[np.uint8] = values.to(dtype).contiguous().view(torch.uint8).numpy()
    return found.reshape(_byte_shape(tensor))


def _blocks(file: GgufFile, tensor: GgufTensor, blocks: BlockType) -> NDArray[np.uint8]:
    """The integers of a quantized layer, with the scale of each group repeated for the blocks that are in it."""
    assert tensor.quantized is not None
    matrix = quantized_matrix(file.model.checkpoint, tensor.quantized)
    rows, columns = matrix.shape
    zeros = 2 ** (matrix.quantization.bits - 1) if matrix.zero_points is None else matrix.zero_points.short()
    groups = matrix.integers.short().reshape(*matrix.scales.shape, -1)
    integers = (groups - (zeros if isinstance(zeros, int) else zeros.unsqueeze(2))).reshape(rows, columns)
    scales = matrix.scales.half().repeat_interleave(columns // BLOCK // matrix.scales.shape[1], dim=1)
    integers, scales = (file.described.permuted(tensor.source, each) for each in (integers, scales))
    return blocks.packed(integers.numpy(), scales.numpy())


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
