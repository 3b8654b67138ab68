"""The safetensors format: an 8-byte length, a JSON header, then the tensors without gaps.

Source: https://github.com/huggingface/safetensors, section "Format" of its README. The header is read and
checked here rather than by the library, because the library before 0.8 reads through a memory map only.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from compressor.documents import bounded_json
from compressor.errors import BadInput, CompressorError
from compressor.io.files import AnyFile, read_bytes_at, regular_file_size
from compressor.io.tensors import TensorInfo, TensorOnDisk, require_short_names

_LENGTH_BYTES = 8
_HEADER_LIMIT = 100_000_000  # as the official library
_DIMENSIONS_LIMIT = 64  # of torch


def _dtypes() -> dict[str, torch.dtype]:
    # In the official library's order: it lays tensors out from the last of these dtypes to the first, so that
    # each is aligned. Dtypes that the installed torch does not have are left out.
    names = {
        "BOOL": "bool",
        "U8": "uint8",
        "I8": "int8",
        "F8_E5M2": "float8_e5m2",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E8M0": "float8_e8m0fnu",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "I16": "int16",
        "U16": "uint16",
        "F16": "float16",
        "BF16": "bfloat16",
        "I32": "int32",
        "U32": "uint32",
        "F32": "float32",
        "C64": "complex64",
        "F64": "float64",
        "I64": "int64",
        "U64": "uint64",
    }
    return {name: getattr(torch, attribute) for name, attribute in names.items() if hasattr(torch, attribute)}


DTYPES: Mapping[str, torch.dtype] = _dtypes()
"""Name of a dtype in a safetensors header -> torch dtype, in order of alignment."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


def looks_like_safetensors(head: bytes) -> bool:
    """Whether a file that starts with these bytes (9 suffice) can be a safetensors file."""
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    return length <= _HEADER_LIMIT and head[_LENGTH_BYTES : _LENGTH_BYTES + 1] == b"{"


def read_safetensors(path: AnyFile) -> tuple[dict[str, TensorOnDisk], dict[str, str]]:
    """Tensors (in the header's order) and metadata of a safetensors file, from its header alone.

    Everything that the format promises is checked: offsets inside the file, no overlap, no hole, sizes that
    match shape and dtype, no name twice.

    Raises:
        BadInput: the file is truncated or the header breaks one of these promises.
    """
    file_size = regular_file_size(path)
    if file_size < _LENGTH_BYTES:
        raise _truncated(path, f"has {file_size} bytes, fewer than a safetensors header")
    length = int.from_bytes(read_bytes_at(path, 0, _LENGTH_BYTES), "little")
    if length > _HEADER_LIMIT:
        raise _malformed(path, f"a header of {length} bytes")
    data_start = _LENGTH_BYTES + length
    if data_start > file_size:
        raise _truncated(path, f"has {file_size} bytes, but its header alone needs {data_start}")
    header = _parse_header(path, read_bytes_at(path, _LENGTH_BYTES, length))
    metadata = _checked_metadata(path, header.pop("__metadata__", {}))
    tensors: dict[str, TensorOnDisk] = {}
    intervals: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        dtype, shape, begin, end = _checked_entry(path, name, entry)
        if data_start + end > file_size:
            raise _truncated(path, f"has {file_size} bytes, but tensor {name!r} ends at {data_start + end}")
        tensors[name] = TensorOnDisk(path, data_start + begin, shape, _row_major_strides(shape), dtype)
        intervals.append((begin, end, name))
    covered = 0
    for begin, end, name in sorted(intervals):
        if begin != covered:
            raise _malformed(path, f"tensor {name!r} starts at {begin}, the one before it ends at {covered}")
        covered = end
    if data_start + covered != file_size:
        raise _malformed(path, f"{file_size - data_start - covered} bytes at the end that no tensor covers")
    return tensors, metadata


def layout(infos: Sequence[TensorInfo], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """How a file of these tensors begins, where each tensor goes, and how long the file is.

    Byte for byte the layout of the official library (dtypes by descending alignment, then names), with the
    metadata keys sorted, so that the same tensors always give the same file.

    Returns:
        The length field and header; the offset of each tensor in bytes from the start of the file; the size
        of the whole file in bytes.

    Raises:
        CompressorError: a name occurs twice or is reserved, or the format does not know a dtype.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    begins: dict[str, int] = {}
    position = 0
    for info in infos:
        if info.dtype not in _NAMES:
            raise CompressorError(f"safetensors cannot hold {info.dtype} (tensor {info.name!r})")
    for info in sorted(infos, key=lambda info: (-_RANKS[info.dtype], info.name.encode())):
        if info.name in begins or info.name == "__metadata__":
            raise CompressorError(f"a safetensors file cannot hold a second tensor named {info.name!r}")
        header[info.name] = {
            "dtype": _NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [position, position + info.nbytes],
        }
        begins[info.name] = position
        position += info.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = _LENGTH_BYTES + len(text)
    prefix = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    return prefix, {name: start + begin for name, begin in begins.items()}, start + position


def _parse_header(path: AnyFile, text: bytes) -> dict[str, Any]:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        document = dict(pairs)
        if len(document) != len(pairs):
            raise ValueError("a name occurs twice")
        return document

    try:
        header = bounded_json(text.decode("utf-8"), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _malformed(path, str(error)[:200]) from None
    if not isinstance(header, dict):
        raise _malformed(path, "not a JSON object")
    require_short_names(header, path)
    if not all(_is_text(name) for name in header):
        raise _malformed(path, "a tensor name that is not Unicode text")
    return header


def _checked_metadata(path: AnyFile, metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(map(_is_text, itertools.chain(*metadata.items()))):
        raise _malformed(path, "metadata that is not text by name")
    return metadata


def _checked_entry(path: AnyFile, name: str, entry: object) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    def fail(why: str) -> BadInput:
        return _malformed(path, f"tensor {name!r} {why}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise fail("is not described by dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_counts(shape) or len(shape) > _DIMENSIONS_LIMIT:
        raise fail("has no valid shape")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fail("has no valid data_offsets")
    # Beside a zero, sizes are not bounded by the file; torch still multiplies them into strides.
    if math.prod(size for size in shape if size) >= 2**60:
        raise fail("has an impossible shape")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        dtype_name = str(entry["dtype"])[:40]
        what = f"tensor {name!r} has the dtype {dtype_name!r}, which is not supported"
        raise BadInput(what, where=str(path), remedy="convert it to one of " + ", ".join(DTYPES))
    dtype = DTYPES[entry["dtype"]]
    needed = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != needed:
        raise fail(f"has {offsets[1] - offsets[0]} bytes where its shape and dtype need {needed}")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _is_text(value: object) -> bool:
    # JSON can spell half a surrogate pair, which is no character and could not be written again.
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**60 for value in values)


def _row_major_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    products = itertools.accumulate((max(size, 1) for size in reversed(shape[1:])), int.__mul__, initial=1)
    return tuple(reversed(list(products))) if shape else ()


def _malformed(path: AnyFile, why: str) -> BadInput:
    remedy = "download or export the file again"
    return BadInput(f"is not a valid safetensors file: {why}", where=str(path), remedy=remedy)


def _truncated(path: AnyFile, why: str) -> BadInput:
    return BadInput(f"is truncated, for it {why}", where=str(path), remedy="download or copy the file again")
