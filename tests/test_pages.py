"""What stands in the pages runs: commands have options that exist, and Python compiles."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from compressor.cli.commands import app
from compressor.cli.routes import route

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
OF_SHELLS = ("", "bash", "sh", "yaml")


def blocks(*languages: str) -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for language, text in BLOCK.findall(page.read_text(encoding="utf-8")):
            if language in languages:
                yield page.relative_to(ROOT).as_posix(), text


def commands() -> Iterator[tuple[str, str]]:
    """Every call of `compress` in a block, without what is said beside it after two spaces or more, or a comment."""
    for page, text in blocks(*OF_SHELLS):
        for line in re.sub(r"\\\n\s*", " ", text).splitlines():
            if line.startswith("compress "):
                yield page, re.split(r"\s{2,}|\s#", line)[0]


@pytest.mark.parametrize(("page", "line"), list(commands()))
def test_a_command_has_options_that_exist(page: str, line: str) -> None:
    _, *words = shlex.split(re.sub(r"\|[\w|-]+", "", line))  # the first of alternatives
    found = route(words)
    typer.main.get_group(app).commands[found.command].make_context(found.command, list(found.words))


@pytest.mark.parametrize(("page", "text"), list(blocks("python")))
def test_python_compiles(page: str, text: str) -> None:
    ast.parse(text)


def test_there_are_some() -> None:
    assert len(list(commands())) > 30
    assert len(list(blocks("python"))) > 5
