"""Files of other formats, recognized by their first bytes: each with its name and a way to convert it."""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path

from compressor.errors import BadInput
from compressor.io.files import read_bytes_at

HEAD = 512

_ORIGINAL = "give the PyTorch weights that it was converted from"
_GGUF = (
    "give the file itself where a model is asked for, or load it with transformers, from_pretrained(folder,"
    " gguf_file=NAME), and save_pretrained it"
)
_UNPACK = "unpack it, and give what is in it"
_BY_NAME = "save its arrays by name with safetensors.numpy.save_file"

_FORMATS: Sequence[tuple[re.Pattern[bytes], str, str]] = [
    (re.compile(pattern, re.DOTALL), what, remedy)
    for pattern, what, remedy in (
        (rb"GGUF", "a GGUF file, of llama.cpp", _GGUF),
        (rb"lmgg|fmgg|tjgg|algg", "a GGML file, of whisper.cpp or an old llama.cpp", _ORIGINAL),
        (rb"24ka", "a llama2.c model", "give the ckpt.pt that export.py of llama2.c made it from"),
        (rb"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes", f"read it with h5py, and {_BY_NAME}"),
        (rb"....TFL3", "a TensorFlow Lite model", _ORIGINAL),
        (rb"....ET\d\d", "an ExecuTorch program", _ORIGINAL),
        (rb"[\x01-\x40]\0\0\0[\x04-\x7f]\0\w+\0", "a CTranslate2 model", "give the model that ct2 converted it from"),
        (rb"\x93NUMPY", "a NumPy array", _BY_NAME),
        (
            rb"(?:[\x81-\x8f]|\xde..|\xdf....)(?:[\xa1-\xbf]|\xd9.)[\w./-]+",
            "a msgpack file, as Flax writes",
            "read it with flax.serialization.msgpack_restore, and save it with safetensors.flax.save_file",
        ),
        (
            rb"\x08[\x01-\x20][\x12\x1a\x22\x2a\x32\x3a\x42]",
            "an ONNX model",
            "give the PyTorch weights that it was exported from, or make a module of it with onnx2torch",
        ),
        (
            rb"\x80[\x02-\x05].*(?:sklearn|xgboost|lightgbm|catboost)",
            "a pickled model of scikit-learn or the like",
            "it contains no network; save its matrices by name as safetensors to factorize them",
        ),
        (rb"\x1f\x8b|\x28\xb5\x2f\xfd|\xfd7zXZ|BZh|7z\xbc\xaf", "a compressed file", _UNPACK),
        (rb".{257}ustar", "a tar archive", _UNPACK),
        (rb"PAR1", "a Parquet file", "give the weights of a model"),
    )
]


def refuse_foreign(path: Path, head: bytes) -> None:
    """Refuse a file of a known format that is not supported, and name it.

    Args:
        path: The file.
        head: Its first `HEAD` bytes.

    Raises:
        BadInput: the file is of such a format.
    """
    found = next(((what, remedy) for pattern, what, remedy in _FORMATS if pattern.match(head)), None)
    if found is None and head.startswith(b"PK\x03\x04"):
        found = _archive(path)
    if found is None and _is_llama2c(head, path.stat().st_size):
        found = ("a llama2.c model", "give the ckpt.pt that export.py of llama2.c made it from")
    if found is not None:
        raise BadInput(f"is {found[0]}, which is not supported", where=path, remedy=found[1])


def refuse_foreign_in(folder: Path, names: Sequence[str]) -> None:
    """Refuse a folder without weights if one of its files is a model of another format, and name it."""
    for name in names:
        if name == "saved_model.pb":
            raise BadInput("is a TensorFlow SavedModel, which is not supported", where=folder, remedy=_ORIGINAL)
        path = folder / name
        if path.is_file() and path.suffix not in (".json", ".txt", ".md", ".py"):
            refuse_foreign(path, read_bytes_at(path, 0, min(HEAD, path.stat().st_size)))


def _archive(path: Path) -> tuple[str, str] | None:
    """The kind of a zip file that is not a torch checkpoint."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return None
    if any(name.endswith("data.pkl") for name in names):
        return None
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive", _BY_NAME
    if "model.weights.h5" in names:
        return "a Keras model", f"load it with Keras, and {_BY_NAME}"
    return None


def _is_llama2c(head: bytes, size: int) -> bool:
    """Whether a file begins with the seven numbers of llama2.c's first format, and is as long as they say.

    https://github.com/karpathy/llama2.c, `legacy_export` in export.py.
    """
    if len(head) < 28:
        return False
    dim, hidden, layers, heads, groups, vocabulary, length = struct.unpack("<7i", head[:28])
    if min(dim, hidden, layers, heads, groups, length) < 1 or dim % heads or vocabulary == 0:
        return False
    side = dim // heads
    block = 2 * dim + 2 * dim * dim + 2 * dim * groups * side + 3 * dim * hidden
    numbers = abs(vocabulary) * dim * (2 if vocabulary < 0 else 1) + layers * block + dim + length * (side // 2) * 2
    return bool(size == 28 + 4 * numbers)
