"""The public names: what `dir(compressor)` shows, what they document, and that nobody is sent past them."""

from __future__ import annotations

import doctest
import importlib
import importlib.metadata
import inspect
import re
from pathlib import Path

import pytest

import compressor

ROOT = Path(__file__).parents[1]
VERBS = {"archive", "compress", "diagnose", "evaluate", "explore", "export", "inspect", "merge", "plan", "restore"}


@pytest.fixture(params=compressor.__all__)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_dir_shows_the_public_names_and_nothing_else() -> None:
    for public in compressor.__all__:
        getattr(compressor, public)
    importlib.import_module("compressor.lowrank.quantizer")
    assert dir(compressor) == sorted(compressor.__all__)
    assert set(compressor.__all__) >= VERBS
    assert not [each for each in dir(compressor) if inspect.ismodule(getattr(compressor, each))]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="compres"):
        _ = compressor.compres


def test_the_version_is_the_distributions() -> None:
    assert compressor.__version__ == importlib.metadata.version("compressor")


def test_every_public_name_says_what_it_takes_or_shows_how_it_is_used(name: str) -> None:
    documentation = inspect.getdoc(getattr(compressor, name)) or ""
    summary, _, rest = documentation.partition("\n")
    assert summary.endswith("."), f"{name}: {summary}"
    assert re.search(r"^(Args|Attributes|Example):$", rest, re.MULTILINE), f"{name}: {documentation}"


@pytest.mark.parametrize("name", ["TrainingRecipe", "memory_window"])
def test_examples_that_need_no_model_give_what_they_say(name: str) -> None:
    documentation = inspect.getdoc(getattr(compressor, name)) or ""
    example = doctest.DocTestParser().get_doctest(documentation, {"compressor": compressor}, name, None, None)
    assert doctest.DocTestRunner(verbose=False).run(example).failed == 0
    assert example.examples


def pages() -> list[Path]:
    """What users read and copy from."""
    return [ROOT / "README.md", *(ROOT / "examples").glob("*.py"), *(ROOT / "docs").rglob("*.md")]


def test_no_page_sends_users_past_the_public_names() -> None:
    found = []
    for page in pages():
        text = re.sub(r"python -m compressor\S+", "", page.read_text(encoding="utf-8"))
        found += [f"{page.name}: {line}" for line in re.findall(r"(?:from|import) compressor\.\S+.*", text)]
        for public in re.findall(r"\bcompressor\.([a-z_]+)\b", text):
            if public not in compressor.__all__:
                found.append(f"{page.name}: compressor.{public}")
    assert not found


def test_what_pages_import_is_public() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages())
    imported = [name for names in re.findall(r"from compressor import ([\w, ]+)", text) for name in names.split(", ")]
    assert set(imported) <= set(compressor.__all__)
