"""Files of pairs read back: the fine-tune that they and their base make, one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compressor.errors import BadInput
from compressor.fine_tuning.adaptation import Adaptation
from compressor.fine_tuning.adapter import UNCHANGED, Adapter, adaptable_layers, adapter_of, require_pairs
from compressor.fine_tuning.difference import Difference
from compressor.forms import quantization_of
from compressor.io import Artifact, Checkpoint, TensorInfo, portable_config, require_in_range
from compressor.io.tensors import StoredTensor
from compressor.lowrank import LowRankSpec, StoredPair, file_record, multiplied, spec_of, stored_pairs
from compressor.lowrank.stacked import put_together, put_together_infos
from compressor.lowrank.stored_pairs import damaged
from compressor.model import Model
from compressor.network import find_layers
from compressor.planning import Budget, LayerPlan, Plan
from compressor.recipe import TrainingRecipe

_REMEDY = "give the model that `base` named when the difference was made"


def is_difference(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is a file of pairs for what was added to a base."""
    return "base" in file_record(checkpoint)


@dataclass(frozen=True, eq=False)
class _Materialized:
    """`share * base + up @ down` of one matrix, in the dtype of the fine-tune."""

    stored: Checkpoint
    pair: StoredPair
    base: Checkpoint
    share: float
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.pair.tensor_shape

    @property
    def region(self) -> Hashable:
        return self

    def read(self) -> Tensor:
        start = self.base.read(self.pair.tensors["weight"]).to(torch.float64).mul_(self.share)
        total = start.add_(multiplied(self.stored, self.pair)).to(self.dtype)
        return require_in_range(self.pair.tensors["weight"], total)


def materialize_fine_tune(stored: Checkpoint, base: Model) -> Checkpoint:
    """The dense fine-tune of a base and a file of pairs.

    Raises `BadInput` when the file is no difference, or of another base.
    """
    start = base.with_ties().checkpoint
    if not is_difference(stored):
        raise BadInput("holds no difference to a base model", where=stored.source, remedy="leave out `base`")
    digest, spec = _base_digest(stored), spec_of(stored)
    if digest is not None and digest != start.digest():
        raise BadInput(f"is not the base of {stored.source}", where=start.source, remedy=_REMEDY)
    tensors: dict[str, StoredTensor] = {name: start._stored[name] for name in start.tensors}
    pairs = stored_pairs(stored)
    # A bias that changed is stored in full.
    of_pairs = {name for pair in pairs.values() for role, name in pair.tensors.items() if role != "bias"}
    # A tied tensor may have another of its names in the base.
    own = {name: start.aliases.get(name, name) for name in stored.tensors if name not in of_pairs}
    tensors |= {own[name]: stored._stored[name] for name in own}
    for pair in pairs.values():
        dtype = _dtype(stored, pair)
        tensors[pair.tensors["weight"]] = _Materialized(stored, pair, start, _share(spec, pair.name), dtype)
    infos = {name: TensorInfo(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    for name, info in infos.items():
        whole = name in own.values()
        if name not in start.tensors or not _fits(info, start.tensors[name], extended=whole):
            raise BadInput(f"has no tensor {name} of that shape", where=start.source, remedy=_REMEDY)
    return replace(start, tensors=infos, _stored=tensors)


def _fits(info: TensorInfo, base: TensorInfo, *, extended: bool) -> bool:
    """Whether a tensor has the shape that it has in the base; what is stored in full may have rows of added tokens."""
    longer = extended and bool(info.shape) and bool(base.shape) and info.shape[0] > base.shape[0]
    return info.shape == base.shape or (longer and info.shape[1:] == base.shape[1:])


def opened_fine_tune(stored: Checkpoint, base: Model) -> Model:
    """The fine-tune of a base and a file of pairs, which is that of a base that nothing else uses.

    Raises `BadInput` as `materialize_fine_tune` does.
    """
    tuned, start = materialize_fine_tune(stored, base), base.with_ties().checkpoint
    changed = [name for name in tuned.tensors if tuned._stored[name] is not start._stored[name]]
    return base.with_tensors(replace(tuned, files=(*start.files, *stored.files)), stored.name, changed)


def applied_artifact(tuned: Checkpoint, base: Checkpoint, shard_size: int) -> Artifact:
    """The dense fine-tune that `materialize_fine_tune` gives, with what goes along from the folder of its base.

    Where tokens were added the configuration counts them; the tokenizer is that of the base, which lacks them.
    """
    counts, held = _tokens(tuned, base), {stack.tensor: stack for stack in tuned.stacks}
    # What is written is dense, however the base is stored.
    config = {key: value for key, value in (base.config or {}).items() if key != "quantization_config"}
    changes = base.config is not None and (bool(counts) or config != base.config)
    infos = put_together_infos(tuned, tuned.tensors, tuned.stacks)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, info in infos.items():
            yield name, put_together(held[name], info, tuned.read) if name in held else tuned.read(name)

    return Artifact(
        form=base.form,
        infos=list(infos.values()),
        tensors=tensors,
        metadata={"format": "pt"},
        shard_size=shard_size if base.folder is not None else None,
        companions_of=base,
        documents=lambda: {"config.json": _counting(config, counts)} if changes else {},
    )


def _tokens(tuned: Checkpoint, base: Checkpoint) -> set[tuple[int, int]]:
    """How many rows the tensors of a base have, and those of its fine-tune, where these have more."""
    return {
        (base.tensors[name].shape[0], info.shape[0])
        for name, info in tuned.tensors.items()
        if name in base.tensors and info.shape != base.tensors[name].shape
    }


def require_no_more_tokens(tuned: Checkpoint, base: Checkpoint, *, stored: Checkpoint) -> None:
    """Refuse a fine-tune with more tokens than the base whose architecture is used for it."""
    if counts := _tokens(tuned, base):
        [(before, after), *_] = sorted(counts)
        raise BadInput(
            f"has {after - before} more tokens than its base",
            where=stored.source,
            remedy="make the fine-tune of both first, with 'compress restore FILE --base ORIGINAL'",
        )


def _counting(config: Mapping[str, Any], counts: Collection[tuple[int, int]]) -> dict[str, Any]:
    """A configuration with other sizes of the vocabulary, also of a part that is a language model."""
    sizes = dict(counts)

    def changed(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: changed(name, each) for name, each in value.items()}
        return sizes.get(value, value) if key == "vocab_size" and isinstance(value, int) else value

    return portable_config({key: changed(key, value) for key, value in config.items()})


def adapter_of_file(stored: Checkpoint, base: Model) -> Adapter:
    """The LoRA adapter that a file of pairs is beside a transformers folder.

    Raises `BadInput` where the pairs were made for a part of the base, or for modules that are not known.
    """
    tuned, start = materialize_fine_tune(stored, base), base.with_ties().checkpoint
    require_no_more_tokens(tuned, start, stored=stored)
    pairs, spec = stored_pairs(stored), spec_of(stored)
    if quantized := [pair.name for pair in pairs.values() if quantization_of(pair.form) is not None]:
        raise BadInput(
            f"{quantized[0]} is stored in less than 16 bits, and LoRA has no integers",
            where=stored.source,
            remedy="export it with `to='dense'`, or compress the fine-tune again with `base` and no bits",
        )
    if scaled := [name for name in pairs if _share(spec, name) != 1.0]:
        raise BadInput(
            f"{scaled[0]} is to be added to {_share(spec, scaled[0]):.6g} of the base, and LoRA adds to all of it",
            where=stored.source,
            remedy="compress the fine-tune again with `base` and a folder as output",
        )
    names = (start.aliases.get(name, name) for name in stored.tensors)
    changed = frozenset(name for name in names if name in tuned.tensors)
    between = Difference(tuned, start, changed, {}, tuned)
    found = tuple(
        layer if layer.tensor in changed else replace(layer, skip=layer.skip or UNCHANGED)
        for layer in find_layers(start, base.architecture)
    )
    layers = adaptable_layers(between, base.architecture, found)
    eligible = {layer.name: layer for layer in layers if layer.eligible}
    # Pairs of layers that an adapter has none for are multiplied out, and saved whole.
    planned = tuple(_plan(eligible[name].shape, pair) for name, pair in pairs.items() if name in eligible)
    plan = Plan(str(stored.source), file_record(stored).get("digest"), Budget("plan"), planned)
    adaptation = Adaptation(between, layers, plan, TrainingRecipe(), _base_digest(stored), stored)
    adapter = adapter_of(adaptation, base.architecture, start.name)
    require_pairs(adapter)
    return adapter


def _plan(shape: tuple[int, int], pair: StoredPair) -> LayerPlan:
    numbers = pair.rank * sum(shape)
    return LayerPlan(pair.name, shape, pair.kind, pair.rank, pair.form, numbers, math.nan, "as it is stored")


def _share(spec: LowRankSpec, layer: str) -> float:
    share = spec.layers[layer].share if layer in spec.layers else None
    return 1.0 if share is None else share


def _dtype(stored: Checkpoint, pair: StoredPair) -> torch.dtype:
    """The dtype of a weight of the fine-tune, which a file says of those that are stored as integers."""
    known = file_record(stored).get("dtypes")
    said = known.get(pair.name) if isinstance(known, dict) else None
    if said is None:
        return pair.dtype
    dtype = getattr(torch, said, None) if isinstance(said, str) else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise damaged(f"the dtype {str(said)[:40]!r} of {pair.name} does not exist", stored)
    return dtype


def _base_digest(stored: Checkpoint) -> Any:
    """The sha256 of the base that a file of pairs was made for, where it says so."""
    base = file_record(stored)["base"]
    return base.get("digest") if isinstance(base, dict) else None
