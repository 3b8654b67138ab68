"""The low-rank layers that a checkpoint has, recognized by the tensors that stand for them.

A file says nothing but its tensors: names and shapes tell the form, the rank, and the dense weight, and of quantized
numbers the bits and the groups. What metadata or `config.json` say as well decides only what shapes leave open.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compressor.documents import parse_json
from compressor.errors import BadInput
from compressor.forms import (
    CHANNEL,
    DENSE,
    FORMS,
    GROUPED,
    MARKERS,
    PairForm,
    StoredPairShape,
    StoredWeight,
    pair_name,
    quantized_name,
    recognized,
)
from compressor.io import Checkpoint
from compressor.lowrank.quantized_tensors import BITS, QuantizedTensor, is_packed, quantized_tensor
from compressor.lowrank.spec import METADATA_KEY, LayerSpec, LowRankSpec
from compressor.network import Kind, is_weight, layer_name

# The layers that the factors of a pair are, in files.
_FACTORS = ("down", "up")


@dataclass(frozen=True)
class StoredPair:
    """A low-rank layer found in a checkpoint: where its tensors are and which dense tensor it stands for."""

    name: str
    tensor: str
    form: str
    rank: int
    kind: Kind
    tensor_shape: tuple[int, ...]
    has_bias: bool
    dtype: torch.dtype
    """That of the dense weight: the factors' own, unless these are integers."""
    groups: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """The sides of the `d_out x d_in` matrix."""
        return StoredWeight(self.kind, self.tensor_shape).shape

    @property
    def tensors(self) -> dict[str, str]:
        """Role to tensor name, for the tensors that stand for the dense weight and bias."""
        names = {role_of(name): join(self.name, name) for name in FORMS[self.form].names_at(self.rank)}
        bias = {"bias": join(self.name, FORMS[self.form].bias)} if self.has_bias else {}
        return {"weight": self.tensor} | names | bias

    @property
    def first(self) -> str:
        """The tensor that represents the pair: sharing it means sharing the pair."""
        names = FORMS[self.form].names_at(self.rank)
        return join(self.name, names[0]) if names else self.tensor

    def read_factors(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The tensors of the pair by their names below the layer's, each read by its name in the checkpoint."""
        return {name: read(join(self.name, name)) for name in FORMS[self.form].names_at(self.rank)}


def role_of(name: str) -> str:
    """The short name of a tensor: `down` for `down.weight`."""
    return name.removesuffix(".weight")


def join(name: str, tensor: str) -> str:
    """A tensor's name below its layer's name, which is empty if the layer is the whole model."""
    return f"{name}.{tensor}" if name else tensor


def stored_pairs(checkpoint: Checkpoint) -> dict[str, StoredPair]:
    """The low-rank layers of a checkpoint by name, recognized by the tensors that stand for them.

    A layer that several names share is there under the first.
    """
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    shapes |= {alias: shapes[name] for alias, name in checkpoint.aliases.items()}
    said = {**config_spec(checkpoint).layers, **spec_of(checkpoint).layers}
    pairs: dict[str, StoredPair] = {}
    found: set[str] = set()
    for tensor, shape in shapes.items():
        place = _place(tensor, shape, shapes)
        if place is None:
            continue
        name = layer_name(place.tensor)
        layer = _layer_at(checkpoint, place, shapes, said=said.get(name))
        if layer is None:
            continue
        shared = stored_name(checkpoint, join(name, layer.first))
        if shared in found:
            continue
        found.add(shared)
        pairs[name] = _pair(checkpoint, layer, checkpoint.tensors[shared].dtype)
    return pairs


@dataclass(frozen=True)
class _Place:
    """Where a low-rank layer is: the name of its dense weight, and what its marker says."""

    tensor: str
    marker: tuple[int, ...]
    bits: int | None = None


def _place(tensor: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> _Place | None:
    """The low-rank layer that a tensor is the marker of, or the integers of where there is no marker; else None."""
    if shape in MARKERS.values():
        return _Place(tensor, shape)
    if shape[:-1] in MARKERS.values() and shape[-1] in BITS:
        # A factor without rows, as a pivoted pair of full rank has one, has such a shape too.
        return None if _owners(tensor) & shapes.keys() else _Place(tensor, shape[:-1], shape[-1])
    weight = tensor.removesuffix("_packed")
    if weight == tensor or not is_weight(weight):
        return None
    others = {weight, layer_name(weight)} | _owners(weight)  # the marker of the layer, or what it is a factor of
    return None if others & shapes.keys() else _Place(weight, MARKERS["linear"])


def _owners(weight: str) -> set[str]:
    """What there may be of the layer that a weight is a factor of."""
    owner, _, factor = layer_name(weight).rpartition(".")
    return {owner, join(owner, "weight"), join(owner, "weight_packed")} if factor in _FACTORS else set()


@dataclass(frozen=True)
class _StoredLayer:
    """What is stored of a low-rank layer: the dense shapes of its tensors, by name, and which of them are quantized."""

    place: _Place
    kind: Kind
    shapes: Mapping[str, tuple[int, ...]]
    quantized: Mapping[str, QuantizedTensor]
    pair: PairForm | None
    """The form of its factors; None where it has none."""
    said: LayerSpec | None
    """What the metadata say of it."""

    @property
    def name(self) -> str:
        return layer_name(self.place.tensor)

    @property
    def is_dense(self) -> bool:
        """Whether it is a quantized matrix, which factors may correct."""
        return "weight" in self.shapes

    @property
    def first(self) -> str:
        """The first of its tensors, as it is called in the file."""
        first = "weight" if self.pair is None or self.is_dense else self.pair.names[0]
        return f"{first}_packed" if first in self.quantized else first

    def stands_for(self) -> StoredPairShape | None:
        """The rank of the factors and the shape of the dense weight; None where the tensors do not fit together."""
        factors = {name: shape for name, shape in self.shapes.items() if name != "weight"}
        pair = None if self.pair is None else self.pair.read(self.kind, factors)
        if not self.is_dense:
            return pair
        # What is quantized of a transposed linear layer is its matrix.
        shape = self.shapes["weight"][::-1] if self.kind == "transposed linear" else self.shapes["weight"]
        if not factors:
            return StoredPairShape(0, shape)
        return pair if pair is not None and pair.tensor_shape == shape else None

    def form(self) -> str | None:
        """The name of its form; None where it cannot be told."""
        name = DENSE if self.pair is None or self.is_dense else self.pair.name
        if not self.quantized:
            return name
        said = None if self.said is None else self.said.quantization
        bits = self.place.bits or (None if said is None else said.bits)
        quantization = self.quantized["weight" if self.is_dense else next(iter(self.quantized))].bits(bits)
        if quantization is None:
            return None
        # Groups that do not divide the sides of factors are smaller than the file says.
        alike = said is not None and replace(said, group_size=quantization.group_size) == quantization
        alike = alike and self.said is not None and pair_name(self.said.form) == name
        return self.said.form if alike and self.said is not None else quantized_name(name, quantization)


def _layer_at(
    checkpoint: Checkpoint, place: _Place, shapes: Mapping[str, tuple[int, ...]], *, said: LayerSpec | None
) -> _StoredLayer | None:
    """What is stored at a place; None where that is no low-rank layer."""
    layer = layer_name(place.tensor)
    names = {name: join(layer, name) for name in dict.fromkeys(name for form in FORMS.values() for name in form.names)}
    quantized = {
        name: quantized_tensor(checkpoint, stored)
        for name, stored in (names | {"weight": join(layer, "weight")}).items()
        if is_packed(checkpoint, stored)
    }
    own = {name: shapes[stored] for name, stored in names.items() if stored in shapes}
    own |= {name: each.shape for name, each in quantized.items()}
    kind = said.kind if said is not None else _kind_of_pair(place.tensor, place.marker, own)
    pair = recognized(kind, {name: shape for name, shape in own.items() if name != "weight"})
    if pair is None and "weight" not in own:
        tied = place.tensor in checkpoint.aliases  # a head to an embedding, which has the factors
        if quantized or (place.bits is not None and not tied):
            raise damaged(f"the factors of {layer} do not fit together", checkpoint)
        return None
    return _StoredLayer(place, kind, own, quantized, pair, said)


def _pair(checkpoint: Checkpoint, layer: _StoredLayer, dtype: torch.dtype) -> StoredPair:
    """The low-rank layer of these tensors, of which the first has this dtype."""
    stands_for, form = layer.stands_for(), layer.form()
    if stands_for is None:
        raise damaged(f"the factors of {layer.name} do not fit together", checkpoint)
    if form is None:
        raise damaged(f"how many bits the numbers of {layer.name} have cannot be told", checkpoint)
    bias = join(layer.name, FORMS[form].bias)
    if layer.quantized:
        dtype = _dense_dtype(checkpoint, layer.place.tensor, bias)
    has_bias = bias in checkpoint.tensors or bias in checkpoint.aliases
    pair = StoredPair(
        name=layer.name,
        tensor=layer.place.tensor,
        form=form,
        rank=stands_for.rank,
        kind=layer.kind,
        tensor_shape=stands_for.tensor_shape,
        has_bias=has_bias,
        dtype=dtype,
        groups=stands_for.groups,
    )
    as_said = layer.said is None or (layer.said.form, layer.said.rank) == (form, pair.rank)
    if layer.quantized and not (as_said and _is_stored(checkpoint, pair)):
        raise damaged(f"the tensors of {layer.name} do not fit together", checkpoint)
    return pair


def _is_stored(checkpoint: Checkpoint, pair: StoredPair) -> bool:
    """Whether a checkpoint has the tensors that the form of a layer has at its rank and in its shape."""
    form = FORMS[pair.form]
    if not form.takes(pair) or pair.rank > min(form.sides(pair)):
        return False
    marker = checkpoint.tensors.get(stored_name(checkpoint, pair.tensor))
    if (None if marker is None else marker.shape) != form.marker(pair):
        return False
    for info in form.infos(pair, pair.rank, pair.dtype):
        found = checkpoint.tensors.get(stored_name(checkpoint, join(pair.name, info.name)))
        if found is None or found.shape != info.shape:
            return False
    return True


def _dense_dtype(checkpoint: Checkpoint, *names: str) -> torch.dtype:
    """The dtype of a weight that is stored as integers.

    It is that of its marker or its bias, which are called so, else that of the model, else that of most of its numbers.
    """
    floats = [info for info in checkpoint.tensors.values() if info.dtype.is_floating_point]
    own = {info.name: info.dtype for info in floats}
    for name in names:
        if (dtype := own.get(stored_name(checkpoint, name))) is not None:
            return dtype
    config = checkpoint.config or {}
    said = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    if isinstance(said, torch.dtype) and said.is_floating_point:
        return said
    numbers: dict[torch.dtype, int] = {}
    for info in [info for info in floats if not info.name.endswith("weight_scale")] or floats:
        numbers[info.dtype] = numbers.get(info.dtype, 0) + info.elements
    return max(numbers, key=numbers.__getitem__)


def damaged(what: str, checkpoint: Checkpoint) -> BadInput:
    """What refuses tensors that cannot be used."""
    return BadInput(what, where=checkpoint.source, remedy="compress the original checkpoint again")


def _kind_of_pair(tensor: str, marker: tuple[int, ...], own: Mapping[str, tuple[int, ...]]) -> Kind:
    """The kind of layer that factors stand for, by what stays in the place of the weight and the shape it had."""
    if not is_weight(tensor):
        return "parameter"
    if marker == MARKERS["embedding"]:
        return "embedding"
    matrix: Kind = "linear" if marker == MARKERS["linear"] else "transposed linear"
    form = None if "weight" in own else recognized(matrix, own)
    read = None if form is None else form.read(matrix, own)
    if len(own.get("weight", () if read is None else read.tensor_shape)) == 2:
        return matrix
    if matrix == "transposed linear":
        return "transposed convolution"
    return "grouped convolution" if _is_grouped(own) else "convolution"


def _is_grouped(own: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether factors are those of a convolution with groups: `down` makes several times the channels `up` takes."""
    if not set(GROUPED.names) <= own.keys() or CHANNEL.read("convolution", own) is not None:
        return False
    return GROUPED.read("grouped convolution", own) is not None


def config_spec(checkpoint: Checkpoint) -> LowRankSpec:
    """What `config.json` says; its names are those of modules, mostly those of the file too.

    It says nothing where that cannot be read.
    """
    said = (checkpoint.config or {}).get("quantization_config")
    if isinstance(said, Mapping):
        with suppress(ValueError):
            return LowRankSpec.from_config(said)
    return LowRankSpec({})


def spec_of(checkpoint: Checkpoint) -> LowRankSpec:
    """The low-rank layers in the metadata of a compressed file; none if there is no such metadata."""
    record = file_record(checkpoint)
    if "layers" not in record:
        return LowRankSpec({})
    try:
        return LowRankSpec.from_dict(record)
    except ValueError as error:
        raise damaged(f"the metadata {METADATA_KEY!r} cannot be used: {error}", checkpoint) from None


def file_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """The record in the metadata of a compressed file; {} if there is none that can be read."""
    with suppress(BadInput):
        record = parse_json(checkpoint.metadata.get(METADATA_KEY, "{}"), where=checkpoint.name)
        if isinstance(record, dict):
            return record
    return {}


def stored_name(checkpoint: Checkpoint, name: str) -> str:
    """The first name of a tensor that has several."""
    return checkpoint.aliases.get(name, name)
