"""The devices that a model can be planned for without having one."""

from __future__ import annotations

from compressor.errors import BadInput
from compressor.latency.profile import DeviceProfile, DtypeConstants

SHIPPED: dict[str, DeviceProfile] = {
    "cpu": DeviceProfile(
        name="cpu",
        threads=2,
        torch_version="",
        bandwidth=2e10,
        launch=2e-6,
        call=3e-6,
        dtypes={
            "float64": DtypeConstants(5e10),
            "float32": DtypeConstants(1e11),
            "float16": DtypeConstants(1e11),
            "bfloat16": DtypeConstants(2e11),
        },
    ),
    "h100": DeviceProfile(
        name="h100",
        threads=0,
        torch_version="",
        bandwidth=2.7e12,
        launch=5e-6,
        call=0.0,
        dtypes={
            "float64": DtypeConstants(4e13),
            "float32": DtypeConstants(4e13),
            "float16": DtypeConstants(6.5e14),
            "bfloat16": DtypeConstants(6.5e14),
        },
        overlaps=True,
    ),
}


def shipped_profile(name: str) -> DeviceProfile:
    """The profile of a common device by its name; `BadInput` names the known ones where it is none of them."""
    if name not in SHIPPED:
        raise BadInput(
            f"no constants are known of {name!r}",
            option="target_device",
            remedy=f"name one of {', '.join(SHIPPED)}, or leave it out for the device at hand",
        )
    return SHIPPED[name]
