"""A tensor as a change from a reference: `share * reference`, a pair of factors, and a rounded remainder.

The factors and the remainder are rounded to whole numbers and deflated. For the pair the columns of `U diag(s)` and
`V diag(s)` are rounded by one step: the error of the product then grows by the same for each column, so a column takes
fewer bits the smaller its singular value is (reverse water-filling; Cover & Thomas, Elements of Information Theory,
section 10.3). How many columns there are, and whether a remainder follows, is chosen by what an ideal code would take
at the same error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compressor.archiving.codes import (
    WIDTHS,
    Codes,
    bit_patterns,
    deflated,
    from_bit_patterns,
    from_planes,
    inflated,
    planes,
    width_of,
    wrapped,
)
from compressor.measure.eigen import eigh
from compressor.measure.spectrum import smaller_gram

Source = Literal["nothing", "initial", "previous"]

# Those that are stored to within an error; the numbers of others are stored bit for bit.
_ROUNDED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# 2 pi e: a Gaussian variable in units of the step takes half the logarithm of this times its variance.
_GAUSSIAN = 2 * math.pi * math.e
_MOST_CODE = 2**31 - 1
_ATTEMPTS = 4


@dataclass(frozen=True)
class Reference:
    """What a tensor is stored as a change from.

    Attributes:
        source: The initial weights, the checkpoint before as it is restored, or nothing.
        tensor: Its numbers; None of nothing.
        share: What they are multiplied by.
        rank_bound: The largest rank that training can have written since; None where no bound below the shape's holds.
    """

    source: Source = "nothing"
    tensor: Tensor | None = field(default=None, repr=False)
    share: float = 0.0
    rank_bound: int | None = None


@dataclass(frozen=True)
class Change:
    """What is stored of a tensor.

    Attributes:
        source: What it is a change from.
        share: What that is multiplied by.
        exact: Whether the difference of the bit patterns is stored, and all below is 0.
        rank: Of the pair of factors; 0 without one.
        factor_step: What the numbers of the factors are multiples of.
        step: What the numbers of the remainder are multiples of; 0 without one.
        widths: The bytes of a number of the left factor, the right one, and the remainder before they are deflated.
        payload: The deflated numbers.
    """

    source: Source
    share: float
    exact: bool = False
    rank: int = 0
    factor_step: float = 0.0
    step: float = 0.0
    widths: tuple[int, int, int] = (1, 1, 1)
    payload: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        if self.source not in get_args(Source) or type(self.exact) is not bool:
            raise ValueError(f"nothing is stored as a change from {self.source!r}")
        numbers = (self.share, self.factor_step, self.step)
        if not all(type(each) in (int, float) and math.isfinite(each) for each in numbers):
            raise ValueError(f"{numbers!r} are no share and steps")
        if type(self.rank) is not int or self.rank < 0 or not set(self.widths) <= set(WIDTHS) or len(self.widths) != 3:
            raise ValueError(f"rank {self.rank!r} with numbers of {self.widths!r} bytes cannot be")

    def restored(self, like: Tensor, reference: Tensor | None) -> Tensor:
        """The tensor, of the shape and dtype of `like`; ValueError where the payload holds none."""
        if self.exact:
            return _restored_exactly(self, like, reference)
        base = _scaled(reference, self.share, like=like)
        rows, columns = matrix_sides(like.shape)
        if self.rank > min(rows, columns):
            raise ValueError(f"rank {self.rank} is more than a {rows} x {columns} matrix has")
        if not self.rank and not self.step:
            return base.to(like.dtype)
        counts = (rows * self.rank, columns * self.rank, rows * columns if self.step else 0)
        sizes = [count * width for count, width in zip(counts, self.widths, strict=True)]
        raw = memoryview(inflated(self.payload, 4 * self.rank + sum(sizes)))
        change = torch.zeros(rows, columns, dtype=base.dtype)
        if self.rank:
            values = torch.from_numpy(np.frombuffer(raw[: 4 * self.rank], dtype="<f4").astype(np.float64))
            start = 4 * self.rank
            left = from_planes(raw[start : start + sizes[0]], self.widths[0]).reshape(rows, self.rank)
            right = from_planes(raw[start + sizes[0] : start + sizes[0] + sizes[1]], self.widths[1])
            change = _product(left, right.reshape(columns, self.rank), values, step=self.factor_step).to(base.dtype)
        if self.step:
            codes = from_planes(raw[len(raw) - sizes[2] :], self.widths[2]).reshape(rows, columns)
            change += torch.from_numpy(codes).to(base.dtype) * self.step
        return (base + change.reshape(like.shape)).to(like.dtype)


def change_from(tensor: Tensor, reference: Reference, tolerance: float) -> Change:
    """What is stored of a tensor so that the norm of its error is at most `tolerance` times its own.

    Where the tolerance is 0, is finer than what the dtype resolves, or the numbers are no finite floating-point ones,
    they are stored bit for bit.
    """
    norm = _norm(tensor) if tensor.dtype in _ROUNDED else math.nan
    if not tolerance or not math.isfinite(norm):
        return _exact(tensor, reference)
    allowed = tolerance * norm
    base = _scaled(reference.tensor, reference.share, like=tensor)
    difference = (tensor.to(base.dtype) - base).reshape(matrix_sides(tensor.shape))
    plain = Change(reference.source, reference.share)
    if _error(plain, tensor, reference) <= allowed:
        return plain
    spectrum = _decomposed(difference, reference.rank_bound)
    aim = allowed
    for _ in range(_ATTEMPTS):
        found = _rounded(difference, spectrum, aim, like=plain)
        if found is None:
            break
        error = _error(found, tensor, reference)
        if error <= allowed:
            return _shorter(found, tensor, reference)
        aim *= 0.98 * allowed / error
    return _exact(tensor, reference)


def _shorter(found: Change, tensor: Tensor, reference: Reference) -> Change:
    """A change, or the numbers bit for bit where these take no more bytes."""
    if 2 * len(found.payload) < tensor.nbytes:
        return found
    exact = _exact(tensor, reference)
    return exact if len(exact.payload) <= len(found.payload) else found


def _error(change: Change, tensor: Tensor, reference: Reference) -> float:
    """The norm of the error of what is restored."""
    restored = change.restored(tensor, reference.tensor)
    return _norm(restored.to(torch.float64) - tensor.to(torch.float64))


@dataclass(frozen=True)
class _Spectrum:
    """Singular values of a matrix, descending, and its singular vectors times them."""

    values: NDArray[np.float64]
    left: Tensor
    right: Tensor


def _decomposed(matrix: Tensor, most: int | None) -> _Spectrum | None:
    rows, columns = matrix.shape
    if min(rows, columns) < 2:
        return None
    vectors = eigh(smaller_gram(matrix))[1].flip(1)[:, :most]
    wide = matrix.to(torch.float64)
    other = (wide.T if rows <= columns else wide) @ vectors
    values = torch.linalg.vector_norm(other, dim=0)
    own = vectors * values
    left, right = (own, other) if rows <= columns else (other, own)
    return _Spectrum(values.numpy(), left, right)


@dataclass(frozen=True)
class _Way:
    """A way to store a matrix to within an error, with the bits that an ideal code takes for it."""

    bits: float
    rank: int = 0
    factor_step: float = 0.0
    step: float = 0.0


def _rounded(matrix: Tensor, spectrum: _Spectrum | None, allowed: float, *, like: Change) -> Change | None:
    """The shortest way to within an error; None where its numbers become too large."""
    way = _shortest_way(matrix, spectrum, allowed)
    values, codes, rest = b"", [np.zeros(0, dtype=np.int64)] * 3, matrix
    if way.rank and spectrum is not None:
        kept = spectrum.values[: way.rank].astype("<f4")
        values = kept.tobytes()
        for place, side in enumerate((spectrum.left, spectrum.right)):
            scaled = (side[:, : way.rank] / way.factor_step).round()
            if float(scaled.abs().max()) > _MOST_CODE:
                return None
            codes[place] = scaled.to(torch.int64).numpy()
        singular = torch.from_numpy(kept.astype(np.float64))
        rest = matrix - _product(codes[0], codes[1], singular, step=way.factor_step).to(matrix.dtype)
    if way.step:
        scaled = (rest / way.step).round()
        if float(scaled.abs().max()) > _MOST_CODE:
            return None
        codes[2] = scaled.to(torch.int64).numpy()
    widths = tuple(width_of(each) for each in codes)
    raw = values + b"".join(planes(each.reshape(-1), width) for each, width in zip(codes, widths, strict=True))
    return replace(
        like,
        rank=way.rank,
        factor_step=way.factor_step,
        step=way.step,
        widths=(widths[0], widths[1], widths[2]),
        payload=deflated(raw),
    )


def _shortest_way(matrix: Tensor, spectrum: _Spectrum | None, allowed: float) -> _Way:
    """Rounding alone, a pair alone, or a pair and the rounded remainder."""
    rows, columns = matrix.shape
    numbers = rows * columns
    step = allowed * math.sqrt(12 / numbers)
    energy = _norm(matrix) ** 2
    best = _Way(numbers * float(_bits(energy / numbers / step**2)), step=step)
    if spectrum is None:
        return best
    kept = np.cumsum(spectrum.values**2)
    for rank in _ranks(len(spectrum.values)):
        singular, left_out = spectrum.values[:rank], max(0.0, energy - float(kept[rank - 1]))
        side, squares = rows + columns, singular[singular > 0] ** 2

        def factors(factor_step: float, squares: NDArray[np.float64] = squares) -> float:
            columnwise = squares / factor_step**2
            return float(rows * _bits(columnwise / rows).sum() + columns * _bits(columnwise / columns).sum())

        head = 32.0 * rank
        if left_out < allowed**2:
            alone = math.sqrt(12 * (allowed**2 - left_out) / (side * rank))
            best = min(best, _Way(head + factors(alone), rank, alone), key=lambda way: way.bits)
        if (ratio := side * rank / numbers) < 1:
            # Where the derivatives of both parts by the step of the factors are equal.
            before = 1 + _GAUSSIAN * left_out / numbers / step**2
            coarse = step * math.sqrt(12 * before / (_GAUSSIAN * (1 - ratio)))
            rest = numbers / 2 * math.log2(before / (1 - ratio))
            best = min(best, _Way(head + factors(coarse) + rest, rank, coarse, step), key=lambda way: way.bits)
    return best


def _ranks(most: int) -> list[int]:
    """Ranks that are tried: all small ones, and from there in steps of an eighth."""
    found = [1]
    while found[-1] < most:
        found.append(min(most, found[-1] + max(1, found[-1] // 8)))
    return found


def _bits(variance: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """Bits of a rounded Gaussian number, by its variance in units of the squared step: exact for fine steps."""
    return np.asarray(0.5 * np.log2(1 + _GAUSSIAN * np.asarray(variance)), dtype=np.float64)


def _product(left: Codes, right: Codes, values: Tensor, *, step: float) -> Tensor:
    """The matrix of rounded factors, each of which holds the singular values once."""
    inverse = torch.where(values > 0, step * step / values, 0.0)
    return (torch.from_numpy(left).to(torch.float64) * inverse) @ torch.from_numpy(right).to(torch.float64).T


def _exact(tensor: Tensor, reference: Reference) -> Change:
    """The numbers bit for bit, beside those of the reference."""
    plain = Change(reference.source, reference.share, exact=True)
    base = _patterns_of(reference.tensor, reference.share, like=tensor)
    width = min(8, tensor.dtype.itemsize)
    return replace(plain, payload=deflated(planes(wrapped(bit_patterns(tensor) - base, width), width)))


def _restored_exactly(change: Change, like: Tensor, reference: Tensor | None) -> Tensor:
    """The tensor of the shape and dtype of `like` whose bits were stored."""
    base = _patterns_of(reference, change.share, like=like)
    width = min(8, like.dtype.itemsize)
    difference = from_planes(inflated(change.payload, len(base) * width), width)
    return from_bit_patterns(wrapped(base + difference, width), tuple(like.shape), like.dtype)


def _patterns_of(reference: Tensor | None, share: float, *, like: Tensor) -> Codes:
    """The bits of what is stored as the reference, in the dtype of the tensor."""
    if reference is None:
        return bit_patterns(torch.zeros(like.shape, dtype=like.dtype))
    if share == 1 or like.dtype not in _ROUNDED:
        return bit_patterns(reference.to(like.dtype))
    return bit_patterns(_scaled(reference, share, like=like).to(like.dtype))


def _scaled(reference: Tensor | None, share: float, *, like: Tensor) -> Tensor:
    """`share * reference` in the precision that is computed in, and zeros of nothing."""
    precise = torch.float64 if like.dtype == torch.float64 else torch.float32
    if reference is None:
        return torch.zeros(like.shape, dtype=precise)
    return reference.to(precise) * share


def matrix_sides(shape: Sequence[int]) -> tuple[int, int]:
    """The sides of a tensor as a matrix: its first dimension, and all others."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
