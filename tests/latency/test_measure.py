"""Measuring a device that is known by a formula finds the formula again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressor.engine import Run
from compressor.latency import Convolution, Kernel, MatrixProduct, ModuleCall, Movement
from compressor.latency.measure import STEP, measure_profile
from compressor.latency.profile import is_unfolded
from tests.latency.fake import SMALL, FakeDevice

RUN = Run(torch.device("cpu"))
ACCELERATOR = Run(torch.device("meta"))


def kernels(itemsize: int) -> list[Kernel]:
    sizes = ((1, 16, 16), (1, 100, 300), (7, 33, 65), (5000, 4096, 14336))
    matrices = [MatrixProduct(rows=r, inner=i, columns=c, itemsize=itemsize) for r, i, c in sizes]
    pairs = ((24, 48), (200, 17))
    images = [
        Convolution(
            batch=3, in_channels=a, out_channels=b, kernel=(3, 3), in_size=(9, 9), out_size=(9, 9), itemsize=itemsize
        )
        for a, b in pairs
    ]
    return [*matrices, *images, Movement(how="add", rows=50, columns=70, itemsize=itemsize)]


@given(st.floats(1e-7, 1e-4), st.floats(1e9, 1e13), st.floats(1e10, 1e15))
def test_the_constants_of_a_device_that_adds_are_found(launch: float, bandwidth: float, flops: float) -> None:
    device = FakeDevice(launch, bandwidth, flops)
    profile = measure_profile(RUN, [torch.bfloat16], timer=device, settings=SMALL)
    speed = profile.dtypes["bfloat16"].products
    assert speed.launch == pytest.approx(launch, rel=0.02)
    # A constant counts as far as it makes a difference to the kernels that were timed.
    for kernel in kernels(2):
        assert float(profile.seconds(kernel, torch.bfloat16)) == pytest.approx(float(device.seconds(kernel)), rel=0.02)
    assert profile.seconds(ModuleCall(itemsize=2), torch.bfloat16) == device.call


def test_the_constants_of_a_device_that_overlaps_are_found() -> None:
    device = FakeDevice(5e-6, 2e12, 4e13, overlaps=True)
    settings = SMALL.__class__(**{**vars(SMALL), "rows": (1, 64, 4096), "sides": (64, 1024, 8192), "most_seconds": 1.0})
    profile = measure_profile(ACCELERATOR, [torch.bfloat16], timer=device, settings=settings)
    speed = profile.dtypes["bfloat16"].products
    assert (speed.launch, speed.bandwidth, speed.flops) == pytest.approx((5e-6, 2e12, 4e13), rel=0.01)
    assert profile.overlaps
    assert profile.seconds(ModuleCall(itemsize=2), torch.bfloat16) == 0


@pytest.mark.parametrize(("tile", "multiple"), [(1, 1), (8, 8), (16, 16)])
def test_tiles_are_found_and_ranks_are_multiples_of_them(tile: int, multiple: int) -> None:
    device = FakeDevice(launch=1e-7, bandwidth=1e13, tile=tile)
    settings = SMALL.__class__(**{**vars(SMALL), "residues": tuple(range(17))})
    profile = measure_profile(RUN, [torch.float32], timer=device, settings=settings)
    assert profile.rank_multiple("linear", torch.float32) == multiple
    for columns in range(130, 150):
        kernel = MatrixProduct(rows=64, inner=64, columns=columns, itemsize=4)
        assert float(profile.seconds(kernel, torch.float32)) == pytest.approx(float(device.seconds(kernel)), rel=0.03)


def test_a_kernel_that_takes_long_is_the_largest() -> None:
    device = FakeDevice(flops=1e9)
    settings = SMALL.__class__(**{**vars(SMALL), "most_seconds": 1e-3})
    profile = measure_profile(RUN, [torch.float32], convolutions=False, timer=device, settings=settings)
    grid = [
        kernel
        for kernel, _ in device.timed
        if isinstance(kernel, MatrixProduct) and {kernel.inner, kernel.columns} <= set(settings.sides)
    ]
    long = [float(kernel.flops) for kernel in grid if float(device.seconds(kernel)) > 1e-3]
    assert long
    assert set(long) == {min(long)}
    assert np.isfinite(profile.dtypes["float32"].products.corrections.factors).all()


def test_progress_is_told_and_convolutions_only_timed_where_asked() -> None:
    device, told = FakeDevice(), []
    run = Run(torch.device("cpu"), progress=lambda step, done, total: told.append((step, done, total)))
    profile = measure_profile(run, [torch.float32], convolutions=False, timer=device, settings=SMALL)
    assert told == [(STEP, 0, 1), (STEP, 1, 1)]
    assert not profile.dtypes["float32"].convolutions
    assert not any(isinstance(kernel, Convolution) for kernel, _ in device.timed)
    told.clear()
    measure_profile(run, [torch.float32, torch.bfloat16], timer=device, settings=SMALL)
    assert told[-1] == (STEP, 8, 8)


def test_convolutions_that_pytorch_unfolds_are_measured_apart() -> None:
    def timer(kernel: Kernel, _: torch.dtype) -> float:
        slow = isinstance(kernel, Convolution) and bool(is_unfolded(kernel, torch.get_num_threads()))
        return float(FakeDevice().seconds(kernel)) * (3 if slow else 1)

    profile = measure_profile(RUN, [torch.float32, torch.bfloat16], timer=timer, settings=SMALL)
    assert not profile.dtypes["bfloat16"].unfolded
    small = Convolution(
        batch=1, in_channels=16, out_channels=16, kernel=(3, 3), in_size=(7, 7), out_size=(7, 7), itemsize=4
    )
    for kernel in (small, replace(small, batch=8)):
        assert float(profile.seconds(kernel, torch.float32)) == pytest.approx(timer(kernel, torch.float32), rel=0.05)


def test_few_channels_are_not_filled_up() -> None:
    def timer(kernel: Kernel, _: torch.dtype) -> float:
        if isinstance(kernel, Convolution) and kernel.in_channels > 4:
            kernel = replace(kernel, in_channels=-(-int(kernel.in_channels) // 16) * 16)
        return float(FakeDevice().seconds(kernel))

    profile = measure_profile(RUN, [torch.bfloat16], timer=timer, settings=SMALL)
    image = Convolution(
        batch=8, in_channels=3, out_channels=64, kernel=(7, 7), in_size=(14, 14), out_size=(14, 14), itemsize=2
    )
    for channels in (3, 16, 24, 32):
        kernel = replace(image, in_channels=channels)
        assert float(profile.seconds(kernel, torch.bfloat16)) == pytest.approx(timer(kernel, torch.bfloat16), rel=0.1)
