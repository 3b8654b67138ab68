"""What the stored tensors of a checkpoint stand for: eight-bit floats and integers with scales, read as numbers."""

from __future__ import annotations

from compressor.encodings.decoding import (
    decoded,
    encoded_in,
    encoded_names,
    encoded_tensors,
    model_dtype,
)
from compressor.encodings.encoded import Decoder, EncodedTensor, Part, StoredTensors
from compressor.encodings.gguf import gguf_checkpoint, is_gguf, is_of_gguf, read_checkpoint, words_of_gguf

__all__ = [
    "Decoder",
    "EncodedTensor",
    "Part",
    "StoredTensors",
    "decoded",
    "encoded_in",
    "encoded_names",
    "encoded_tensors",
    "gguf_checkpoint",
    "is_gguf",
    "is_of_gguf",
    "model_dtype",
    "read_checkpoint",
    "words_of_gguf",
]
