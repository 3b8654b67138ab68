"""What an initial tensor is known by when it is drawn again: to the digits that every CPU draws alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fingerprint:
    """What tells a tensor from others to a few digits: its norm, and some of its numbers."""

    norm: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, tensor: Tensor, count: int = 4) -> Fingerprint:
        """That of a tensor, to seven digits, by numbers at places that are spread evenly."""
        wide = tensor.detach().to(torch.float64).flatten()
        return cls(_rounded(float(wide.norm())), tuple(map(_rounded, wide[_places(len(wide), count)].tolist())))

    def defect(self, tensor: Tensor, tolerance: float = 1e-5) -> str | None:
        """What is different in another tensor, relative to its root mean square; None where nothing is."""
        other = Fingerprint.of(tensor, len(self.values))
        size = self.norm / math.sqrt(max(1, tensor.numel()))
        if not math.isclose(self.norm, other.norm, rel_tol=tolerance):
            return f"its norm is {other.norm:.6g} instead of {self.norm:.6g}"
        pairs = zip(self.values, other.values, strict=True)
        apart = [abs(a - b) for a, b in pairs if not abs(a - b) <= tolerance * max(size, abs(a))]
        return f"{len(apart)} of {len(self.values)} of its numbers are others" if apart else None

    def to_list(self) -> list[float]:
        """What `of_list` reads, in the types of JSON."""
        return [self.norm, *self.values]

    @classmethod
    def of_list(cls, document: Any) -> Fingerprint:
        """Read what `to_list` returns; ValueError for anything else."""
        if not isinstance(document, list) or not document:
            raise ValueError(f"{document!r} is no fingerprint")
        if any(type(each) not in (int, float) or not math.isfinite(each) for each in document):
            raise ValueError(f"{document!r} is no fingerprint")
        norm, *values = map(float, document)
        return cls(norm, tuple(values))


def _rounded(number: float) -> float:
    return float(f"{number:.7g}")


def _places(size: int, count: int) -> list[int]:
    count = min(size, count)
    return [size * each // count for each in range(count)]
