"""Kernels are run as what they say they are, and timed by the clock that is given."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from compressor.latency import Convolution, Kernel, MatrixProduct, ModuleCall, Movement
from compressor.latency.stopwatch import Stopwatch, StopwatchSettings

FEW = StopwatchSettings(layers=3, memory=2**16)
KERNELS: list[Kernel] = [
    MatrixProduct(rows=5, inner=24, columns=16, itemsize=4),
    Convolution(batch=2, in_channels=6, out_channels=4, kernel=(3, 1), in_size=(8, 8), out_size=(4, 4), itemsize=4),
    Convolution(batch=2, in_channels=6, out_channels=4, kernel=(3, 3), in_size=(7, 7), out_size=(7, 7), itemsize=4),
]
MOVES: list[Kernel] = [
    Movement(how=how, rows=rows, columns=200, itemsize=2)
    for how in ("lookup", "copy", "add", "order")
    for rows in (2, 40)
]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_run_has_the_operations_of_the_kernel(kernel: Kernel, dtype: torch.dtype) -> None:
    runs = Stopwatch(torch.device("cpu"), lambda: 0.0, FEW)._operations(kernel, dtype)
    assert len(runs) > 1
    with FlopCounterMode(display=False) as counter:
        for run in runs:
            run()
    assert counter.get_total_flops() == len(runs) * kernel.flops


@pytest.mark.parametrize("kernel", [*KERNELS, *MOVES, ModuleCall(itemsize=4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_seconds_are_those_of_the_clock_for_each_run(kernel: Kernel, dtype: torch.dtype) -> None:
    ticks = itertools.count()
    stopwatch = Stopwatch(torch.device("cpu"), lambda: float(next(ticks)), FEW)
    count = len(stopwatch._operations(kernel, dtype))
    # Between two looks at the clock all weights are taken once: a second is enough not to repeat it.
    assert stopwatch.seconds(kernel, dtype) == 1 / count


def test_short_rounds_are_repeated_and_the_fastest_counts() -> None:
    now, runs = [0.0], []
    slow = iter((1.0, 9.0, *(5.0,) * 1000, *(2.0,) * 1000))

    def operation() -> None:
        runs.append(now[0])
        now[0] += 1e-4 * next(slow)

    stopwatch = Stopwatch(torch.device("cpu"), lambda: now[0], StopwatchSettings(seconds=0.9))
    assert stopwatch._fastest([operation]) == pytest.approx(2e-4)
    assert len(runs) == 2002
