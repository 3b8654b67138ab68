"""A device that is a formula, and what times kernels on it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from compressor.latency import Amount, Kernel, MatrixProduct, ModuleCall
from compressor.latency.measure import MeasuringSettings

SMALL = MeasuringSettings(
    rows=(1, 8, 64), sides=(16, 64, 256), batches=(2, 8), images=(7, 14), channels=(16, 64), residues=(0, 1, 8, 15, 16)
)


@dataclass
class FakeDevice:
    """Launch + bytes / bandwidth + operations / rate, or the largest of the three; with outputs in whole tiles."""

    launch: float = 2e-6
    bandwidth: float = 3e10
    flops: float = 2e11
    call: float = 1e-6
    tile: int = 1
    overlaps: bool = False
    timed: list[tuple[Kernel, torch.dtype]] = field(default_factory=list)

    def __call__(self, kernel: Kernel, dtype: torch.dtype) -> float:
        self.timed.append((kernel, dtype))
        return float(self.seconds(kernel))

    def seconds(self, kernel: Kernel) -> Amount:
        if isinstance(kernel, ModuleCall):
            return self.call
        if isinstance(kernel, MatrixProduct) and kernel.rows != 1:
            columns = np.ceil(np.asarray(kernel.columns) / self.tile) * self.tile
            kernel = MatrixProduct(rows=kernel.rows, inner=kernel.inner, columns=columns, itemsize=kernel.itemsize)
        byte, flop = kernel.nbytes / self.bandwidth, kernel.flops / self.flops
        return np.maximum(np.maximum(byte, flop), self.launch) if self.overlaps else self.launch + byte + flop
