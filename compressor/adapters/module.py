"""One module of an adapter: where its low-rank update is stored, and how large it counts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Literal, Protocol

import torch
from torch import Tensor

from compressor.adapters.names import ModuleName, is_of_diffusers
from compressor.choices import AdapterDialect
from compressor.errors import BadInput
from compressor.factorize import FactorPair, KroneckerProduct, Product
from compressor.io import Checkpoint, StoredTensor, TensorInfo, require_finite

REMEDY = "use the file as its training wrote it"
_LARGEST_PAIR = 2**27  # numbers: 8192 x 8192 in full, a gigabyte in float64
_LARGEST_SIDES = 2**20
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

ModuleKind = Literal["linear", "convolution", "embedding"]


@dataclass(frozen=True)
class Stored:
    """A tensor of the adapter by its name; its values are read when they are asked for."""

    name: str
    tensor: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.name, self.tensor.shape, self.tensor.dtype)

    def read(self) -> Tensor:
        """The values; `BadInput` where they are not finite."""
        values = self.tensor.read()
        require_finite(self.name, values)
        return values


class Factors(Protocol):
    """How the update of a module is stored, before it is scaled."""

    @property
    def tensors(self) -> tuple[Stored, ...]:
        """All tensors that it is stored in."""

    @property
    def rank(self) -> int:
        """The largest rank that the update can have."""

    @property
    def is_pair(self) -> bool:
        """Whether it is stored as the two factors, and nothing else."""

    @property
    def is_stored(self) -> bool:
        """Whether its tensors can go along as they are."""

    def read(self) -> Product | KroneckerProduct:
        """The update, as the matrices that it is a product of."""


@dataclass(frozen=True)
class Lora:
    """Two factors, and for some convolutions a core between them: `up @ down`, or `up @ core @ down` per position."""

    down: Stored
    up: Stored
    mid: Stored | None = None

    @property
    def tensors(self) -> tuple[Stored, ...]:
        return (self.down, self.up) if self.mid is None else (self.down, self.up, self.mid)

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    @property
    def is_pair(self) -> bool:
        return self.mid is None

    @property
    def is_stored(self) -> bool:
        return True

    def read(self) -> Product:
        down, up = self.down.read(), self.up.read().flatten(1)
        if self.mid is None:
            return Product(FactorPair(up, down.flatten(1)))
        core = self.mid.read().double()
        spread = torch.einsum("pq...,qi->pi...", core, down.flatten(1).double())
        return Product(FactorPair(up.double(), spread.flatten(1)))


@dataclass(frozen=True)
class Scale:
    """What a product counts, `alpha / over`: as both, since their quotient times a rank would be rounded twice."""

    alpha: float = 1.0
    over: float = 1.0

    @property
    def value(self) -> float:
        return self.alpha / self.over

    def alpha_at(self, rank: int) -> float:
        """The alpha that over this rank is the same scale."""
        return self.alpha if rank == self.over else self.alpha * rank / self.over


@dataclass(frozen=True)
class AdapterModule:
    """One module that the adapter changes, by `scale` times the product of its factors.

    Attributes:
        name: What it is called in its model.
        place: What the names of its tensors begin with.
        kind: What it is: the update of an embedding is stored transposed.
        factors: The update without its scale.
        shape: The matrix of the update, `d_out x d_in`; a convolution's inputs are those of all positions.
        kernel: The kernel of a convolution, empty for others.
        scaled: What the product counts: `alpha / r`, or `alpha / sqrt(r)` where it is stabilized.
        alpha: Where alpha is stored, if it has a tensor.
        beside: What else is stored with it: the magnitudes of DoRA, a bias.
        channels: The inputs of one position of a convolution, else those of the matrix.
    """

    name: ModuleName
    place: str
    kind: ModuleKind
    factors: Factors
    shape: tuple[int, int]
    kernel: tuple[int, ...]
    scaled: Scale
    alpha: Stored | None = None
    beside: tuple[Stored, ...] = ()

    @property
    def scale(self) -> float:
        return self.scaled.value

    @property
    def channels(self) -> int:
        return self.shape[1] // math.prod(self.kernel)

    @property
    def rank(self) -> int:
        """The largest rank of its update."""
        return min(self.factors.rank, *self.shape)

    @property
    def dtype(self) -> torch.dtype:
        return reduce(torch.promote_types, (each.tensor.dtype for each in self.factors.tensors))

    @cached_property
    def numbers(self) -> int:
        """How many numbers its factors take."""
        return sum(each.info.elements for each in self.factors.tensors)

    def kept_as_it_is(self, rank: int) -> bool:
        """Whether a pair of this rank would be no smaller than what is stored."""
        return rank >= self.rank or rank * sum(self.shape) >= self.numbers

    def numbers_at(self, rank: int) -> int:
        """How many numbers its factors take once it is resized."""
        return self.numbers if self.kept_as_it_is(rank) else rank * sum(self.shape)

    @property
    def whole(self) -> tuple[Stored, ...]:
        """All its tensors."""
        alpha = () if self.alpha is None else (self.alpha,)
        return (*self.factors.tensors, *alpha, *self.beside)

    def down_shape(self, rank: int) -> tuple[int, ...]:
        return (rank, self.channels, *self.kernel)

    def up_shape(self, rank: int) -> tuple[int, ...]:
        return (self.shape[0], rank, *(1 for _ in self.kernel))


@dataclass(frozen=True)
class Adapter:
    """The modules of an adapter, whose factors are read when they are asked for.

    Attributes:
        checkpoint: Its tensors.
        dialect: Whose names they have.
        modules: What it changes.
        others: Tensors that are part of no module: weights that are saved whole.
        config: The configuration of PEFT, where there is one.
    """

    checkpoint: Checkpoint
    dialect: AdapterDialect
    modules: tuple[AdapterModule, ...]
    others: tuple[Stored, ...] = ()
    config: dict[str, object] | None = None

    # What the names of all modules tell is asked for each of them.

    @cached_property
    def parts(self) -> frozenset[str]:
        """The parts of a pipeline that it changes."""
        return frozenset(each.name.part for each in self.modules)

    @cached_property
    def is_of_sdxl(self) -> bool:
        """Whether its UNet is that of SDXL, whose blocks of attention have several transformer blocks."""
        paths = [each.name.path for each in self.modules if each.name.part == "unet"]
        return any(re.search(r"\.transformer_blocks\.[1-9]", path) for path in paths) or any(
            each.name.part == "text_encoder_2" and is_of_diffusers(each.name) for each in self.modules
        )

    @cached_property
    def blocks_with_attention(self) -> frozenset[str]:
        """The upper blocks of its UNet that have attention."""
        paths = (each.name.path for each in self.modules if each.name.part == "unet")
        return frozenset(found[1] for path in paths if (found := re.match(r"(up_blocks\.\d+)\.attentions\.", path)))

    @property
    def has_magnitudes(self) -> bool:
        """Whether it is of DoRA: the changed weights are normalized, and scaled by magnitudes of their own."""
        return any(is_magnitude(each.name) for module in self.modules for each in module.beside)


def require_floats(tensors: Sequence[Stored]) -> None:
    """Refuse factors in numbers that they cannot be computed, or written, in."""
    for each in tensors:
        if each.tensor.dtype not in _DTYPES:
            dtype = str(each.tensor.dtype).removeprefix("torch.")
            remedy = "convert its factors to float16, bfloat16, or float32"
            raise BadInput(f"{each.name} is stored in {dtype}", remedy=remedy)


def require_small(shape: tuple[int, int], rank: int, place: str, *, remedy: str = REMEDY) -> None:
    """Refuse factors that take more memory than those of any layer, before they are formed from a few numbers."""
    if rank * sum(shape) > _LARGEST_PAIR:
        what = f"stands for a matrix of {shape[0]:,} x {shape[1]:,}, of rank {rank:,}, which takes too much memory"
        raise BadInput(what, where=place, remedy=remedy)


def require_of_a_layer(shape: tuple[int, int], place: str) -> None:
    """Refuse a matrix that is larger than any layer's."""
    if sum(shape) > _LARGEST_SIDES:
        what = f"stands for a matrix of {shape[0]:,} x {shape[1]:,}, larger than any layer's"
        raise BadInput(what, where=place, remedy=REMEDY)


def is_magnitude(name: str) -> bool:
    """Whether a tensor holds the magnitudes of DoRA."""
    return name.endswith((".dora_scale", ".lora_magnitude_vector", ".lora_magnitude_vector.weight"))


def lora_of(parts: Sequence[Stored | None], place: str) -> tuple[Lora, tuple[int, int], tuple[int, ...]]:
    """The factors of a module with the sides of its matrix and its kernel; `parts` are down, up, and the core.

    Raises:
        BadInput: a factor is missing, or their shapes do not fit.
    """
    down, up, mid = parts
    if down is None or up is None:
        missing = "down (A)" if down is None else "up (B)"
        raise BadInput(f"has no {missing} factor", where=place, remedy="use a file that holds all of the adapter")
    shapes = f"{tuple(down.shape)} and {tuple(up.shape)}" + ("" if mid is None else f" and {tuple(mid.shape)}")
    misfit = BadInput(
        f"has factors of shapes {shapes}, which do not fit",
        where=place,
        remedy=f"{REMEDY}; of grouped convolutions none is read",
    )
    if len(down.shape) < 2 or len(down.shape) != len(up.shape) or math.prod(up.shape[2:]) != 1:
        raise misfit
    kernel = down.shape[2:] if mid is None else mid.shape[2:]
    if mid is not None:
        fits = mid.shape[:2] == (up.shape[1], down.shape[0]) and math.prod(down.shape[2:]) == 1
    else:
        fits = down.shape[0] == up.shape[1]
    if not fits or 0 in (*down.shape, *up.shape):
        raise misfit
    shape = (up.shape[0], down.shape[1] * math.prod(kernel))
    if mid is not None:
        require_small(shape, up.shape[1], place)
    return Lora(down, up, mid), shape, tuple(kernel)
