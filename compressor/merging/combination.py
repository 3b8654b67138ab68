"""The merged network's tensors, one layer at a time, from those of its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from compressor.choices import Head, MergeMode
from compressor.errors import BadInput
from compressor.factorize import FactorPair, PivotedPair
from compressor.forms import MARKERS, PairForm, recognized
from compressor.io import TensorInfo, require_in_range
from compressor.lowrank import LayerSpec, LowRankSpec, join
from compressor.merging.chain import Chain, chain_of_shapes, traced_chain
from compressor.merging.parts import (
    TURNED,
    Part,
    merged_names,
    normalization,
    require_equal,
    require_same_architecture,
)
from compressor.merging.weights import Weight, joined, scaled, turned
from compressor.model import Factory, build_model
from compressor.network import Kind, layer_name

Read = Callable[[Part, str], Weight]


@dataclass(frozen=True)
class Combination:
    """The networks that are put together, and how.

    Without a chain their weights are added, each times its factor: for fine-tunes of a base that is
    `base + sum of (W_i - base) = sum of W_i + (1 - k) base`. With a chain they are put side by side: the first layers
    stacked, those in the middle as blocks of a diagonal, the outputs of the head added if it is shared.
    """

    networks: tuple[Part, ...]
    base: Part | None = None
    chain: Chain | None = None
    head: Head = "shared"

    @property
    def parts(self) -> tuple[Part, ...]:
        """The networks, and their base as the last."""
        return self.networks if self.base is None else (*self.networks, self.base)

    @property
    def factors(self) -> tuple[float, ...]:
        """What the weights of each part are multiplied by."""
        ones = (1.0,) * len(self.networks)
        return ones if self.base is None else (*ones, 1.0 - len(ones))

    def infos(self) -> list[TensorInfo]:
        """Name, shape and dtype of every tensor of the merged checkpoint, before any of them is computed."""
        return [TensorInfo(name, tuple(t.shape), t.dtype) for name, t in self._tensors(Part.shape_of)]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the merged checkpoint, computed in float64, in the parts' common dtype."""
        return self._tensors(Part.read)

    def is_kept(self, name: str) -> bool:
        """Whether a tensor is taken over as it is.

        It is what is not floating-point, what normalizes shared inputs, and without a base a single number: that is
        a scale or a temperature, and no sum.
        """
        info = self.parts[0].infos[name]
        if not info.dtype.is_floating_point or (not info.shape and set(self.factors) == {1.0}):
            return True
        return self.chain is not None and self.chain.batch_norms.get(layer_of(name)) == "inputs"

    @property
    def spec(self) -> LowRankSpec:
        """The layers of the merged network that are pairs."""
        found = {}
        for name in merged_names(self.parts):
            if (kind := self._kind_of_pairs(name)) is None:
                continue
            weight = self._joined(name, Part.shape_of)
            if not isinstance(weight, Tensor):
                found[layer_name(name)] = LayerSpec(_form(weight, kind).name, weight.rank, kind)
        return LowRankSpec(found)

    def _tensors(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        for name in merged_names(self.parts):
            yield from self.merged(name, read)

    def merged(self, name: str, read: Read = Part.read) -> Iterator[tuple[str, Tensor]]:
        """What is stored for one tensor of the dense networks: itself, or the factors of its layer."""
        if self.is_kept(name):
            yield name, self.parts[0].read_exactly(name)
            return
        dtype = reduce(torch.promote_types, (part.infos[name].dtype for part in self.parts))
        weight = self._joined(name, read)
        if isinstance(weight, Tensor):
            oriented = weight.T if self._is_transposed(name) else weight
            yield self._place(name), require_in_range(name, oriented.to(dtype).contiguous())
            return
        layer, kind = layer_name(name), self._kind_of_pairs(name)
        assert kind is not None
        yield name, torch.empty(MARKERS[kind], dtype=dtype)
        for role, factor in _stored(weight, kind).items():
            numbers = factor.is_floating_point()
            yield join(layer, role), require_in_range(name, factor.to(dtype).contiguous()) if numbers else factor

    def _joined(self, name: str, read: Read) -> Weight:
        weights = []
        for part, factor in zip(self.parts, self.factors, strict=True):
            weight, pair = read(part, name), part.merged_pair(name)
            # A network that was compressed without its code may hold a pair the other way round.
            if (pair is not None and pair.kind in TURNED) != self._is_transposed(name):
                weight = turned(weight)
            weights.append(weight if factor == 1 else scaled(weight, factor))
        layer = layer_of(name)
        return joined(
            weights,
            shared_inputs=self.chain is None or layer in self.chain.first,
            shared_outputs=self.chain is None or (layer == self.chain.head and self.head == "shared"),
        )

    def _kind_of_pairs(self, name: str) -> Kind | None:
        """The kind of layer that a weight belongs to, where it is a pair in one of the networks."""
        return next((pair.kind for part in self.parts if (pair := part.merged_pair(name)) is not None), None)

    def _is_transposed(self, name: str) -> bool:
        """Whether the weights stand turned beside each other; among dense ones it does not matter."""
        return self._kind_of_pairs(name) in TURNED

    def _place(self, name: str) -> str:
        """Where a dense tensor is stored: the bias of a pair where its form has it."""
        layer, last = layer_of(name), name.rpartition(".")[2]
        kind = self._kind_of_pairs(join(layer, "weight"))
        if last != "bias" or kind is None or kind == "parameter":
            return name
        weight = self._joined(join(layer, "weight"), Part.shape_of)
        return name if isinstance(weight, Tensor) else join(layer, _form(weight, kind).bias)


def _stored(weight: FactorPair | PivotedPair, kind: Kind) -> dict[str, Tensor]:
    """The tensors that a merged pair is stored as, by their names below the layer's."""
    up, down = weight.up, weight.down
    if kind == "embedding":
        down = down.T
    if kind == "transposed convolution":  # its own tensor is their product in the other order
        up, down = down, up
    return {"down.weight": down, "up.weight": up} | ({"order": weight.order} if isinstance(weight, PivotedPair) else {})


def _form(weight: FactorPair | PivotedPair, kind: Kind) -> PairForm:
    form = recognized(kind, {name: tuple(tensor.shape) for name, tensor in _stored(weight, kind).items()})
    assert form is not None
    return form


def layer_of(tensor: str) -> str:
    """The name of the layer that holds a tensor."""
    return tensor.rpartition(".")[0]


def combined(
    networks: tuple[Part, ...],
    base: Part | None,
    mode: MergeMode,
    *,
    head: Head,
    factory: Factory | None,
) -> Combination:
    """How networks are put together.

    Raises `BadInput` where they do not fit together, or cannot be merged in this mode.
    """
    if mode == "concat" and networks[0].checkpoint.folder is not None:
        raise BadInput(
            "concat is for feed-forward networks in weight files, and this is a model folder",
            where=networks[0].name,
            remedy="merge fine-tunes of one model with `mode='sum'` `base=ORIGINAL`",
        )
    require_same_architecture(networks if base is None else (*networks, base), same_shapes=mode == "sum")
    chain = _chain(networks, factory) if mode == "concat" else None
    combination = Combination(networks, base, chain, head)
    if chain is not None:
        _require_sides(networks, chain, head)
    elif base is None and (name := normalization(networks[0])) is not None:
        raise BadInput(
            f"{name} is of a normalization layer, which is no sum",
            where=networks[0].name,
            remedy="merge fine-tunes with `base=ORIGINAL`, or feed-forward networks with `mode='concat'`",
        )
    for name in networks[0].infos:
        if combination.is_kept(name):
            require_equal(networks, name)
    return combination


def _chain(parts: Sequence[Part], factory: Factory | None) -> Chain:
    if factory is None:
        chains = [
            chain_of_shapes({name: info.shape for name, info in part.infos.items()}, part.checkpoint.source)
            for part in parts
        ]
        if any(chain.layers != chains[0].layers for chain in chains):
            raise BadInput("the layers of the networks come in different orders", remedy="pass `factory`")
        return chains[0]
    chain = traced_chain(build_model(factory))
    known = {*chain.layers, *chain.batch_norms}
    if strange := [name for name in parts[0].infos if layer_of(name) not in known]:
        raise BadInput(
            f"the networks cannot be concatenated: {strange[0]} is in no layer that runs",
            where=parts[0].name,
            remedy="pass `factory` with the function that builds them",
        )
    return chain


def _require_sides(parts: Sequence[Part], chain: Chain, head: Head) -> None:
    """What the networks share must be equally large in all of them: their inputs, and the outputs of a shared head."""
    sides = [(f"{layer}.weight", 1, "inputs") for layer in chain.first]
    if head == "shared":
        sides.append((f"{chain.head}.weight", 0, "outputs"))
    for tensor, side, what in sides:
        name = tensor.removeprefix(".")
        sizes = [part.infos[name].shape[side] for part in parts]
        if len(set(sizes)) > 1:
            remedy = (
                "give each its own outputs with `head='separate'`" if side == 0 else "merge networks of the same inputs"
            )
            raise BadInput(f"{name} has {' and '.join(map(str, sizes))} {what}", remedy=remedy)
