"""The devices that a model can be planned for without having one: `devices.json`, and a CPU that was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.errors import BadInput
from compressor.latency.profile import DeviceProfile, DtypeSpeeds, Speed, whole_tiles

_HERE = Path(__file__).parent
_DTYPES = ("bfloat16", "float16", "float32", "float64")
# Numbers that are moved: twice as many bytes as are written, and for each element of a row in a new order once more.
# To dequantize takes several kernels.
_MOVES = {"lookup": 1.0, "copy": 1.0, "add": 1.0, "order": 0.5, "dequantize": 0.5}


def _gpu(name: str, sheet: Mapping[str, Any], common: Mapping[str, Any]) -> DeviceProfile:
    """The profile of a GPU by its data sheet."""
    bandwidth = sheet["bandwidth"] * common["achievable"]["bandwidth"]
    launch: float = common["launch"]
    tiles = whole_tiles(common["tile"])
    moves = {how: Speed(launch, bandwidth * share) for how, share in _MOVES.items()}
    dtypes = {
        dtype: DtypeSpeeds(
            Speed(launch, bandwidth, sheet[dtype] * common["achievable"]["flops"], inner=tiles, columns=tiles), moves
        )
        for dtype in _DTYPES
    }
    # The call of a module is hidden by the kernels that were launched before.
    source = f"{sheet['name']}: {common['source']}"
    return DeviceProfile(name, 0, "", 0.0, dtypes, overlaps=True, source=source)


def _shipped() -> dict[str, DeviceProfile]:
    common = json.loads((_HERE / "devices.json").read_text(encoding="utf-8"))
    gpus = {name: _gpu(name, sheet, common) for name, sheet in common["gpus"].items()}
    cpu = DeviceProfile.from_dict(json.loads((_HERE / "cpu.json").read_text(encoding="utf-8")))
    return {"cpu": cpu, **gpus}


SHIPPED = _shipped()


def shipped_profile(name: str) -> DeviceProfile:
    """The profile of a common device by its name; `BadInput` names the known ones where it is none of them."""
    if name not in SHIPPED:
        raise BadInput(
            f"no constants are known of {name!r}",
            option="target_device",
            remedy=f"name one of {', '.join(SHIPPED)}, or leave it out for the device at hand",
        )
    return SHIPPED[name]
