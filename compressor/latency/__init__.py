"""How long a layer takes on a device: kernels, how a workload uses a layer, and the constants of devices."""

from __future__ import annotations

from compressor.latency.cache import device_profile
from compressor.latency.devices import SHIPPED, shipped_profile
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
from compressor.latency.profile import Corrections, DeviceProfile, DtypeSpeeds, Speed, Steps
from compressor.latency.use import LayerUse, Workload

__all__ = [
    "SHIPPED",
    "Amount",
    "Convolution",
    "Corrections",
    "DeviceProfile",
    "DtypeSpeeds",
    "IntegerProduct",
    "Kernel",
    "LayerUse",
    "MatrixProduct",
    "ModuleCall",
    "Movement",
    "Size",
    "Speed",
    "Steps",
    "Workload",
    "device_profile",
    "shipped_profile",
]
