"""The dense weight that a pair stands for, by its kind and its shape."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

import numpy as np
import numpy.typing as npt
from torch import nn

from compressor.forms.layers import kind_name
from compressor.network import Kind

# One rank, or many at once.
Count = TypeVar("Count", int, npt.NDArray[np.int64])

# Kinds of layers whose stored tensor is the transpose of the matrix that they apply to their inputs.
TRANSPOSED: tuple[Kind, ...] = ("transposed linear", "transposed convolution", "embedding")

# Kinds whose quantized tensor has the rows of the matrix' inputs: a row of it is looked up, or is one channel's kernel.
TURNED: tuple[Kind, ...] = ("embedding", "transposed convolution")


class DenseWeight(Protocol):
    """The dense weight that a pair stands for: a layer of a network, or what is known of one from its factors."""

    @property
    def kind(self) -> Kind: ...

    @property
    def tensor_shape(self) -> tuple[int, ...]: ...

    @property
    def shape(self) -> tuple[int, int]:
        """The sides of the `d_out x d_in` matrix."""

    @property
    def groups(self) -> int:
        """How many parts of its channels a convolution keeps apart; so many parts of the rows have their own inputs."""


@dataclass(frozen=True)
class StoredWeight:
    """A dense weight known by its kind, the shape of its tensor, and its groups alone."""

    kind: Kind
    tensor_shape: tuple[int, ...]
    groups: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        first, *rest = self.tensor_shape
        sides = (first, math.prod(rest))
        return sides[::-1] if self.kind in TRANSPOSED else sides


def kind_of(dense: nn.Module) -> Kind:
    """The kind of layer that a module is; ValueError for one that has no pair."""
    return cast("Kind", kind_name(dense))
