"""The artifacts of a compressed model, and of the dense model restored from one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.documents import text_mapping
from compressor.engine import Run
from compressor.errors import CompressorError
from compressor.io import (
    OPTIONS_FILE,
    PLAN_FILE,
    Artifact,
    Checkpoint,
    open_checkpoint,
    portable_config,
    write_state_dict_file,
)
from compressor.io.artifact import Document
from compressor.lowrank.initial_layer import formed_checkpoint, formed_weight, start_matrix
from compressor.lowrank.product_tensor import product_in
from compressor.lowrank.rewriting import (
    Rewriting,
    rewritten_factors,
    rewritten_infos,
    rewritten_module,
    rewritten_tensors,
)
from compressor.lowrank.spec import METADATA_KEY, LowRankSpec
from compressor.lowrank.stacked import put_together_infos, stacks_of
from compressor.lowrank.stored_pairs import StoredPair, file_record
from compressor.lowrank.tensor_format import dense_aliases, dense_infos, dense_tensors, pair_infos
from compressor.progress import Progress
from compressor.torch_state import in_float64

# Relative difference of a layer that is read back: initial weights are drawn alike up to the rounding of float32.
READ_BACK = 1e-5


@dataclass(frozen=True)
class StoredErrors:
    """The relative error of what is stored for each layer, noted as the layers are factorized.

    `progress` is called with how many of the `layers` are.
    """

    layers: int = 0
    progress: Progress | None = None
    of: dict[str, float] = field(default_factory=dict)

    def __call__(self, name: str, error: float) -> None:
        self.of[name] = error
        if self.progress:
            self.progress("factorize", len(self.of), self.layers)


def compressed_artifact(
    rewriting: Rewriting,
    shard_size: int,
    *,
    run: Run | None = None,
    errors: StoredErrors | None = None,
    module: nn.Module | None = None,
) -> Artifact:
    """The compressed model of a plan.

    The weights are factorized as `run` says, and `errors` are noted meanwhile; they are in the plan that is written. A
    compressed module is built where the dense one is given.
    """
    checkpoint, plan = rewriting.checkpoint, rewriting.plan
    how, errors = run or Run(torch.device("cpu")), errors or StoredErrors()

    def documents() -> dict[str, Document]:
        stored = plan.with_errors(errors.of).portable()
        described: dict[str, Document] = {PLAN_FILE: stored.to_dict() | {"recipe": rewriting.recipe.to_dict()}}
        if checkpoint.config is not None:
            config = rewriting.spec_of_modules.described(checkpoint.config)
            described["config.json"] = portable_config(config)
        if rewriting.provenance is not None:
            described[OPTIONS_FILE] = rewriting.provenance.document()
        return described

    return Artifact(
        form=checkpoint.form,
        infos=rewritten_infos(rewriting),
        tensors=partial(rewritten_tensors, rewriting, how, errors),
        metadata=file_metadata(rewriting),
        shard_size=shard_size if checkpoint.form == "folder" else None,
        companions_of=checkpoint,
        documents=documents,
        module=None if module is None else partial(rewritten_module, rewriting, module, how, done=errors),
    )


def with_factors(rewriting: Rewriting, run: Run) -> Rewriting:
    """The same with all factors computed, for a model that is made twice: in memory, and in a file."""
    return replace(rewriting, factors={layer.name: found for layer, _, found in rewritten_factors(rewriting, run)})


def require_read_back(path: Path, rewriting: Rewriting) -> None:
    """Read the layers that are stored as what training wrote back from a model, and compare them with those measured.

    Raises `CompressorError` where the initial weights that its record leads to make other layers of them.
    """
    layers = [(layer, plan) for layer, plan in rewriting.factorized if plan.share is not None]
    if not layers:
        return
    stored = open_checkpoint(path)
    dense = formed_checkpoint(stored, rewriting.initial)
    for layer, plan in layers:
        start = start_matrix(layer, plan.share, rewriting.initial)
        assert start is not None
        known, dtype = rewriting.factors.get(layer.name), rewriting.info(layer.tensor).dtype
        names = [info.name for info in pair_infos(layer, plan, dtype, bias=None)]
        factors = {name: stored.read(name) for name in names} if known is None else known.tensors
        expected = in_float64(formed_weight(layer, plan, factors, start=start.cpu(), dtype=dtype))
        difference = torch.linalg.vector_norm(in_float64(dense.read(layer.tensor)) - expected)
        if not difference <= max(READ_BACK, torch.finfo(dtype).eps) * torch.linalg.vector_norm(expected):
            raise CompressorError(f"{path}: read back, {layer.name} is not the layer that was measured")


def file_metadata(rewriting: Rewriting) -> dict[str, str]:
    """The metadata of a compressed safetensors file: how it was made, and what is needed to restore it."""
    checkpoint, plan = rewriting.checkpoint, rewriting.plan
    record: dict[str, Any] = {
        "source": checkpoint.name if checkpoint.source is not None else plan.source,
        "digest": plan.digest,
        "budget": plan.budget.to_dict(),
        "recipe": rewriting.recipe.known(),
        "aliases": dict(checkpoint.aliases),
    }
    if made_from := _made_from(checkpoint):
        record["made_from"] = made_from
    if rewriting.provenance is not None and checkpoint.form == "file":  # a folder has a file of them
        record["options"] = dict(rewriting.provenance.options)
    kept = {key: text for key, text in checkpoint.metadata.items() if key != METADATA_KEY}
    return {"format": "pt"} | kept | rewriting.spec.to_metadata(record)


def _made_from(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """What a checkpoint that is compressed already was made of, the first first; none of a dense one."""
    if not any(product_in(checkpoint, name) for name in checkpoint.tensors):
        return []
    earlier = file_record(checkpoint)
    before = earlier.get("made_from")
    own = {key: earlier[key] for key in ("source", "digest", "budget", "version") if key in earlier}
    return [*(before if isinstance(before, list) else ()), own]


def restored_artifact(
    checkpoint: Checkpoint,
    pairs: Mapping[str, StoredPair],
    shard_size: int,
    *,
    torch_file: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """The dense model that a compressed checkpoint with these pairs stands for; a file as torch writes it, if asked."""
    stacks = stacks_of(checkpoint)
    parts = {name: info for name, (info, _) in dense_infos(checkpoint, pairs).items()}
    planned = put_together_infos(checkpoint, parts, stacks)
    # Names that the metadata note as tied are stored in no safetensors file: its loader has them from the module.
    noted = {} if torch_file else checkpoint.metadata
    recorded = dense_aliases(checkpoint, pairs) | text_mapping(file_record(checkpoint).get("aliases"))
    tied = {alias: name for alias, name in recorded.items() if name in planned and alias not in {*planned, *noted}}
    copies: dict[str, list[str]] = {}
    for alias, name in tied.items():
        copies.setdefault(name, []).append(alias)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for done, (name, tensor) in enumerate(dense_tensors(checkpoint, pairs, stacks), start=1):
            yield name, tensor
            for alias in copies.get(name, ()):
                yield alias, tensor
            if progress:
                progress("restore", done, len(planned))

    def documents() -> dict[str, Document]:
        return {"config.json": portable_config(LowRankSpec({}).described(checkpoint.config or {}))}

    return Artifact(
        form=checkpoint.form,
        infos=[*planned.values(), *(replace(planned[name], name=alias) for alias, name in tied.items())],
        tensors=tensors,
        metadata={"format": "pt"} | {key: text for key, text in checkpoint.metadata.items() if key != METADATA_KEY},
        shard_size=shard_size if checkpoint.folder is not None else None,
        companions_of=checkpoint,
        left_out=(OPTIONS_FILE, PLAN_FILE),
        documents=documents,
        write=(lambda path: write_state_dict_file(path, dict(tensors()))) if torch_file else None,
    )
