"""Checkpoints that others quantized, and what is left of them in ours: decoded when they are opened.

Layers that a plan leaves alone keep their stored tensors, byte for byte, and the specification keeps the
`quantization_config` that says how they are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from compressor.documents import parse_json
from compressor.encodings import decoded, encoded_in
from compressor.errors import BadInput
from compressor.io import Checkpoint
from compressor.lowrank.spec import METADATA_KEY, LowRankSpec
from compressor.lowrank.stored_pairs import file_record


def said_of_source(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The `quantization_config` of others by which a checkpoint, or what is left alone in it, is stored; {} without."""
    said = (checkpoint.config or {}).get("quantization_config")
    if isinstance(said, Mapping) and said.get("quant_method") != METADATA_KEY:
        return said
    for record in (said if isinstance(said, Mapping) else {}, file_record(checkpoint)):
        source = record.get("source_quantization")
        if isinstance(source, Mapping):
            return source
    return {}


def decoded_checkpoint(checkpoint: Checkpoint, *, packed: bool = False) -> Checkpoint:
    """The checkpoint with dense tensors where others quantized them; nothing is read yet.

    Layers that we compressed stay as they are. So do the packed integers of compressed-tensors where they may be
    `packed`: they are a form of ours too.

    Raises:
        BadInput: stored tensors do not fit together.
    """
    left = own_layers(checkpoint.metadata)
    return decoded(checkpoint, said_of_source(checkpoint), left=left, packed=packed)


def own_layers(metadata: Mapping[str, str]) -> frozenset[str]:
    """The layers that we compressed, as the metadata of a file say."""
    with suppress(BadInput):
        record = parse_json(metadata.get(METADATA_KEY, "{}"), where="metadata")
        layers = record.get("layers") if isinstance(record, dict) else None
        return frozenset(map(str, layers)) if isinstance(layers, dict) else frozenset()
    return frozenset()


def source_left(checkpoint: Checkpoint, names: list[str]) -> Mapping[str, Any] | None:
    """How a source's tensors are stored of which some stay as they are; None where none is."""
    if any(encoded_in(checkpoint, name) is not None for name in names):
        return said_of_source(checkpoint)
    return None


def without_source(spec: LowRankSpec) -> LowRankSpec:
    """The same layers of a model whose other layers are dense."""
    return LowRankSpec(spec.layers, spec.initial, spec.dense, stacks=spec.stacks, batched=spec.batched)
