"""The accelerator of this machine; without one these tests are skipped, unless `GPU_TESTS_ON` names a device."""

from __future__ import annotations

import os

import pytest
import torch

FOUND = torch.accelerator.current_accelerator(check_available=True)
NAME = os.environ.get("GPU_TESTS_ON") or (None if FOUND is None else FOUND.type)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if NAME is None and item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.skip(reason="there is no accelerator"))


@pytest.fixture
def device() -> torch.device:
    assert NAME is not None
    return torch.device(NAME) if NAME == "cpu" else torch.device(NAME, 0)
