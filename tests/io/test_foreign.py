"""Files of other formats are refused by the name of their format, with what makes weights of them."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from sklearn.linear_model import LogisticRegression

from compressor import BadInput
from compressor.io import open_checkpoint
from compressor.io.foreign import refuse_foreign


def numpy_archive() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, weight=np.zeros((3, 3)))
    return stream.getvalue()


def keras() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("model.weights.h5", b"\x89HDF\r\n\x1a\n")
    return stream.getvalue()


def tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.safetensors"))
    return stream.getvalue()


def onnx_model() -> bytes:
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "graph", [], [])
    content: bytes = onnx.helper.make_model(graph, producer_name="pytorch").SerializeToString()
    return content


def llama2c(shared: bool = True) -> bytes:
    """As `legacy_export` of llama2.c writes it: seven numbers, the weights, and what rotates."""
    dim, hidden, layers, heads, groups, vocabulary, length = 8, 16, 2, 2, 1, 10, 4
    per_layer = dim + dim * dim + 2 * dim * (groups * dim // heads) + dim * dim + dim + 3 * dim * hidden
    numbers = vocabulary * dim + layers * per_layer + dim + 2 * length * (dim // heads // 2)
    numbers += 0 if shared else vocabulary * dim
    head = struct.pack("<7i", dim, hidden, layers, heads, groups, vocabulary if shared else -vocabulary, length)
    return head + bytes(4 * numbers)


FORMATS: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "gguf": (lambda: b"GGUF\x03\0\0\0" + bytes(64), "a GGUF file", "gguf_file=NAME"),
    "ggml": (lambda: struct.pack("<I", 0x67676D6C) + bytes(64), "a GGML file", "converted from"),
    "onnx": (onnx_model, "an ONNX model", "onnx2torch"),
    "hdf5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(64), "an HDF5 file", "h5py"),
    "keras": (keras, "a Keras model", "Keras"),
    "ctranslate2": (lambda: struct.pack("<IH", 6, 16) + b"TransformerSpec\0" + bytes(64), "a CTranslate2 model", "ct2"),
    "llama2.c": (llama2c, "a llama2.c model", r"ckpt\.pt"),
    "llama2.c untied": (lambda: llama2c(shared=False), "a llama2.c model", r"ckpt\.pt"),
    "llama2.c, new": (lambda: struct.pack("<I", 0x616B3432) + bytes(300), "a llama2.c model", r"ckpt\.pt"),
    "tflite": (lambda: b"\x1c\0\0\0TFL3" + bytes(64), "a TensorFlow Lite model", "converted from"),
    "msgpack": (lambda: b"\x81\xa6params\x82\xa5dense\x80" + bytes(64), "a msgpack file", r"safetensors\.flax"),
    "sklearn": (lambda: pickle.dumps(LogisticRegression()), "a pickled model of scikit-learn", "matrices by name"),
    "npy": (lambda: b"\x93NUMPY\x01\0" + bytes(64), "a NumPy array", r"safetensors\.numpy"),
    "npz": (numpy_archive, "a NumPy archive", r"safetensors\.numpy"),
    "gzip": (lambda: gzip.compress(b"x" * 99), "a compressed file", "unpack it"),
    "tar": (tar, "a tar archive", "unpack it"),
}


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model"])
@pytest.mark.parametrize("case", FORMATS)
def test_the_format_is_named_with_what_converts_it(tmp_path: Path, case: str, name: str) -> None:
    make, what, remedy = FORMATS[case]
    (tmp_path / name).write_bytes(make())
    with pytest.raises(BadInput, match=rf"is {what}.*, which is not supported; .*{remedy}"):
        open_checkpoint(tmp_path / name)


@pytest.mark.parametrize("name", ["model.gguf", "model.onnx", "saved_model.pb"])
def test_a_folder_that_holds_nothing_else_is_refused_by_its_format(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / name).write_bytes(FORMATS[name.rpartition(".")[2]][0]() if name != "saved_model.pb" else b"\x08\x01")
    with pytest.raises(BadInput, match=r"is an? (GGUF|ONNX|TensorFlow).*which is not supported"):
        open_checkpoint(tmp_path)


@given(st.dictionaries(st.text(min_size=1, max_size=9), st.integers(0, 40), max_size=4))
def test_weights_are_never_taken_for_another_format(
    tmp_path_factory: pytest.TempPathFactory, sizes: dict[str, int]
) -> None:
    tensors = {name: torch.zeros(size) for name, size in sizes.items() if name.isprintable()}
    path = tmp_path_factory.mktemp("weights") / "m.pt"
    for content in (save(tensors), _saved(tensors, zipped=True), _saved(tensors, zipped=False)):
        path.write_bytes(content)
        refuse_foreign(path, content[:512])


def _saved(tensors: dict[str, torch.Tensor], *, zipped: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(tensors, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()
