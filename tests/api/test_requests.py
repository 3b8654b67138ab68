"""What is preferred where nothing is said of it: speed of what is there to be run, size of what is only stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import nn

from compressor import Plan
from compressor.api.options import CompressOptions
from compressor.api.requests import preferred
from compressor.model import Model, open_model
from compressor.planning import Budget


def opened(container: str, folder: Path) -> Model:
    module = nn.Linear(8, 6)
    if container == "module":
        return open_model(module)
    (folder / "model").mkdir()
    save_file(module.state_dict(), folder / "model" / "model.safetensors")
    return open_model(folder / "model" if container == "folder" else folder / "model" / "model.safetensors")


@pytest.mark.parametrize(("container", "expected"), [("module", "speed"), ("folder", "speed"), ("file", "size")])
def test_folders_and_modules_are_to_be_fast_and_files_small(container: str, expected: str, tmp_path: Path) -> None:
    model = opened(container, tmp_path)
    assert preferred(CompressOptions(keep=0.5), model, quantizes=False) == expected
    assert preferred(CompressOptions(keep=0.5), model, quantizes=True) == "size"


@pytest.mark.parametrize("container", ["module", "folder", "file"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"prefer": "speed"}, "speed"),
        ({"prefer": "size"}, "size"),
        ({"max_latency": 0.7}, "speed"),
        ({"target_device": "h100"}, "speed"),
        ({"plan": Plan("", None, Budget("plan"), ())}, "size"),
    ],
)
def test_what_is_asked_for_decides(container: str, given: dict[str, Any], expected: str, *, tmp_path: Path) -> None:
    model = opened(container, tmp_path)
    for quantizes in (False, True):
        assert preferred(CompressOptions(**given), model, quantizes=quantizes) == expected
