"""Runs the tests of this folder in processes that have a pretended accelerator, and reports them as its own.

An accelerator changes a process for good, and has to be there before its first backward pass. So each module is run by
a pytest of its own. `STAND_IN=1 pytest tests/standin/...` runs tests right in its process, for a debugger.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.standin.accelerator import load, unavailable
from tests.warm import WARM

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
INSIDE = "STAND_IN" in os.environ and unavailable() is None
FOUND = pytest.StashKey[dict[str, list[pytest.TestReport]]]()


def pytest_configure(config: pytest.Config) -> None:
    if INSIDE:
        load(config.cache.mkdir("standin"))
        if Path(os.environ["STAND_IN"]).suffix == ".jsonl":
            config.pluginmanager.register(_Writer(config, Path(os.environ["STAND_IN"])))


@pytest.fixture
def device() -> torch.device:
    return torch.device("standin", 0)


@pytest.fixture
def other_device() -> torch.device:
    return torch.device("standin", 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = unavailable()
    for item in items:
        if reason is not None and HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Report what the other process found."""
    if INSIDE or HERE not in item.path.parents or unavailable() is not None:
        return None
    found = item.config.stash.setdefault(FOUND, {})
    if item.nodeid not in found:
        found.update(_run_module(item))
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in found[item.nodeid]:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _run_module(item: pytest.Item) -> dict[str, list[pytest.TestReport]]:
    """The reports of all tests of the item's module that were asked for."""
    asked = [each for each in item.session.items if each.path == item.path]
    reports = item.config.cache.mkdir("standin") / f"{os.getpid()}.jsonl"
    ids = [str(ROOT / each.nodeid) for each in asked]
    environment = {**os.environ, "STAND_IN": str(reports), "PYTEST_ADDOPTS": ""}
    code = "import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"
    ran = item.config.stash[WARM].run(code, *ids, folder=ROOT, environment=environment)
    found: dict[str, list[pytest.TestReport]] = {each.nodeid: [] for each in asked}
    for line in reports.read_text().splitlines() if reports.exists() else ():
        report = item.config.hook.pytest_report_from_serializable(config=item.config, data=json.loads(line))
        found[report.nodeid].append(report)
    reports.unlink(missing_ok=True)
    for each in asked:
        if not any(report.when == "teardown" for report in found[each.nodeid]):
            words = f"the process with the accelerator ended with {ran.returncode}:\n{ran.stdout}{ran.stderr}"
            found[each.nodeid].append(pytest.TestReport(each.nodeid, each.location, {}, "failed", words, "call"))
    return found


class _Writer:
    """Writes the reports of this process down for the other."""

    def __init__(self, config: pytest.Config, path: Path) -> None:
        self._config, self._path = config, path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data: Any = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        with self._path.open("a") as file:
            file.write(json.dumps(data) + "\n")
