"""What the fit examples add to the moments of a segment's layers, a slice of them after the other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from compressor.measure.moments import LayerSums, PackedSum, accumulate


@dataclass
class SegmentSums:
    """Sums over some examples in one segment, all of which may be added up.

    Attributes:
        layers: Those of the inputs of the layers, and of the gradients at their outputs.
        boundary: Those of the gradients at the segment's inputs, by their place among what the segment before outputs.
        collected: What embeddings, heads of many classes, and parameters were observed to do, by kind.
        predictions: How many the examples have, counted in the last segment.
    """

    layers: LayerSums = field(default_factory=LayerSums)
    boundary: dict[int, PackedSum] = field(default_factory=dict)
    collected: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    predictions: int = 0

    def add(self, other: SegmentSums) -> None:
        """Add the sums over other examples, which may become these."""
        self.layers.add(other.layers.inputs, other.layers.gradients)
        for place, each in other.boundary.items():
            accumulate(self.boundary, place, each)
        for kind, state in other.collected.items():
            add_states(self.collected.setdefault(kind, {}), state)
        self.predictions += other.predictions

    def tensors(self) -> dict[str, Tensor]:
        """All numbers, by names for a file."""
        inputs = {json.dumps(sorted(names)): each for names, each in self.layers.inputs.items()}
        boundary = {str(place): each for place, each in self.boundary.items()}
        found = {"predictions": torch.tensor(self.predictions)}
        for kind, sums in (("inputs", inputs), ("gradients", self.layers.gradients), ("boundary", boundary)):
            for name, each in sums.items():
                found[json.dumps([kind, name, "lower"])] = each.lower
                found[json.dumps([kind, name, "total"])] = each.total
                found[json.dumps([kind, name, "count"])] = torch.tensor(each.count)
        for kind, state in self.collected.items():
            found |= {json.dumps(["collected", kind, key]): each for key, each in state.items()}
        return found

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The sums that a file holds."""
        found = cls(predictions=int(tensors["predictions"]))
        for text in sorted(tensors.keys() - {"predictions"}):
            kind, name, key = json.loads(text)
            if kind == "collected":
                found.collected.setdefault(name, {})[key] = tensors[text]
            elif key == "lower":
                total, count = (tensors[json.dumps([kind, name, other])] for other in ("total", "count"))
                each = PackedSum(tensors[text], total, int(count))
                if kind == "inputs":
                    found.layers.inputs[frozenset(json.loads(name))] = each
                elif kind == "gradients":
                    found.layers.gradients[name] = each
                else:
                    found.boundary[int(name)] = each
        return found


def add_states(state: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Add what a collector gathered to what it had gathered before, by names."""
    for key, each in more.items():
        state[key] = state[key] + each if key in state else each
