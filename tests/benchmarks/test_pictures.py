"""Pictures of results are read on light and on dark pages."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from tests.report.browsing import contrast

SOURCE = Path(__file__).parents[2] / "benchmarks" / "pictures.py"
SPEC = importlib.util.spec_from_file_location("pictures", SOURCE)
assert SPEC is not None
assert SPEC.loader is not None
pictures = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(pictures)
PAPER = pictures.on_dark("#ffffff")


def test_white_and_black_change_places() -> None:
    assert contrast(PAPER, pictures.on_dark("#000000")) > 12
    assert contrast(PAPER, "#000000") < 2


@pytest.mark.parametrize("color", ["#4477aa", "#228833", "#aa3377", "#ee6677", "#66ccee", "#440154", "#b2182b"])
def test_a_line_is_seen_on_a_dark_ground(color: str) -> None:
    assert contrast(PAPER, pictures.on_dark(color)) >= 3


def test_the_rules_for_dark_pages_name_every_color(tmp_path: Path) -> None:
    figure = Figure()
    figure.add_subplot().plot([0, 1], [1, 0], color="#aa3377")
    for name in ("a.svg", "b.svg"):
        pictures.save(figure, tmp_path / name)
    drawn = (tmp_path / "a.svg").read_text()
    style = re.search(r"<style>@media \(prefers-color-scheme: dark\) (.*?)</style>", drawn)
    assert style is not None
    for color in set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})[;\"]", drawn)):
        assert pictures.on_dark(color) in style[1]


def test_all_pictures_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SOURCE.parent))
    assert sorted(pictures.drawers()) == sorted(path.stem for path in pictures.RESULTS.glob("*.svg"))


def test_all_pictures_are_for_both() -> None:
    for path in sorted(pictures.RESULTS.glob("*.svg")):
        assert "prefers-color-scheme" in path.read_text(encoding="utf-8"), path.name
