"""What a device is asked to do when a layer runs: one kernel each, with its sizes, operations, and bytes.

Sizes are numbers, or arrays of one number for each of many ranks; then so are operations, bytes, and seconds.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

# A size, at one rank or at each of many.
Size = float | npt.NDArray[Any]
# Seconds, operations, or bytes, at one rank or at each of many.
Amount = float | npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Kernel(ABC):
    """One operation that a device launches, on numbers of `itemsize` bytes."""

    itemsize: int

    @property
    @abstractmethod
    def flops(self) -> Amount:
        """Floating-point operations of its products, two a multiply-accumulate."""

    @property
    @abstractmethod
    def nbytes(self) -> Amount:
        """Bytes that it reads and writes, each tensor once."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ModuleCall(Kernel):
    """The call of a module in Python, before anything is computed."""

    @property
    def flops(self) -> Amount:
        return 0.0

    @property
    def nbytes(self) -> Amount:
        return 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class MatrixProduct(Kernel):
    """A linear layer: `rows x inner` inputs times the weight of `inner x columns`."""

    rows: Size
    inner: Size
    columns: Size

    @property
    def flops(self) -> Amount:
        return 2.0 * self.rows * self.inner * self.columns

    @property
    def nbytes(self) -> Amount:
        numbers = 1.0 * self.inner * self.columns + 1.0 * self.rows * (self.inner + self.columns)
        return numbers * self.itemsize


@dataclass(frozen=True, kw_only=True, eq=False)
class IntegerProduct(MatrixProduct):
    """A linear layer whose weight is integers of `bits` bits.

    By a kernel for integers where the device has one, and `taken` says whether such kernels take its sizes; else by
    dequantizing the weight.
    """

    bits: int
    taken: bool | npt.NDArray[np.bool_] = True

    @property
    def nbytes(self) -> Amount:
        return self.inner * self.columns * self.bits / 8 + 1.0 * self.rows * (self.inner + self.columns) * self.itemsize

    @property
    def dense(self) -> MatrixProduct:
        """The product with the dequantized weight."""
        return MatrixProduct(rows=self.rows, inner=self.inner, columns=self.columns, itemsize=self.itemsize)

    @property
    def dequantized(self) -> Movement:
        """What is written to dequantize the weight."""
        return Movement(how="dequantize", rows=self.columns, columns=self.inner, itemsize=self.itemsize)


@dataclass(frozen=True, kw_only=True, eq=False)
class Convolution(Kernel):
    """A convolution, transposed or not, of `kernel`, on `batch` inputs of spatial sizes `in_size`.

    The numbers of channels are those of all groups together, which are multiplied each by itself.
    """

    batch: int
    in_channels: Size
    out_channels: Size
    kernel: tuple[int, ...]
    in_size: tuple[int, ...]
    out_size: tuple[int, ...]
    transposed: bool = False
    groups: int = 1

    @property
    def positions(self) -> int:
        """Positions at which the kernel is applied, in the whole batch."""
        return self.batch * math.prod(self.in_size if self.transposed else self.out_size)

    @property
    def flops(self) -> Amount:
        return 2.0 * self.positions * self._weights

    @property
    def _weights(self) -> Amount:
        return 1.0 * self.in_channels * self.out_channels * math.prod(self.kernel) / self.groups

    @property
    def nbytes(self) -> Amount:
        weights = self._weights
        inputs = 1.0 * self.batch * self.in_channels * math.prod(self.in_size)
        outputs = 1.0 * self.batch * self.out_channels * math.prod(self.out_size)
        return (weights + inputs + outputs) * self.itemsize


@dataclass(frozen=True, kw_only=True, eq=False)
class Movement(Kernel):
    """Numbers that are moved: rows looked up in a table, copied, added to, or with their columns put in order.

    Or weights that are dequantized, from integers of a few bits.
    """

    how: Literal["lookup", "copy", "add", "order", "dequantize"]
    rows: Size
    columns: Size

    @property
    def flops(self) -> Amount:
        return 0.0

    @property
    def nbytes(self) -> Amount:
        return 2.0 * self.rows * self.columns * self.itemsize
