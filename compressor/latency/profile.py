"""What is known of a device, and how long a kernel takes on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from compressor.latency.kernels import (
    Amount,
    Convolution,
    IntegerProduct,
    Kernel,
    MatrixProduct,
    ModuleCall,
    Movement,
    Size,
)
from compressor.network import Kind
from compressor.quantize.products import most_rows

PROFILE_VERSION = 4
# Bytes or operations a second where no kernel is held up by them; JSON has no infinity.
UNLIMITED = 1e30

# Convolutions by which of their kernel's two last sides are wider than one.
Footprint = Literal["point", "column", "row", "area"]


@dataclass(frozen=True)
class Steps:
    """What a width costs that is no multiple of `period`: as much as one of a further `effective[i]` numbers.

    `residues` ascend from 0 to the period; between them `effective` is interpolated.
    """

    period: int = 1
    residues: tuple[int, ...] = (0, 1)
    effective: tuple[float, ...] = (0.0, 1.0)

    def width(self, width: Size) -> Amount:
        """The width that costs as much and is a multiple of the period."""
        if self.period == 1:
            return np.asarray(width, dtype=np.float64)
        whole, residue = np.divmod(width, self.period)
        return np.asarray(whole * self.period + np.interp(residue, self.residues, self.effective))

    def excess(self, multiple: int) -> float:
        """What the multiples of a number cost beside their own width, on average, as a share of the period."""
        residues = np.arange(0, self.period, multiple)
        return float(np.mean(self.width(residues) - residues)) / self.period


def whole_tiles(tile: int) -> Steps:
    """A device that computes whole tiles."""
    return Steps(tile, (0, 1, tile), (0.0, float(tile), float(tile)))


@dataclass(frozen=True)
class Corrections:
    """Measured seconds over those of a roofline, on a grid of sizes; between its points interpolated in logarithms.

    `factors` has the last of the axes' sizes move fastest. Outside of the grid the nearest factor holds.
    """

    axes: tuple[tuple[float, ...], ...] = ()
    factors: tuple[float, ...] = ()

    def at(self, sizes: Sequence[Size]) -> Amount:
        """The factor at each of some sizes."""
        if not self.axes:
            return 1.0
        logs = np.log(np.array(self.factors)).reshape([len(axis) for axis in self.axes])
        places = [_place(axis, size) for axis, size in zip(self.axes, sizes, strict=True)]
        total: Amount = 0.0
        for corner in np.ndindex(*(2,) * len(places)):
            index = tuple(low + up for (low, _), up in zip(places, corner, strict=True))
            share: Amount = 1.0
            for (_, part), up in zip(places, corner, strict=True):
                share = share * (part if up else 1 - part)
            total = total + share * logs[index]
        return np.exp(total)


def _place(axis: Sequence[float], size: Size) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The point of an axis below a size, and how far it is to the next one, in logarithms."""
    points = np.log(np.array(axis))
    at = np.clip(np.log(np.maximum(np.asarray(size, dtype=np.float64), 1e-9)), points[0], points[-1])
    low = np.clip(np.searchsorted(points, at) - 1, 0, len(points) - 2)
    return low, (at - points[low]) / (points[low + 1] - points[low])


@dataclass(frozen=True)
class Speed:
    """How fast a device runs one kind of kernel.

    Attributes:
        launch: Seconds of a kernel that does nothing.
        bandwidth: Bytes a second.
        flops: Operations a second.
        inner: Widths of inputs that cost more than their numbers.
        columns: Widths of outputs that do.
        corrections: What was measured, over what these constants say.
    """

    launch: float
    bandwidth: float
    flops: float = UNLIMITED
    inner: Steps = Steps()
    columns: Steps = Steps()
    corrections: Corrections = Corrections()

    def seconds(self, kernel: Kernel, whole: Kernel, *, overlaps: bool) -> Amount:
        """Seconds without corrections, of a kernel and the one of whole steps that computes as long.

        Where launches overlap, it is the largest of the launch, the bytes, and the operations; else their sum.
        """
        if overlaps:
            work = np.maximum(kernel.nbytes / self.bandwidth, whole.flops / self.flops)
            return np.maximum(work, self.launch)
        return self.launch + whole.nbytes / self.bandwidth + whole.flops / self.flops


@dataclass(frozen=True)
class DtypeSpeeds:
    """The speed of a device in one dtype.

    Attributes:
        products: Matrix products.
        moves: Numbers that are moved, by how.
        convolutions: Convolutions by their footprint; without any they are as fast as matrix products.
        unfolded: Those that are run as products with patches; without any they are as fast as the others.
        integers: Products with weights of integers by the kernels for them, by the bits: `8`, `4`, `3` for fewer, and
            `6` for 5 to 7. Without any, weights are dequantized.
    """

    products: Speed
    moves: Mapping[str, Speed]
    convolutions: Mapping[str, Speed] = field(default_factory=dict)
    unfolded: Mapping[str, Speed] = field(default_factory=dict)
    integers: Mapping[str, Speed] = field(default_factory=dict)


@dataclass(frozen=True)
class DeviceProfile:
    """The constants of one device, measured or from data sheets.

    Attributes:
        name: The device.
        threads: Threads that PyTorch computes with, on a CPU.
        torch_version: The version of PyTorch; empty where nothing was measured at hand.
        call: Seconds to call a module.
        dtypes: The speed in each dtype, by its name without `torch.`.
        overlaps: Whether a kernel computes while the next one is launched.
        source: Where the constants are from.
    """

    name: str
    threads: int
    torch_version: str
    call: float
    dtypes: Mapping[str, DtypeSpeeds]
    overlaps: bool = False
    source: str = ""

    @property
    def measured(self) -> bool:
        """Whether the constants were measured on the device at hand."""
        return self.torch_version != ""

    def seconds(self, kernel: Kernel, dtype: torch.dtype) -> Amount:
        """Seconds that a kernel takes, at each of its sizes.

        Source: the roofline model (Williams et al. 2009), with what was measured on a grid of sizes in proportion.
        """
        if isinstance(kernel, ModuleCall):
            return self.call
        speeds = self.of(dtype)
        if isinstance(kernel, IntegerProduct):
            speed = speeds.integers.get(_kernel_name(kernel))
            taken = np.asarray(speed is not None and kernel.taken)
            dequantized: Amount = 0.0
            if not taken.all():
                dequantized = self.seconds(kernel.dequantized, dtype) + self.seconds(kernel.dense, dtype)
            return dequantized if speed is None else np.where(taken, self._timed(kernel, speed), dequantized)
        if isinstance(kernel, Convolution) and speeds.unfolded:
            unfolded = is_unfolded(kernel, self.threads)
            if np.any(unfolded):
                apart = self._timed(kernel, speeds.unfolded[footprint(kernel.kernel)])
                return np.where(unfolded, apart, self._timed(kernel, _speed(kernel, speeds)))
        return self._timed(kernel, _speed(kernel, speeds))

    def _timed(self, kernel: Kernel, speed: Speed) -> Amount:
        whole = _in_whole_steps(kernel, speed)
        return speed.seconds(kernel, whole, overlaps=self.overlaps) * speed.corrections.at(grid_sizes(whole))

    def rank_multiple(self, kind: Kind, dtype: torch.dtype, *, width: int | None = None) -> int:
        """What the ranks of a layer should be multiples of, so that none costs as much as a larger one.

        Args:
            kind: What the layer is.
            dtype: Its dtype.
            width: The largest rank that it can have, of which a multiple is an eighth at most.
        """
        speeds = self.of(dtype)
        of_kind = list(speeds.convolutions.values()) if "convolution" in kind else []
        steps = [each for speed in of_kind or [speeds.products] for each in (speed.inner, speed.columns)]
        return max(_multiple(each, width) for each in steps)

    def of(self, dtype: torch.dtype) -> DtypeSpeeds:
        """The speeds in a dtype; in one that is not known those of the widest that is."""
        name = dtype_name(dtype)
        return self.dtypes[name if name in self.dtypes else _widest(self.dtypes)]

    def to_dict(self) -> dict[str, Any]:
        return {"version": PROFILE_VERSION} | asdict(self)

    @staticmethod
    def from_dict(document: Mapping[str, Any]) -> DeviceProfile:
        """The profile of a document that `to_dict` gave; ValueError, TypeError, or KeyError where it is none."""
        values = dict(document)
        if values.pop("version", None) != PROFILE_VERSION:
            raise ValueError("it is of another version")
        values["dtypes"] = {
            name: DtypeSpeeds(
                _speed_of(each["products"]),
                {how: _speed_of(speed) for how, speed in each["moves"].items()},
                {kind: _speed_of(speed) for kind, speed in each["convolutions"].items()},
                {kind: _speed_of(speed) for kind, speed in each["unfolded"].items()},
                {name: _speed_of(speed) for name, speed in each["integers"].items()},
            )
            for name, each in values["dtypes"].items()
        }
        return DeviceProfile(**values)


def _kernel_name(kernel: IntegerProduct) -> str:
    """What is run of the kernels for integers; empty where the weight is dequantized."""
    if kernel.bits == 8:
        return "8"
    few = float(np.max(kernel.rows)) <= most_rows(kernel.bits)
    return str(min(max(kernel.bits, 3), 4) if kernel.bits <= 4 else 6) if few else ""


def _speed(kernel: Kernel, speeds: DtypeSpeeds) -> Speed:
    if isinstance(kernel, Movement):
        return speeds.moves[kernel.how]
    if isinstance(kernel, Convolution):
        return speeds.convolutions.get(footprint(kernel.kernel), speeds.products)
    return speeds.products


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def footprint(kernel: tuple[int, ...]) -> Footprint:
    """Which of a kernel's two last sides are wider than one; a line is a row."""
    tall = len(kernel) > 1 and max(kernel[:-1]) > 1
    wide = kernel[-1] > 1
    if tall:
        return "area" if wide else "column"
    return "row" if wide else "point"


def is_unfolded(kernel: Convolution, threads: int) -> bool | npt.NDArray[np.bool_]:
    """Whether PyTorch runs a convolution in float32 on a CPU as a product with its patches, and not with oneDNN.

    Source: `use_mkldnn` in aten/src/ATen/native/Convolution.cpp.
    """
    if kernel.itemsize != 4 or kernel.transposed or len(kernel.kernel) > 2:
        return False
    strided = kernel.in_size != kernel.out_size
    if threads == 1 and max(kernel.kernel) == 1 and not strided and kernel.batch < 16:
        return True
    numbers = np.asarray(kernel.in_channels) * (kernel.batch * math.prod(kernel.in_size))
    return np.asarray((numbers <= 20480) & (kernel.batch == 1) & (min(kernel.kernel) <= 3))


def grid_sizes(kernel: Kernel) -> tuple[Size, ...]:
    """The sizes of a kernel along the axes of the grids that are measured."""
    if isinstance(kernel, MatrixProduct):
        return kernel.rows, kernel.inner, kernel.columns
    if isinstance(kernel, Convolution):
        return kernel.batch, kernel.positions / kernel.batch, kernel.in_channels, kernel.out_channels
    if isinstance(kernel, Movement):
        return (kernel.rows * kernel.columns,)
    return ()


def _in_whole_steps(kernel: Kernel, speed: Speed) -> Kernel:
    """The kernel of whole steps that takes as long."""
    if isinstance(kernel, MatrixProduct):
        # A product with one row is another one: it reads a weight once, and has no tiles.
        one = np.asarray(kernel.rows) == 1
        inner = np.where(one, kernel.inner, speed.inner.width(kernel.inner))
        columns = np.where(one, kernel.columns, speed.columns.width(kernel.columns))
        return replace(kernel, inner=inner, columns=columns)
    if isinstance(kernel, Convolution):
        # Images have fewer channels than a block of them: kernels of their own read them as they are. Each group has
        # blocks of its own.
        groups = kernel.groups
        few = np.asarray((groups == 1) & (np.asarray(kernel.in_channels) < speed.inner.period))
        channels = {
            "in_channels": np.where(few, kernel.in_channels, groups * speed.inner.width(kernel.in_channels // groups)),
            "out_channels": groups * speed.columns.width(kernel.out_channels // groups),
        }
        return Convolution(**{**vars(kernel), **channels})
    return kernel


def _multiple(steps: Steps, width: int | None) -> int:
    """The smallest part of a period whose multiples cost next to nothing beside their own width."""
    multiple, most = 1, steps.period if width is None else min(steps.period, max(1, width // 8))
    while multiple * 2 <= most and steps.excess(multiple) > 0.08:
        multiple *= 2
    return multiple


def _widest(dtypes: Mapping[str, DtypeSpeeds]) -> str:
    return max(dtypes, key=lambda name: getattr(torch, name).itemsize)


def _speed_of(document: Mapping[str, Any]) -> Speed:
    values = dict(document)
    inner, columns, corrections = (values.pop(name) for name in ("inner", "columns", "corrections"))
    axes = tuple(tuple(map(float, axis)) for axis in corrections["axes"])
    factors = tuple(map(float, corrections["factors"]))
    if len(factors) != (math.prod(map(len, axes)) if axes else 0) or any(len(axis) < 2 for axis in axes):
        raise ValueError("its factors do not fit its axes")
    return Speed(**values, inner=_steps_of(inner), columns=_steps_of(columns), corrections=Corrections(axes, factors))


def _steps_of(document: Mapping[str, Any]) -> Steps:
    return Steps(int(document["period"]), tuple(document["residues"]), tuple(document["effective"]))
