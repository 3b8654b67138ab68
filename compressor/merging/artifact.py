"""The merged network as it is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from compressor.io import CARD_FILE, OPTIONS_FILE, PLAN_FILE, Artifact, portable_config
from compressor.io.artifact import Document
from compressor.lowrank import MERGE_KEY, LowRankSpec, join
from compressor.merging.combination import Combination
from compressor.merging.parts import Part, common_ties
from compressor.network import layer_name, transformers_architecture
from compressor.progress import Progress
from compressor.version import VERSION

# What goes along and tells how one model alone was trained or compressed.
_OF_ONE_PART = (CARD_FILE, OPTIONS_FILE, PLAN_FILE)


def merged_artifact(combination: Combination, shard_size: int, progress: Progress | None) -> Artifact:
    """The merged network, with what goes along from the folder of the first one."""
    infos, spec, first = combination.infos(), combination.spec, combination.parts[0].checkpoint

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for done, (name, tensor) in enumerate(combination.tensors(), start=1):
            yield name, tensor
            if progress:
                progress("merge", done, len(infos))

    def documents() -> dict[str, Document]:
        config = _with_names_of_modules(spec, combination.parts[0]).described(first.config or {})
        return {"config.json": portable_config(config)} if config else {}

    return Artifact(
        form=first.form,
        infos=infos,
        tensors=tensors,
        metadata=_metadata(combination, spec),
        shard_size=shard_size if first.folder is not None else None,
        companions_of=first,
        left_out=_OF_ONE_PART,
        documents=documents,
    )


def _with_names_of_modules(spec: LowRankSpec, part: Part) -> LowRankSpec:
    """The low-rank layers by their names in the model that transformers builds."""
    folder = part.checkpoint.folder
    architecture = None if folder is None or not spec.layers else transformers_architecture(folder)

    def in_model(layer: str) -> str:
        tensor = join(layer, "weight")
        return layer_name((architecture and architecture.module_name(tensor)) or tensor)

    return spec.renamed(in_model)


def _metadata(combination: Combination, spec: LowRankSpec) -> dict[str, str]:
    """What the merged file says of itself: what it was made from, and which of its layers are pairs."""
    made_from = [_described(part) for part in combination.networks]
    mode = "sum" if combination.chain is None else "concat"
    record: dict[str, Any] = {"mode": mode, "parts": made_from, "version": VERSION}
    if combination.chain is not None:
        record["head"] = combination.head
    if combination.base is not None:
        record["base"] = _described(combination.base)
    metadata = {"format": "pt", MERGE_KEY: json.dumps(record, sort_keys=True)}
    if combination.parts[0].checkpoint.folder is None:  # in a folder the configuration says what is tied
        metadata = common_ties(combination.parts) | metadata
    return metadata | (spec.to_metadata({"aliases": {}}) if spec.layers else {})


def _described(part: Part) -> dict[str, str]:
    assert part.checkpoint.source is not None
    return {"source": part.checkpoint.source.name, "digest": part.checkpoint.digest()}
