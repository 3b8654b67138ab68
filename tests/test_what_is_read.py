"""The README's table of what is read and written: each row names its tests, and each of them exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEADING = "## What is read, what is written, and where it runs"


def rows() -> list[list[str]]:
    """The cells of each row of the table."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition(f"{HEADING}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def functions(path: Path) -> set[str]:
    """The test functions of a file, those of its classes too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {each.name for each in ast.walk(tree) if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_there_are_rows_and_no_two_say_the_same() -> None:
    read = [cells[0] for cells in rows()]
    assert len(read) > 10
    assert len(set(read)) == len(read)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_the_tests_that_a_row_names_exist(row: list[str]) -> None:
    assert len(row) == 3
    for each in row[2].split(", "):
        named = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", each)
        assert named is not None, each
        path = ROOT / named[1]
        assert path.is_file(), named[1]
        assert named[2] in functions(path), named[2]
