"""The package is a house of rooms, one above the other: each imports only rooms above it."""

from __future__ import annotations

import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from docs.design.rooms import FOUNDATIONS, ROOMS, ROOT, SOURCES, imported


def test_a_room_imports_only_rooms_above_it() -> None:
    floors = {name: floor for floor, name in enumerate((*FOUNDATIONS, *ROOMS))}
    floors[""] = floors["cli"]  # the package itself, whose public names are those of all other rooms
    upward = [
        f"{module} imports {other or 'compressor'}"
        for module, path in SOURCES.items()
        for other in imported(path)
        if module and floors[other.partition(".")[0]] > floors[module.partition(".")[0]]
    ]
    assert not upward


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("from compressor.io.files import hashed", ["io.files"]),
        ("from compressor.io import files", ["io.files"]),
        ("import compressor.io.files as names", ["io.files"]),
        ("def walk():\n    from compressor.api import write", ["api.write"]),
        ("from compressor import compress", [""]),
        ("import compressor", [""]),
        ("import compressors.api\nfrom torch import nn", []),
    ],
)
def test_what_a_line_imports(line: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(line)
    assert list(imported(tmp_path / "module.py")) == expected


def test_relative_imports_are_refused(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("from ..api import compress")
    with pytest.raises(ValueError, match="relative"):
        list(imported(tmp_path / "module.py"))


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: set(imported(path, on_import=True)) - {module} for module, path in SOURCES.items()}
    TopologicalSorter(graph).prepare()


def test_every_room_is_a_package_that_is_discovered() -> None:
    assert all((path.parent / "__init__.py").is_file() for path in SOURCES.values())


def test_contributing_lists_the_rooms_in_their_order() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("\n| room |")[2].partition("\n\n")[0]
    cells = [row.split("|")[1] for row in table.splitlines()[1:]]
    assert re.findall(r"`(\w+)/?`", "".join(cells)) == [*FOUNDATIONS, *ROOMS]
