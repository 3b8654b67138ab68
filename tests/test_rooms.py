"""The package is a house of rooms, one above the other: each imports only rooms above it."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "compressor"
FOUNDATIONS = ("version", "errors", "choices", "system_errors", "progress", "torch_state", "documents", "arguments")
ROOMS = (
    *("recipe", "io", "network", "data", "measure", "factorize", "planning", "lowrank", "model", "evaluation"),
    *("calibration", "fine_tuning", "merging", "diagnosis", "exporting", "results", "report", "api"),
    *("registration", "integrations", "cli"),
)


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the package by its dotted name, without the package's."""
    for folder, prefix in ((PACKAGE, ()), (ROOT / "cli", ("cli",))):
        for path in folder.rglob("*.py"):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


SOURCES = dict(modules())


def imported(path: Path, *, on_import: bool = False) -> Iterator[str]:
    """The modules of the package that a file imports: anywhere in it, or only when it is itself imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if on_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (each.name.removeprefix("compressor.") for each in node.names if "compressor." in each.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "compressor":
            module = (node.module or "").removeprefix("compressor").removeprefix(".")
            for each in node.names:
                name = f"{module}.{each.name}".removeprefix(".")
                yield name if name in SOURCES else module


def room(module: str) -> str:
    return module.partition(".")[0]


def test_a_room_imports_only_rooms_above_it() -> None:
    floors = {name: floor for floor, name in enumerate((*FOUNDATIONS, *ROOMS))}
    upward = [
        f"{module} imports {other}"
        for module, path in SOURCES.items()
        for other in imported(path)
        if module and other and floors[room(other)] > floors[room(module)]
    ]
    assert not upward


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: set(imported(path, on_import=True)) - {module} for module, path in SOURCES.items()}
    TopologicalSorter(graph).prepare()


def test_every_room_is_packaged() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert set(packages) == {"compressor", "compressor.cli", *(f"compressor.{name}" for name in rooms)}
