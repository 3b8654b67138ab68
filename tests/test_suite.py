"""What the test suite promises of itself."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml
from hypothesis import settings
from packaging.requirements import Requirement
from packaging.version import Version

from compressor.version import VERSION

ROOT = Path(__file__).parent.parent


def test_no_property_fails_because_the_machine_is_busy() -> None:
    assert settings().deadline is None


def test_the_oldest_versions_that_are_tested_are_the_lower_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tools = ("dev", "docs")
    extras = {name: each for name, each in project["optional-dependencies"].items() if name not in tools}
    bounded = [Requirement(line) for line in sum(extras.values(), project["dependencies"])]
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if not line.startswith("#")]
    oldest = {each.name: [Version(bound.version) for bound in each.specifier] for each in pinned}
    assert oldest == {each.name: [Version(bound.version) for bound in each.specifier] for each in bounded}
    assert f"[{','.join(extras)}]" in (ROOT / "Makefile").read_text()


def test_project_citation_and_changelog_name_one_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    headings = re.findall(r"^## \[(.+)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == (VERSION, citation["date-released"])
    assert citation["version"] == VERSION
