"""Devices that no machine is: each charges for one thing, so that what is chosen for it can be said beforehand."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from compressor.latency import SHIPPED, Amount, DeviceProfile, Kernel, ModuleCall, Movement
from compressor.network import Kind


@dataclass(frozen=True)
class Charges(DeviceProfile):
    """Seconds for an operation, for a byte that is moved, and for each kernel."""

    flop: float = 0.0
    byte: float = 0.0
    kernel: float = 0.0

    def seconds(self, kernel: Kernel, dtype: torch.dtype) -> Amount:
        if isinstance(kernel, ModuleCall):
            return 0.0
        moved = kernel.nbytes * self.byte if isinstance(kernel, Movement) else 0.0
        return kernel.flops * self.flop + moved + self.kernel

    def rank_multiple(self, kind: Kind, dtype: torch.dtype, *, width: int | None = None) -> int:
        return 1


def charging(*, flop: float = 1e-9, byte: float = 0.0, kernel: float = 0.0) -> DeviceProfile:
    """A device with the name `stopwatch`."""
    common = {each.name: getattr(SHIPPED["cpu"], each.name) for each in fields(DeviceProfile)}
    return Charges(**{**common, "name": "stopwatch"}, flop=flop, byte=byte, kernel=kernel)
