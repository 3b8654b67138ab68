"""Results show themselves: briefly, as the table that the command prints, as HTML, and as a data frame."""

from __future__ import annotations

import pickle
import re
import sys
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import compressor
from compressor.api.flags import with_flags
from compressor.cli.run import run
from compressor.display import DisplayedLayers
from compressor.errors import CompressorError
from compressor.report.blocks import Facts, LayerTable
from compressor.report.draw import draw

MODEL = "model.safetensors"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and its data, which commands and functions alike name by their last part."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for file in (MODEL, "other.safetensors"):
        network = nn.Sequential(*(module for _ in range(40) for module in (nn.Linear(16, 16), nn.ReLU())))
        save_file(network.state_dict(), file)
    save_file({"inputs": torch.randn(8, 16), "labels": torch.arange(8)}, "data.safetensors")
    Path("network.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(*(each for _ in range(40) for each in (nn.Linear(16, 16), nn.ReLU())))\n"
    )
    return tmp_path


def results() -> dict[str, Any]:
    return {
        "inspect": compressor.inspect(MODEL),
        "plan": compressor.plan(MODEL, keep=0.5),
        "compress": compressor.compress(MODEL, output="small.safetensors", keep=0.5),
        "restore": compressor.restore("small.safetensors", output="dense.safetensors"),
        "export": compressor.export("small.safetensors", to="dense", output="exported.safetensors"),
        "evaluate": compressor.evaluate(
            "small.safetensors", baseline=MODEL, data="data.safetensors", factory="network.py:build"
        ),
        "diagnose": compressor.diagnose(MODEL),
        "merge": compressor.merge([MODEL, "other.safetensors"], output="merged.safetensors", mode="sum"),
    }


def test_the_repr_is_short_and_str_is_the_page() -> None:
    for verb, result in results().items():
        assert len(repr(result)) <= 300, verb
        assert "\n" not in repr(result)
        first = str(result).splitlines()[0]
        assert first == str(result.verdict) if hasattr(result, "verdict") else first.startswith("model"), verb
        assert all(len(line) <= 80 and "\x1b" not in line for line in str(result).splitlines()), verb


def test_the_repr_says_where_the_result_is() -> None:
    assert " to nowhere: " in repr(compressor.compress(MODEL, keep=0.5, dry_run=True))


def test_a_deep_network_does_not_lengthen_the_repr() -> None:
    inspection, plan = compressor.inspect(MODEL), compressor.plan(MODEL, keep=0.5)
    assert len(inspection.layers) == 40
    for each in (inspection, plan, inspection.layers[0].layer, inspection.recipe, compressor.open_checkpoint(MODEL)):
        assert len(repr(each)) <= 150
    assert "40 of 40 layers" in repr(inspection)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "verb"),
    [
        (["inspect", MODEL], "inspect"),
        (["plan", MODEL, "--keep", "0.5"], "plan"),
        (["diagnose", MODEL], "diagnose"),
    ],
)
def test_str_is_what_the_command_prints(arguments: list[str], verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*arguments, "--quiet"]) == 0
    printed = capsys.readouterr().out
    result = results()[verb]
    assert printed == draw(result).reworded(with_flags).text() + "\n"
    assert len(str(result).splitlines()) == len(printed.splitlines())


class Cells(HTMLParser):
    """The text of all cells of all tables."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th") and data:
            self.cells.append(data)


@pytest.mark.slow
def test_html_holds_the_rows_of_the_tables_and_loads_nothing() -> None:
    for result in results().values():
        html = result._repr_html_()
        if hasattr(result, "verdict"):
            first = html.split("</style>")[1].lstrip().split("\n")[0]
            assert first.startswith('<p class="verdict">')
            assert re.sub(r"<[^>]*>", "", first) == escape(str(result.verdict))
        cells = Cells(html).cells
        for block in draw(result).blocks:
            if isinstance(block, LayerTable):
                assert "\0".join(cell for row in block.rows for cell in row if cell) in "\0".join(cells)
            if isinstance(block, Facts):
                assert "\0".join(words for fact in block.facts for words in fact if words) in "\0".join(cells)
        assert not re.search(r"<(script|img|link|iframe)|https?:|url\(", html)


def test_names_are_escaped_in_html() -> None:
    plan = compressor.plan(MODEL, keep=0.5)
    layer = replace(plan.layers[0], name="<b>&", reason="<i>")
    html = replace(plan, layers=(layer,), source="<u>")._repr_html_()
    assert "&lt;b&gt;&amp;" in html
    assert "<i>" not in html
    assert "<u>" not in html


def test_layers_become_the_rows_of_a_frame() -> None:
    plan = compressor.plan(MODEL, keep=0.5)
    frame = plan.to_frame()
    assert list(frame.index) == [layer.name for layer in plan.layers]
    assert list(frame["rank"]) == [layer.rank for layer in plan.layers]
    inspection = compressor.inspect(MODEL).to_frame()
    assert list(inspection["ranks.energy"]) == [each.ranks.energy for each in compressor.inspect(MODEL).layers]
    assert isinstance(inspection, pandas.DataFrame)


def test_without_pandas_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(CompressorError, match="pip install pandas"):
        DisplayedLayers().to_frame()


def test_a_result_that_was_pickled_shows_itself() -> None:
    plan = compressor.plan(MODEL, keep=0.5)
    assert str(pickle.loads(pickle.dumps(plan))) == str(plan)
