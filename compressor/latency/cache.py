"""Profiles of devices, measured once and kept in a file."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from compressor.documents import read_json
from compressor.engine import Run
from compressor.errors import BadInput
from compressor.latency.measure import Timer, device_name, measure_profile
from compressor.latency.profile import DeviceProfile, dtype_name

logger = logging.getLogger(__name__)


def device_profile(
    run: Run,
    dtypes: Sequence[torch.dtype],
    *,
    convolutions: bool = True,
    folder: Path | None = None,
    timer: Timer | None = None,
) -> DeviceProfile:
    """The profile of the device at hand for some dtypes: from its file, or measured in some seconds and kept there.

    Args:
        run: Its device, and who is told how far the measurement is.
        dtypes: The dtypes that are asked for; only those that are not known yet are measured.
        convolutions: Whether convolutions are asked for.
        folder: Where profiles are kept; by default `compressor/devices` in `$XDG_CACHE_HOME` or `~/.cache`.
        timer: What times a kernel; by default the kernel is run.
    """
    path = (folder or default_folder()) / _file_name(run.device)
    known = _read(path, run.device)
    wanted = [
        dtype
        for dtype in dict.fromkeys(dtypes)
        if known is None
        or dtype_name(dtype) not in known.dtypes
        or (convolutions and not known.dtypes[dtype_name(dtype)].convolutions)
    ]
    if known is not None and not wanted:
        return known
    profile = measure_profile(run, wanted, convolutions=convolutions, timer=timer)
    if known is not None:
        profile = replace(profile, dtypes={**known.dtypes, **profile.dtypes})
    _write(path, profile)
    return profile


def default_folder() -> Path:
    """Where profiles are kept."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "compressor" / "devices"


def _identity(device: torch.device) -> tuple[str, int, str]:
    """What a profile was measured on: the device, its threads, and the version of PyTorch."""
    return device_name(device), torch.get_num_threads() if device.type == "cpu" else 0, str(torch.__version__)


def _file_name(device: torch.device) -> str:
    return "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", str(part)) for part in _identity(device)) + ".json"


def _read(path: Path, device: torch.device) -> DeviceProfile | None:
    """The profile in a file; None where there is none that can be used."""
    if not path.exists():
        return None
    try:
        profile = DeviceProfile.from_dict(read_json(path))
        if (profile.name, profile.threads, profile.torch_version) != _identity(device):
            raise ValueError("it is of another device")
    except (BadInput, ValueError, TypeError, KeyError, AttributeError) as error:
        why = error.what if isinstance(error, BadInput) else error
        logger.warning("%s is not used, and the device is measured again: %s", path, why)
        return None
    return profile


def _write(path: Path, profile: DeviceProfile) -> None:
    """Keep a profile where that is possible; what is read is complete."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".new", encoding="utf-8", delete=False) as file:
            json.dump(profile.to_dict(), file)
        Path(file.name).replace(path)
    except OSError as error:
        logger.warning("the profile of the device is not kept: %s", error)
        with suppress(OSError, UnboundLocalError):
            Path(file.name).unlink()
