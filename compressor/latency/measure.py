"""The constants of a device, measured in some seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import numpy as np
import numpy.typing as npt
import torch

from compressor.engine import Run
from compressor.latency.kernels import Convolution, IntegerProduct, Kernel, MatrixProduct, ModuleCall, Movement
from compressor.latency.profile import (
    UNLIMITED,
    Corrections,
    DeviceProfile,
    DtypeSpeeds,
    Footprint,
    Speed,
    Steps,
    dtype_name,
    is_unfolded,
)
from compressor.latency.stopwatch import Stopwatch, default_clock
from compressor.quantize.products import has_kernel, most_rows

# Seconds of a kernel in a dtype.
Timer = Callable[[Kernel, torch.dtype], float]
# The kernels at the points of a grid, those along its last axis one after the other; None where there is none.
Grid = Sequence[Kernel | None]
Axes = tuple[tuple[int, ...], ...]

_KERNELS: dict[Footprint, tuple[int, int]] = {"point": (1, 1), "row": (1, 3), "area": (3, 3)}
STEP = "Measure the device"


@dataclass(frozen=True)
class MeasuringSettings:
    """The sizes at which a device is measured.

    Attributes:
        rows: Rows of matrix products.
        sides: Widths of their inputs and outputs.
        integer_rows: Rows of products with integers.
        integer_sides: Widths of their inputs and outputs.
        batches: Numbers of images of convolutions.
        images: Sides of these images.
        few: Channels of images that no convolution has changed yet.
        channels: Numbers of channels, in and out.
        period: Widths are expected to cost the more the farther they are from a multiple of this.
        residues: The widths beside a multiple that are measured.
        most_seconds: Seconds of a kernel after which none of more operations is measured.
        rounds: How often each is measured, the fastest counts: not in a row, because others use the machine too.
    """

    rows: tuple[int, ...] = (1, 2, 8, 32, 128, 512)
    sides: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 4096)
    batches: tuple[int, ...] = (2, 32)
    images: tuple[int, ...] = (2, 7, 28)
    integer_rows: tuple[int, ...] = (1, 4, 8, 16, 32, 64, 128, 512)
    integer_sides: tuple[int, ...] = (64, 256, 1024, 4096)
    few: int = 3
    channels: tuple[int, ...] = (16, 64, 256, 512)
    period: int = 16
    residues: tuple[int, ...] = (0, 1, 4, 8, 12, 15, 16)
    most_seconds: float = 0.025
    rounds: int = 2


CPU = MeasuringSettings()
ACCELERATOR = MeasuringSettings(
    rows=(1, 8, 64, 512, 4096),
    sides=(64, 256, 1024, 4096, 8192),
    period=128,
    residues=(0, 1, 8, 16, 32, 64, 96, 127, 128),
)


def measure_profile(
    run: Run,
    dtypes: Sequence[torch.dtype],
    *,
    convolutions: bool = True,
    timer: Timer | None = None,
    settings: MeasuringSettings | None = None,
) -> DeviceProfile:
    """Measure the device of a run in some dtypes.

    Args:
        run: Its device, and who is told how far it is.
        dtypes: The dtypes.
        convolutions: Whether convolutions are measured; they take as long as all the rest.
        timer: What times a kernel; by default the kernel is run.
        settings: At which sizes; by default those for a CPU or an accelerator.
    """
    cpu = run.device.type == "cpu"
    settings = settings or (CPU if cpu else ACCELERATOR)
    timer = timer or Stopwatch(run.device, default_clock(run.device)).seconds
    measuring = _Measuring(run, timer, settings, overlaps=not cpu, dtypes=dtypes, convolutions=convolutions)
    speeds = {dtype_name(dtype): measuring.speeds(dtype) for dtype in dtypes}
    return DeviceProfile(
        name=device_name(run.device),
        threads=torch.get_num_threads() if cpu else 0,
        torch_version=str(torch.__version__),
        call=timer(ModuleCall(itemsize=4), torch.float32) if cpu else 0.0,
        dtypes=speeds,
        overlaps=not cpu,
        source="measured",
    )


def device_name(device: torch.device) -> str:
    """The name of the model of a device."""
    if device.type == "cpu":
        return _cpu_name()
    named: Callable[[torch.device], str] | None = getattr(getattr(torch, device.type, None), "get_device_name", None)
    return device.type if named is None else named(device)


def _cpu_name() -> str:
    import platform

    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123
            known = dict(line.partition(":")[::2] for line in lines if ":" in line)
        fields = {key.strip(): value.strip() for key, value in known.items()}
        numbers = "-".join(fields[key] for key in ("cpu family", "model") if key in fields)
        return f"{fields.get('model name', platform.machine())} {numbers}".strip()
    except OSError:
        return platform.processor() or platform.machine()


class _Measuring:
    """One measurement: its timer, and how far it is."""

    def __init__(
        self,
        run: Run,
        timer: Timer,
        settings: MeasuringSettings,
        *,
        overlaps: bool,
        dtypes: Sequence[torch.dtype],
        convolutions: bool,
    ) -> None:
        self.run, self.timer, self.settings, self.overlaps = run, timer, settings, overlaps
        self.convolutions = convolutions
        self.done, self.total = 0, len(dtypes) * (1 + len(_KERNELS) * convolutions)

    def speeds(self, dtype: torch.dtype) -> DtypeSpeeds:
        itemsize, settings = dtype.itemsize, self.settings
        self.run.report(STEP, self.done, self.total)
        grid = [
            MatrixProduct(rows=rows, inner=inner, columns=columns, itemsize=itemsize)
            for rows, inner, columns in product(settings.rows, settings.sides, settings.sides)
        ]
        axes = (settings.rows, settings.sides, settings.sides)
        wide = MatrixProduct(rows=128, inner=512, columns=512, itemsize=itemsize)
        products = replace(
            self._speed(grid, axes, dtype),
            inner=self._steps(lambda width: replace(wide, inner=width), dtype),
            columns=self._steps(lambda width: replace(wide, columns=width), dtype),
        )
        moves = {how: self._moves(how, dtype) for how in ("lookup", "copy", "add", "order", "dequantize")}
        self._finished()
        found, unfolded = self._convolutions(dtype) if self.convolutions else ({}, {})
        return DtypeSpeeds(products, moves, found, unfolded, self.integers(dtype))

    def integers(self, dtype: torch.dtype) -> dict[str, Speed]:
        """Products with integers, by the kernels that there are for a dtype."""
        sides, found = self.settings.integer_sides, dict[str, Speed]()
        for bits in (3, 4, 6, 8):
            dtypes = (torch.bfloat16, torch.float32) if bits == 8 else (torch.bfloat16,)
            if dtype not in dtypes or not has_kernel(8 if bits == 8 else 4, self.run.device):
                continue
            rows = [rows for rows in self.settings.integer_rows if bits == 8 or rows <= most_rows(bits)]
            grid = [
                IntegerProduct(rows=each, inner=inner, columns=columns, bits=bits, itemsize=dtype.itemsize)
                for each, inner, columns in product(rows, sides, sides)
            ]
            found[str(bits)] = self._speed(grid, (tuple(rows), sides, sides), dtype)
        return found

    def _convolutions(self, dtype: torch.dtype) -> tuple[dict[str, Speed], dict[str, Speed]]:
        """Convolutions by their footprint, and those that are unfolded."""
        area = Convolution(
            batch=8,
            in_channels=64,
            out_channels=64,
            kernel=(3, 3),
            in_size=(14, 14),
            out_size=(14, 14),
            itemsize=dtype.itemsize,
        )
        found, unfolded = dict[str, Speed](), dict[str, Speed]()
        for name, kernel in _KERNELS.items():
            like = replace(area, kernel=kernel)
            found[name] = replace(
                self._speed(*self._images(like), dtype),
                inner=self._steps(partial(_with_inputs, like), dtype),
                columns=self._steps(partial(_with_outputs, like), dtype),
            )
            places, axes = self._unfolded_images(like)
            if any(place is not None for place in places):
                unfolded[name] = self._speed(places, axes, dtype)
            self._finished()
        for of_kind in (found, unfolded):
            if "row" in of_kind:
                of_kind["column"] = of_kind["row"]
        return found, unfolded

    def _finished(self) -> None:
        self.done += 1
        self.run.report(STEP, self.done, self.total)

    def _images(self, like: Convolution) -> tuple[Grid, Axes]:
        """Convolutions like one that are not unfolded: with a stride where they would be without."""
        kernels, axes = self._grid(like, self.settings.batches, self.settings.images)
        return [
            replace(each, in_size=(2 * each.in_size[0], 2 * each.in_size[1])) if self._unfolds(each) else each
            for each in kernels
        ], axes

    def _unfolded_images(self, like: Convolution) -> tuple[Grid, Axes]:
        """Convolutions like one that are unfolded, and None in the places of the others."""
        kernels, axes = self._grid(like, (1, 8), (1, *self.settings.images))
        return [each if self._unfolds(each) else None for each in kernels], axes

    def _grid(
        self, like: Convolution, batches: tuple[int, ...], images: tuple[int, ...]
    ) -> tuple[list[Convolution], Axes]:
        """Convolutions like one, on a grid of batches, images, and channels."""
        inner, outer = (self.settings.few, *self.settings.channels), self.settings.channels
        axes = (batches, tuple(side * side for side in images), inner, outer)
        return [
            replace(
                like, batch=batch, in_channels=c_in, out_channels=c_out, in_size=(side, side), out_size=(side, side)
            )
            for batch, side, c_in, c_out in product(batches, images, inner, outer)
        ], axes

    def _unfolds(self, kernel: Convolution) -> bool:
        return not self.overlaps and bool(is_unfolded(kernel, torch.get_num_threads()))

    def _speed(self, places: Grid, axes: Axes, dtype: torch.dtype) -> Speed:
        """The roofline that is closest to the kernels of a grid, and what each takes over what it says."""
        grid = {place: kernel for place, kernel in enumerate(places) if kernel is not None}
        seconds: dict[int, float] = {}
        for _ in range(self.settings.rounds):
            limit = math.inf
            for place in sorted(grid, key=lambda place: float(grid[place].flops)):
                if float(grid[place].flops) > limit:
                    break
                taken = self.timer(grid[place], dtype)
                seconds[place] = min(taken, seconds.get(place, math.inf))
                if taken > self.settings.most_seconds:
                    limit = float(grid[place].flops)
        speed = _roofline([grid[place] for place in seconds], list(seconds.values()), overlaps=self.overlaps)
        factors = np.full([len(axis) for axis in axes], np.nan)
        for place, taken in seconds.items():
            plain = float(speed.seconds(grid[place], grid[place], overlaps=self.overlaps))
            factors.reshape(-1)[place] = taken / plain
        factors = _filled(factors)
        known = tuple(tuple(map(float, axis)) for axis in axes)
        return replace(speed, corrections=Corrections(known, tuple(float(each) for each in factors.ravel())))

    def _steps(self, of_width: Callable[[int], Kernel], dtype: torch.dtype) -> Steps:
        """What widths cost that are no multiple of the period."""
        period, residues = self.settings.period, self.settings.residues
        base = 4 * period
        widths = [*(base + residue for residue in residues), 2 * base]
        seconds = np.min(
            [[self.timer(of_width(width), dtype) for width in widths] for _ in range(2 * self.settings.rounds)], axis=0
        )
        each = (seconds[-1] - seconds[0]) / base
        if each <= 0:
            return Steps()
        effective = np.clip((seconds[:-1] - seconds[0]) / each, 0, 4 * period)
        effective[0], effective[-1] = 0, period
        return Steps(period, residues, tuple(float(number) for number in effective))

    def _moves(self, how: str, dtype: torch.dtype) -> Speed:
        shapes = ((1, 64), (32, 256), (128, 1024), (512, 4096))
        kernels: list[Kernel] = [
            Movement(how=how, rows=rows, columns=columns, itemsize=dtype.itemsize)  # type: ignore[arg-type]
            for rows, columns in shapes
        ]
        seconds = [min(self.timer(kernel, dtype) for _ in range(self.settings.rounds)) for kernel in kernels]
        numbers = tuple(float(rows * columns) for rows, columns in shapes)
        speed = _roofline(kernels, seconds, overlaps=self.overlaps)
        factors = [
            taken / float(speed.seconds(kernel, kernel, overlaps=self.overlaps))
            for taken, kernel in zip(seconds, kernels, strict=True)
        ]
        return replace(speed, corrections=Corrections((numbers,), tuple(factors)))


def _with_inputs(like: Convolution, width: int) -> Kernel:
    return replace(like, in_channels=width)


def _with_outputs(like: Convolution, width: int) -> Kernel:
    return replace(like, out_channels=width)


def _roofline(kernels: Sequence[Kernel], seconds: Sequence[float], *, overlaps: bool) -> Speed:
    """The launch, bandwidth, and operations a second that are closest to what was measured, in proportion."""
    taken = np.array(seconds)
    nbytes = np.array([float(kernel.nbytes) for kernel in kernels])
    flops = np.array([float(kernel.flops) for kernel in kernels])
    if overlaps:
        rate = float((flops / taken).max())
        return Speed(float(taken.min()), float((nbytes / taken).max()), rate or UNLIMITED)
    terms = np.stack([np.ones_like(taken), nbytes, flops])
    costs = np.zeros(3)
    used = [i for i in range(3) if terms[i].any()]
    # Constants are positive: what would be negative is left out, the least certain first.
    while used:
        scaled = (terms[used] / taken).T
        scale = scaled.max(axis=0)
        found = np.linalg.lstsq(scaled / scale, np.ones(len(taken)), rcond=None)[0] / scale
        if (found > 0).all():
            costs[used] = found
            break
        used.remove(used[int(np.argmin(found * scale))])
    launch, byte, flop = (float(cost) for cost in costs)
    return Speed(launch, 1 / byte if byte else UNLIMITED, 1 / flop if flop else UNLIMITED)


def _filled(factors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """What was not measured because it takes too long is what is next to it, along the first axes first."""
    for axis in range(factors.ndim):
        moved = np.moveaxis(factors, axis, 0)
        for place in range(1, len(moved)):
            unknown = np.isnan(moved[place])
            moved[place][unknown] = moved[place - 1][unknown]
    return np.asarray(np.nan_to_num(factors, nan=1.0))
