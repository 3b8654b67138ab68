"""The merged network's tensors, one layer at a time, from those of its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from compressor.choices import Head
from compressor.factorize import FactorPair, PivotedPair
from compressor.io import TensorInfo, require_in_range
from compressor.lowrank import MARKERS, LayerSpec, LowRankSpec, join
from compressor.merging.chain import Chain
from compressor.merging.parts import TURNED, Part, merged_names
from compressor.merging.weights import Weight, form_of_weight, joined, scaled, turned
from compressor.network import Kind, layer_name

Read = Callable[[Part, str], Weight]


@dataclass(frozen=True)
class Combination:
    """The networks that are put together, and how.

    Without a chain their weights are added, each times its factor: for fine-tunes of a base that is
    `base + sum of (W_i - base) = sum of W_i + (1 - k) base`. With a chain they are put side by side: the first layers
    stacked, those in the middle as blocks of a diagonal, the outputs of the head added if it is shared.
    """

    parts: tuple[Part, ...]
    factors: tuple[float, ...]
    chain: Chain | None = None
    head: Head = "shared"

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
                found[layer_name(name)] = LayerSpec(form_of_weight(weight), weight.rank, kind)
        return LowRankSpec(found)

    def _tensors(self, read: Read) -> Iterator[tuple[str, Tensor]]:
        for name in merged_names(self.parts):
            if self.is_kept(name):
                yield name, self.parts[0].read_exactly(name)
                continue
            dtype = reduce(torch.promote_types, (part.infos[name].dtype for part in self.parts))
            weight = self._joined(name, read)
            if isinstance(weight, Tensor):
                oriented = weight.T if self._is_transposed(name) else weight
                yield self._place(name), require_in_range(name, oriented.to(dtype).contiguous())
                continue
            layer, kind = layer_name(name), self._kind_of_pairs(name)
            assert kind is not None
            up, down = weight.up, weight.down
            if kind == "embedding":
                down = down.T
            if kind == "transposed convolution":
                up, down = down, up
            yield name, torch.empty(MARKERS[kind], dtype=dtype)
            for role, factor in (("down.weight", down), ("up.weight", up)):
                yield join(layer, role), require_in_range(name, factor.to(dtype).contiguous())
            if isinstance(weight, PivotedPair):
                yield join(layer, "order"), weight.order

    def _joined(self, name: str, read: Read) -> Weight:
        weights = []
        for part, factor in zip(self.parts, self.factors, strict=True):
            weight, pair = read(part, name), part.pair(name)
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
        return next((pair.kind for part in self.parts if (pair := part.pair(name)) is not None), None)

    def _is_transposed(self, name: str) -> bool:
        """Whether the weights stand turned beside each other; among dense ones it does not matter."""
        return self._kind_of_pairs(name) in TURNED

    def _place(self, name: str) -> str:
        """Where a dense tensor is stored: the bias of a plain pair is that of its `up`."""
        layer, last = layer_of(name), name.rpartition(".")[2]
        weight = join(layer, "weight")
        if last != "bias" or self._kind_of_pairs(weight) in (None, "parameter"):
            return name
        return join(layer, "up.bias") if isinstance(self._joined(weight, Part.shape_of), FactorPair) else name


def layer_of(tensor: str) -> str:
    """The name of the layer that holds a tensor."""
    return tensor.rpartition(".")[0]
