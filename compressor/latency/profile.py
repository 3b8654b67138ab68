"""What is known of a device, and how long a kernel takes on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from compressor.latency.kernels import Amount, Kernel, ModuleCall
from compressor.network import Kind

PROFILE_VERSION = 1


@dataclass(frozen=True)
class DtypeConstants:
    """The speed of a device in one dtype.

    Attributes:
        flops: Operations a second of a large product.
    """

    flops: float


@dataclass(frozen=True)
class DeviceProfile:
    """The constants of one device, measured or from data sheets.

    Attributes:
        name: The device.
        threads: Threads that PyTorch computes with, on a CPU.
        torch_version: The version of PyTorch; empty where nothing was measured.
        bandwidth: Bytes a second.
        launch: Seconds to launch a kernel.
        call: Seconds to call a module.
        dtypes: The speed in each dtype, by its name without `torch.`.
        overlaps: Whether a kernel computes while another is launched.
    """

    name: str
    threads: int
    torch_version: str
    bandwidth: float
    launch: float
    call: float
    dtypes: Mapping[str, DtypeConstants]
    overlaps: bool = False

    @property
    def measured(self) -> bool:
        """Whether the constants were measured, and are not those of a data sheet."""
        return self.torch_version != ""

    def seconds(self, kernel: Kernel, dtype: torch.dtype) -> Amount:
        """Seconds that a kernel takes, at each of its sizes."""
        if isinstance(kernel, ModuleCall):
            return self.call
        work = kernel.nbytes / self.bandwidth + kernel.flops / self._of(dtype).flops
        return np.maximum(work, self.launch) if self.overlaps else work + self.launch

    def rank_multiple(self, kind: Kind, dtype: torch.dtype) -> int:
        """What the ranks of layers of a kind should be multiples of."""
        if self.overlaps:
            return 64
        return 16 if "convolution" in kind else 1

    def _of(self, dtype: torch.dtype) -> DtypeConstants:
        return self.dtypes[str(dtype).removeprefix("torch.")]

    def to_dict(self) -> dict[str, Any]:
        return {"version": PROFILE_VERSION} | asdict(self)

    @staticmethod
    def from_dict(document: Mapping[str, Any]) -> DeviceProfile:
        """The profile of a document that `to_dict` gave; ValueError, TypeError, or KeyError where it is none."""
        values = dict(document)
        if values.pop("version", None) != PROFILE_VERSION:
            raise ValueError("of another version")
        values["dtypes"] = {name: DtypeConstants(**each) for name, each in values["dtypes"].items()}
        return DeviceProfile(**values)
