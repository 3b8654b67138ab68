"""A plan carried out: the tensors, the metadata and the module of the compressed model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from compressor.checkpoint import (
    Checkpoint,
    Layer,
    SafetensorsWriter,
    ShardedWriter,
    TensorInfo,
    plan_shards,
    safetensors_size,
    write_json,
)
from compressor.planning import LayerPlan, Plan
from compressor.recipe import TrainingRecipe
from compressor.rewrite.modules import low_rank_layer, put_layer
from compressor.rewrite.tensor_format import FORMAT_VERSION, METADATA_KEY, pair_infos, pair_tensors

# What a compressed folder carries besides its weights: the plan and the recipe that made it.
PLAN_FILE = "compression.json"


@dataclass(frozen=True)
class Rewriting:
    """A checkpoint, the recipe it was trained by, and what becomes of its layers."""

    checkpoint: Checkpoint
    recipe: TrainingRecipe
    layers: tuple[Layer, ...]
    plan: Plan

    @property
    def factorized(self) -> tuple[tuple[Layer, LayerPlan], ...]:
        """The layers that do not stay dense, in the order of the plan."""
        layers = {layer.name: layer for layer in self.layers}
        return tuple((layers[each.name], each) for each in self.plan.layers if each.rank is not None)

    def bias(self, layer: Layer) -> str | None:
        """The bias that moves with a layer's weight; one that is tied to another tensor stays where it is."""
        return layer.bias if layer.bias in self.checkpoint.tensors else None

    @property
    def passed_through(self) -> list[str]:
        """The tensors that are copied as they are."""
        moved = {name for layer, _ in self.factorized for name in (layer.tensor, self.bias(layer))}
        return [name for name in self.checkpoint.tensors if name not in moved]


def rewritten_infos(rewriting: Rewriting) -> list[TensorInfo]:
    """Name, shape and dtype of every tensor of the compressed checkpoint, before any of them is computed."""
    known = rewriting.checkpoint.tensors
    infos = [known[name] for name in rewriting.passed_through]
    for layer, plan in rewriting.factorized:
        bias = rewriting.bias(layer)
        infos += pair_infos(layer, plan, known[layer.tensor].dtype, None if bias is None else known[bias])
    return infos


def rewritten_tensors(
    rewriting: Rewriting, device: torch.device, done: Callable[[int], None]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the compressed checkpoint, read and computed one layer at a time on `device`."""
    read = rewriting.checkpoint.read
    for name in rewriting.passed_through:
        yield name, read(name)
    for count, (layer, plan) in enumerate(rewriting.factorized, start=1):
        yield from _factors(rewriting, layer, plan, device).items()
        done(count)


def _factors(rewriting: Rewriting, layer: Layer, plan: LayerPlan, device: torch.device) -> dict[str, Tensor]:
    bias = rewriting.bias(layer)
    weight = rewriting.checkpoint.read(layer.tensor).to(device)
    return pair_tensors(layer, plan, weight, None if bias is None else rewriting.checkpoint.read(bias))


def rewritten_module(
    rewriting: Rewriting, module: nn.Module, device: torch.device, done: Callable[[int], None]
) -> nn.Module:
    """A copy of `module` with low-rank layers; the weights that are factorized are never copied."""
    dense = {layer.name: module.get_submodule(layer.module) for layer, _ in rewriting.factorized}
    left_out = {id(layer.weight): None for layer in dense.values()}
    compressed = copy.deepcopy(module, left_out)
    for count, (layer, plan) in enumerate(rewriting.factorized, start=1):
        low_rank = low_rank_layer(dense[layer.name], plan.form, plan.rank or 0)
        prefix = f"{layer.name}." if layer.name else ""
        factors = _factors(rewriting, layer, plan, device)
        low_rank.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in factors.items()})
        compressed = put_layer(compressed, layer.module, low_rank)
        done(count)
    return compressed


def file_metadata(rewriting: Rewriting) -> dict[str, str]:
    """What a compressed safetensors file says of itself: enough to know how it was made, and to undo it."""
    checkpoint, plan = rewriting.checkpoint, rewriting.plan
    record = {
        "format_version": FORMAT_VERSION,
        "version": version("lowrank-compressor"),
        "source": checkpoint.source.name if checkpoint.source is not None else plan.source,
        "digest": plan.digest,
        "budget": plan.budget.to_dict(),
        "recipe": {key: value for key, value in rewriting.recipe.to_dict().items() if value not in (None, {})},
        "aliases": dict(checkpoint.aliases),
        "layers": {
            each.name: {"rank": each.rank, "form": each.form, "kind": each.kind}
            for each in plan.layers
            if each.rank is not None
        },
    }
    kept = {key: text for key, text in checkpoint.metadata.items() if key != METADATA_KEY}
    return {"format": "pt"} | kept | {METADATA_KEY: json.dumps(record, sort_keys=True)}


def weight_file_bytes(rewriting: Rewriting, shard_size: int) -> int:
    """Size of the weight files that the plan leads to, headers included and index not, without writing them."""
    infos, metadata = rewritten_infos(rewriting), file_metadata(rewriting)
    if rewriting.checkpoint.form == "module":
        return sum(info.nbytes for info in infos)
    if rewriting.checkpoint.form == "file":
        return safetensors_size(infos, metadata)
    return sum(safetensors_size(shard.infos, metadata) for shard in plan_shards(infos, shard_size))


def write_weights(
    place: Path,
    infos: Sequence[TensorInfo],
    tensors: Iterator[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    shard_size: int | None,
) -> None:
    """Write a stream of tensors as the file `place`, or with a shard size as the weight files of that folder."""
    writer = (
        SafetensorsWriter(place, infos, metadata)
        if shard_size is None
        else ShardedWriter(place, plan_shards(infos, shard_size), metadata)
    )
    with writer:
        for name, tensor in tensors:
            writer.write(name, tensor)


def describe_folder(folder: Path, rewriting: Rewriting) -> None:
    """Tell transformers which layers are low-rank, and leave the plan and the recipe beside the weights."""
    config = rewriting.checkpoint.config
    if config is not None:
        quantization = {
            "quant_method": METADATA_KEY,
            "format_version": FORMAT_VERSION,
            "ranks": {layer.module: plan.rank for layer, plan in rewriting.factorized},
            "pivoted": [layer.module for layer, plan in rewriting.factorized if plan.form == "pivoted"],
        }
        write_json(folder / "config.json", {**config, "quantization_config": quantization})
    write_json(folder / PLAN_FILE, rewriting.plan.to_dict() | {"recipe": rewriting.recipe.to_dict()})
