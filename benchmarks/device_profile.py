"""The profile of the CPU at hand, as it is shipped for `--target-device cpu`.

    OMP_NUM_THREADS=1 python benchmarks/device_profile.py compressor/latency/cpu.json [--integers]

One thread, so that what else the machine does is not counted. With `--integers` only products with integers and what
dequantizes are measured, and put into the file.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compressor.engine import Run
from compressor.latency import DeviceProfile
from compressor.latency.measure import CPU, measure_profile

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Other products are not looked at.
INTEGERS = replace(CPU, sides=(64, 128), residues=(0, 8, 16))


def shipped(profile: DeviceProfile) -> dict[str, Any]:
    """A measured profile as the document of a device that is not at hand, in four digits."""
    source = f"measured on {profile.name}, threads: {profile.threads}, PyTorch {profile.torch_version}"
    return dict(_rounded(replace(profile, name="cpu", torch_version="", source=source).to_dict()))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    path, run = Path(sys.argv[1]), Run(torch.device("cpu"))
    if "--integers" in sys.argv:
        document = json.loads(path.read_text(encoding="utf-8"))
        measured = shipped(measure_profile(run, DTYPES, convolutions=False, settings=INTEGERS))
        for dtype, speeds in measured["dtypes"].items():
            known = document["dtypes"][dtype]
            known["integers"] = speeds["integers"]
            known["moves"]["dequantize"] = speeds["moves"]["dequantize"]
        document["version"] = measured["version"]
    else:
        document = shipped(measure_profile(run, DTYPES))
    path.write_text(json.dumps(document, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
