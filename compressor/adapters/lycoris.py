"""LoHa and LoKr of LyCORIS: updates that are products of matrices in other ways, as pairs of factors.

Sources: Hyeon-Woo et al. 2022 (arXiv 2108.06098) for the Hadamard product of two pairs, Edalati et al. 2022
(arXiv 2212.10650) for the Kronecker product; names as in https://github.com/KohakuBlueleaf/LyCORIS
(`lycoris/modules`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.adapters.module import REMEDY, Stored, require_of_a_layer, require_small
from compressor.errors import BadInput
from compressor.factorize import FactorPair, KroneckerProduct, Product

Loaded = Mapping[str, Tensor]


@dataclass(frozen=True)
class _Parts:
    """An update of `shape` that the file holds as `parts`, by their names below the module's."""

    parts: Mapping[str, Stored]
    shape: tuple[int, int]

    @property
    def tensors(self) -> tuple[Stored, ...]:
        return tuple(self.parts.values())

    @property
    def is_pair(self) -> bool:
        return False

    @property
    def is_stored(self) -> bool:
        return True


@dataclass(frozen=True)
class Loha(_Parts):
    """`(w1_a w1_b) * (w2_a w2_b)`, element by element: of rank `r^2` at most, a row of the factors for each pair."""

    @property
    def scaled_by(self) -> int:
        """The rank that alpha is divided by."""
        return self.parts["hada_w1_b"].shape[0]

    @property
    def rank(self) -> int:
        return min(*self.shape, _inner(self.parts, "hada_", "1") * _inner(self.parts, "hada_", "2"))

    def read(self) -> Product:
        loaded = {name: each.read().double() for name, each in self.parts.items()}
        first, second = (_pair(loaded, "hada_", side) for side in "12")
        if first.rank * second.rank >= min(self.shape):
            return Product(_as_pair(first.product() * second.product()))
        # Rows of a column-wise product: each column of one factor with each of the other.
        up = (first.up[:, :, None] * second.up[:, None, :]).flatten(1)
        down = (first.down[:, None, :] * second.down[None, :, :]).flatten(0, 1)
        return Product(FactorPair(up, down))


@dataclass(frozen=True)
class Lokr(_Parts):
    """The Kronecker product of two matrices, each of which may be a product of two: its ranks multiply."""

    sides: tuple[tuple[int, int], tuple[int, int]]
    kernel: tuple[int, ...]

    @property
    def whole(self) -> bool:
        """Whether neither of the matrices is a product."""
        return {"lokr_w1", "lokr_w2"} <= self.parts.keys()

    @property
    def scaled_by(self) -> int:
        """The rank that alpha is divided by."""
        return next((self.parts[name].shape[0] for name in ("lokr_w2_b", "lokr_w1_b") if name in self.parts), 1)

    @property
    def rank(self) -> int:
        (a, b), (c, d) = self.sides
        first, second = (_inner(self.parts, "lokr_", side) for side in "12")
        return min(a, b, first) * min(c, d * math.prod(self.kernel), second)

    def read(self) -> KroneckerProduct:
        loaded = {name: each.read().double() for name, each in self.parts.items()}
        return KroneckerProduct(_kron_pair(loaded, "1"), _kron_pair(loaded, "2"))


def loha_of(parts: Mapping[str, Stored], place: str) -> tuple[Loha, tuple[int, int], tuple[int, ...]]:
    """The factors, the sides of the matrix, and the kernel; `BadInput` where a part is missing or does not fit."""
    needed = [f"hada_w{side}_{which}" for side in "12" for which in "ab"]
    if missing := [name for name in needed if name not in parts]:
        raise BadInput(f"has no {missing[0]}", where=place, remedy=REMEDY)
    cores = [parts.get(f"hada_t{side}") for side in "12"]
    shapes = {name: tuple(each.shape) for name, each in parts.items()}
    found = list[tuple[tuple[int, int], tuple[int, ...]]]()
    for side, core in zip("12", cores, strict=True):
        a, b = shapes[f"hada_w{side}_a"], shapes[f"hada_w{side}_b"]
        if len(a) != 2 or len(b) != 2 or 0 in (*a, *b):
            raise _misfit(shapes, place)
        if core is None:
            fits, kernel, d_out = a[1] == b[0], tuple[int, ...](), a[0]
        else:  # with a core the first factor is stored transposed
            fits, kernel, d_out = len(core.shape) > 2 and core.shape[:2] == (a[0], b[0]), core.shape[2:], a[1]
        if not fits:
            raise _misfit(shapes, place)
        found.append(((d_out, b[1] * math.prod(kernel)), tuple(kernel)))
    if found[0] != found[1]:
        raise _misfit(shapes, place)
    shape, kernel = found[0]
    factors = Loha(parts, shape)
    for side, core in zip("12", cores, strict=True):
        if core is not None:
            require_small(shape, _inner(parts, "hada_", side), place)
    require_small(shape, factors.rank, place)
    return factors, shape, kernel


def lokr_of(parts: Mapping[str, Stored], place: str) -> tuple[Lokr, tuple[int, int], tuple[int, ...]]:
    """The factors, the sides of the matrix, and the kernel; `BadInput` where a part is missing or does not fit."""
    shapes = {name: tuple(each.shape) for name, each in parts.items()}
    (a, b, of_first), (c, d, kernel) = (_kron_sides(shapes, side, place) for side in "12")
    if math.prod(of_first) != 1:
        raise _misfit(shapes, place)
    shape = (a * c, b * d * math.prod(kernel))
    require_of_a_layer(shape, place)
    for side, of_side in (("1", (a, b)), ("2", (c, d * math.prod(kernel)))):
        if f"lokr_w{side}" not in parts and f"lokr_t{side}" in parts:
            require_small(of_side, _inner(parts, "lokr_", side), place)
    return Lokr(parts, shape, ((a, b), (c, d)), kernel), shape, kernel


def _kron_sides(shapes: Mapping[str, tuple[int, ...]], side: str, place: str) -> tuple[int, int, tuple[int, ...]]:
    whole, a, b = (shapes.get(f"lokr_w{side}{end}") for end in ("", "_a", "_b"))
    core = shapes.get(f"lokr_t{side}")
    if whole is not None:
        if len(whole) < 2 or 0 in whole:
            raise _misfit(shapes, place)
        return whole[0], whole[1], whole[2:]
    if a is None or b is None or len(a) != 2 or len(b) < 2 or 0 in (*a, *b):
        raise _misfit(shapes, place)
    if core is None:
        if a[1] != b[0]:
            raise _misfit(shapes, place)
        return a[0], b[1], b[2:]
    if len(core) < 3 or core[:2] != (a[0], b[0]) or len(b) != 2:
        raise _misfit(shapes, place)
    return a[1], b[1], core[2:]


def _inner(parts: Mapping[str, Stored], kind: str, side: str) -> int:
    """The rank of the pair that one of the matrices is read as."""
    if (whole := parts.get(f"{kind}w{side}")) is not None:
        return min(whole.shape[0], math.prod(whole.shape[1:]))
    factor = parts[f"{kind}w{side}_a"]
    # With a core the first factor is stored transposed.
    return factor.shape[0] if f"{kind}t{side}" in parts else factor.shape[1]


def _pair(loaded: Loaded, kind: str, side: str) -> FactorPair:
    """One of the matrices that are products, its positions flattened."""
    a, b = loaded[f"{kind}w{side}_a"], loaded[f"{kind}w{side}_b"]
    if (core := loaded.get(f"{kind}t{side}")) is None:
        return FactorPair(a, b.flatten(1))
    return FactorPair(a.T, torch.einsum("pq...,qi->pi...", core, b).flatten(1))


def _kron_pair(loaded: Loaded, side: str) -> FactorPair:
    """One of the matrices, its positions flattened, as a pair of no more than its full rank."""
    if (whole := loaded.get(f"lokr_w{side}")) is not None:
        return _as_pair(whole.flatten(1))
    pair = _pair(loaded, "lokr_", side)
    return pair if pair.rank < min(len(pair.up), pair.down.shape[1]) else _as_pair(pair.product())


def _as_pair(matrix: Tensor) -> FactorPair:
    """A matrix as the product of itself and an identity, on its smaller side."""
    d_out, d_in = matrix.shape
    if d_out <= d_in:
        return FactorPair(torch.eye(d_out, dtype=matrix.dtype), matrix)
    return FactorPair(matrix, torch.eye(d_in, dtype=matrix.dtype))


def _misfit(shapes: Mapping[str, tuple[int, ...]], place: str) -> BadInput:
    listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    return BadInput(f"has parts that do not fit: {listed}", where=place, remedy=REMEDY)
