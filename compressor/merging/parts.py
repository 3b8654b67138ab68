"""The networks to merge: opened, seen as dense tensors by name, and known to fit together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.errors import BadInput
from compressor.forms import FORMS, quantization_of
from compressor.io import Checkpoint, TensorInfo, require_finite
from compressor.io.files import read_json_object
from compressor.lowrank import StoredPair, dense_infos, multiplied, require_usable
from compressor.merging.weights import Weight, dense
from compressor.model import Factory, Model, open_model
from compressor.network import Kind, Layer, in_natural_order, layer_name

# Layers whose tensor is the transpose of the product of a pair as it is held here.
TURNED: tuple[Kind, ...] = ("transposed linear", "embedding")
_MATRICES: tuple[Kind, ...] = ("linear", "transposed linear", "convolution")

# Entries of config.json that say nothing about what the network computes from its weights.
_WITHOUT_EFFECT = {
    *("_name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config", "use_cache"),
    *("problem_type", "finetuning_task", "label2id", "id2label", "gradient_checkpointing", "_attn_implementation"),
}
_VOCABULARIES = ("vocab.json", "vocab.txt", "tokenizer.model", "merges.txt")
# Of the tensors that are not floating-point only this one may differ: nothing is computed from it in evaluation.
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Part:
    """One of the networks: the opened model, dense or low-rank, seen as dense tensors by name."""

    model: Model
    matrices: Mapping[str, Layer]
    """The linear layers and convolutions, low-rank or not, by the name of their dense weight."""

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def checkpoint(self) -> Checkpoint:
        return self.model.checkpoint

    @property
    def pairs(self) -> Mapping[str, StoredPair]:
        return self.model.pairs

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        """Name, shape and dtype of every tensor of the dense network, under every name that it has."""
        return {name: info for name, (info, _) in self._dense.items()}

    def pair(self, name: str) -> StoredPair | None:
        """The pair that stands for a dense weight, if one does."""
        pair = self.pairs.get(layer_name(name))
        return pair if pair is not None and pair.tensor == name else None

    def merged_pair(self, name: str) -> StoredPair | None:
        """The same where `read` gives the pair, and not the tensor that it stands for."""
        pair = self.pair(name)
        if pair is None or pair.kind == "grouped convolution" or quantization_of(pair.form) is not None:
            return None
        return pair

    def read(self, name: str) -> Weight:
        """A tensor of the dense network in float64, or the pair that stands for it where pairs are merged.

        Raises `BadInput` if it is not finite.
        """
        pair = self.pair(name)
        if pair is not None and self.merged_pair(name) is None:
            return multiplied(self.checkpoint, pair)
        return self._weight(name, self._read)

    def matrix(self, name: str) -> Tensor:
        """A layer's `d_out x d_in` matrix in float64, multiplied out if it is low-rank."""
        weight = self.read(name)
        if isinstance(weight, Tensor) and self.matrices[name].kind in TURNED:
            return weight.T
        return dense(weight).flatten(1)

    def shape_of(self, name: str) -> Weight:
        """What `read` would give, without its values (on the meta device)."""
        tensors = self.checkpoint.tensors
        pair = self.pair(name)
        if pair is not None and self.merged_pair(name) is None:
            return torch.empty(pair.tensor_shape, dtype=torch.float64, device="meta")
        return self._weight(name, lambda stored: torch.empty(tensors[stored].shape, dtype=torch.float64, device="meta"))

    def read_exactly(self, name: str) -> Tensor:
        """A stored tensor in its own dtype, by the name that it has in the dense network."""
        stored = self._dense[name][1]
        assert stored is not None
        return self.checkpoint.read(stored)

    @cached_property
    def _dense(self) -> dict[str, tuple[TensorInfo, str | None]]:
        known = dense_infos(self.checkpoint, self.pairs)
        aliases = {
            alias: (TensorInfo(alias, known[name][0].shape, known[name][0].dtype), known[name][1])
            for alias, name in self.checkpoint.aliases.items()
            if name in known and alias not in known
        }
        return known | aliases

    def _read(self, stored: str) -> Tensor:
        tensor = self.checkpoint.read(stored)
        require_finite(stored, tensor, self.checkpoint.source)
        return tensor.to(torch.float64)

    def _weight(self, name: str, read: Any) -> Weight:
        pair = self.pair(name)
        if pair is None:
            stored = self._dense[name][1]
            assert stored is not None
            weight: Tensor = read(stored)
            return weight
        return FORMS[pair.form].merged(pair.kind, pair.read_factors(read))


def open_part(model: str | Path, factory: Factory | None) -> Part:
    """Open a network to merge.

    Raises `BadInput` as `open_model` does, and for a pair whose numbers make none.
    """
    return part_of(open_model(model, factory=factory, compressed="as stored"))


def part_of(model: Model) -> Part:
    """The same of a model that is open."""
    opened = model.with_ties()
    part = Part(opened, _matrices(opened))
    for pair in part.pairs.values():
        require_usable(part.checkpoint, pair)
    return part


def _matrices(model: Model) -> dict[str, Layer]:
    factors = {tensor for pair in model.pairs.values() for tensor in pair.tensors.values()}
    matrices = {
        layer.tensor: layer for layer in model.layers if layer.kind in _MATRICES and layer.tensor not in factors
    }
    for name, pair in model.pairs.items():
        tensor, shape = pair.tensors["weight"], pair.tensor_shape
        module = None if model.architecture is None else model.architecture.module_name(tensor)
        if pair.kind not in (*_MATRICES, "embedding"):
            continue
        sides = (shape[1], shape[0]) if pair.kind in TURNED else (shape[0], math.prod(shape[1:]))
        matrices[tensor] = Layer(name, layer_name(module or tensor), tensor, None, pair.kind, shape, sides)
    return {tensor: matrices[tensor] for tensor in in_natural_order(matrices)}


def merged_names(parts: Sequence[Part]) -> list[str]:
    """The tensors of the merged network: all of the first part's but the names that are tied in every part alike."""
    tied = common_ties(parts)
    return [name for name in parts[0].infos if name not in tied]


def common_ties(parts: Sequence[Part]) -> dict[str, str]:
    """The names of the first part that are tied in every part alike -> the name that stands for them."""
    return {
        alias: name
        for alias, name in parts[0].checkpoint.aliases.items()
        if all(_stored_name(part, alias) == _stored_name(part, name) for part in parts)
    }


def _stored_name(part: Part, name: str) -> str:
    return part.checkpoint.aliases.get(name, name)


def require_same_architecture(parts: Sequence[Part], *, same_shapes: bool) -> None:
    """Raise BadInput unless the networks have the same tensors, vocabularies and architecture.

    Without `same_shapes` the tensors need the same names and numbers of dimensions, and their sizes may differ.
    """
    first = parts[0]
    for other in parts[1:]:
        both = f"{first.name} and {other.name}"
        if (first.checkpoint.folder is None) != (other.checkpoint.folder is None):
            raise BadInput(f"{both} are a folder and a file", remedy="give folders only, or weight files only")
        _require_same_config(first, other)
        if names := sorted(first.infos.keys() ^ other.infos.keys()):
            holder, lacking = (first, other) if names[0] in first.infos else (other, first)
            raise BadInput(
                f"{names[0]} is in {holder.name} and not in {lacking.name}: the architectures differ",
                remedy="merge networks of one architecture",
            )
        for name, info in first.infos.items():
            theirs = other.infos[name]
            if info.dtype.is_floating_point != theirs.dtype.is_floating_point:
                raise BadInput(f"{name} is of integers in one of {both}", remedy="merge networks of one architecture")
            same = info.shape == theirs.shape if same_shapes else len(info.shape) == len(theirs.shape)
            if not same:
                raise BadInput(
                    f"{name} is {_sides(info.shape)} in {first.name} and {_sides(theirs.shape)} in {other.name}",
                    remedy="merge networks of the same shapes and vocabularies",
                )
        _require_same_vocabulary(first, other)


def require_equal(parts: Iterable[Part], name: str) -> None:
    """Raise BadInput where a tensor that can be neither added nor put side by side differs."""
    first, *others = parts
    if name.rpartition(".")[2] == _COUNTER:
        return
    values = first.read_exactly(name)
    for other in others:
        if not torch.equal(values, other.read_exactly(name)):
            raise BadInput(
                f"{name} differs between {first.name} and {other.name}, and it cannot be merged",
                remedy="merge networks that share it",
            )


def normalization(part: Part) -> str | None:
    """The first tensor of a normalization layer, told by name and shape: running statistics, or a vector of scales."""
    for name, info in part.infos.items():
        last = name.rpartition(".")[2]
        if last in {"running_mean", "running_var"} or (last == "weight" and len(info.shape) == 1):
            return name
    return None


def _require_same_config(first: Part, other: Part) -> None:
    if first.checkpoint.folder is None:
        return
    configs = [_with_effect(part.checkpoint.config or {}) for part in (first, other)]
    for key in sorted(configs[0].keys() | configs[1].keys()):
        ours, theirs = (config.get(key) for config in configs)
        if ours != theirs:
            raise BadInput(
                f"{key} is {str(ours)[:40]} in {first.name} and {str(theirs)[:40]} in {other.name}",
                where="config.json",
                remedy="merge networks of one architecture",
            )


def _with_effect(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that say what is computed, without what acts in training alone."""
    trained_only = ("dropout", "_drop", "_pdrop", "_dropout_prob")
    return {
        key: value for key, value in config.items() if key not in _WITHOUT_EFFECT and not key.endswith(trained_only)
    }


def _require_same_vocabulary(first: Part, other: Part) -> None:
    if first.checkpoint.folder is None or other.checkpoint.folder is None:
        return
    ours, theirs = (_vocabulary(folder) for folder in (first.checkpoint.folder, other.checkpoint.folder))
    if ours and theirs and ours != theirs:
        raise BadInput(
            f"the tokenizers of {first.name} and {other.name} have different vocabularies",
            remedy="merge networks that were trained with one tokenizer",
        )


def _vocabulary(folder: Path) -> dict[str, Any]:
    """What gives the tokens of a folder's tokenizer their numbers; {} if it has none."""
    vocabulary: dict[str, Any] = {
        name: (folder / name).read_bytes() for name in _VOCABULARIES if (folder / name).is_file()
    }
    if (folder / "tokenizer.json").is_file():
        model = read_json_object(folder / "tokenizer.json").get("model")
        return {"tokenizer.json": model.get("vocab") if isinstance(model, dict) else model}
    return vocabulary


def _sides(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single number"
