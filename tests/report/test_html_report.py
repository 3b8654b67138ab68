"""The HTML report: true to the result, safe to open, the same bytes for the same result."""

from __future__ import annotations

import base64
import hashlib
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compressor.errors import BadInput
from compressor.evaluation import Cost, Evaluation, Latency
from compressor.formatting import format_size
from compressor.io import staged_folder, write_json
from compressor.planning import Budget, CalibrationResult, LayerPlan, Plan
from compressor.recipe import TrainingRecipe
from compressor.report import check_report_path, write_report
from compressor.report.html import report_page
from compressor.report.layer_rows import layer_rows
from compressor.report.other_sizes import other_sizes
from compressor.report.wording import warning_words
from compressor.results import BeforeAfter, Compression
from tests.report.many_layers import many_layers

pytestmark = pytest.mark.slow

HOSTILE = [
    "<script>alert(1)</script>",
    "</style><img src=http://evil.example/x onerror=alert(2)>",
    '"><iframe src="javascript:alert(3)">',
    "$\\frac{1}{$",
    "{{ 7 * 7 }}",
    "\x1b[2J\x00\ud800",
]


def layer(name: str, rank: int | None = 3) -> LayerPlan:
    form = "dense" if rank is None else "plain"
    return LayerPlan(name, (40, 30), "linear", rank, form, 1200 if rank is None else rank * 70, 0.0625, "its share")


def compression(*names: str, **changes: Any) -> Compression:
    layers = tuple(layer(name, rank) for name, rank in zip(names, [3, None, 5, 2, 1, 4], strict=False))
    result = Compression(
        source="digits.safetensors",
        output="small.safetensors",
        recipe=TrainingRecipe(optimizer="sgd", learning_rate=0.1, sources={"learning_rate": "flag --lr"}),
        plan=Plan("digits.safetensors", None, Budget("keep", 0.5), layers, "check the accuracy"),
        parameters=BeforeAfter(123456, 65432),
        bytes=BeforeAfter(493824, 261728),
        evaluation=None,
        seconds=1.5,
        peak_memory_bytes=300_000_000,
        skipped=(),
        spectra={name: np.geomspace(2.0, 1e-3, 30) for name in names},
    )
    result = replace(result, **changes)
    return replace(result, warnings=warning_words(result))


class Page(HTMLParser):
    """The tags, attributes and text that a browser would find."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_same_result_gives_the_same_bytes(tmp_path: Path) -> None:
    result = compression("a", "b", "c")
    for name in ("one.html", "two.html"):
        write_report(result, tmp_path / name, overwrite=False)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_names_are_shown_and_never_become_markup(tmp_path: Path) -> None:
    plain, hostile = (Page(report_page(compression(*names))) for names in ([f"a.{n}" for n in range(6)], HOSTILE))
    assert sorted(set(hostile.tags)) == sorted(set(plain.tags))
    assert {name for name, _ in hostile.attributes} == {name for name, _ in plain.attributes}
    for name in HOSTILE[:5]:
        assert name in hostile.text
    write_report(compression(*HOSTILE, source=HOSTILE[0], output=HOSTILE[1]), tmp_path / "r.html", overwrite=False)
    written = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert sorted(set(written.tags)) == sorted(set(plain.tags))
    assert "\x1b" not in written.text


def test_nothing_is_loaded_from_anywhere_and_no_script_but_its_own_is_allowed() -> None:
    page = report_page(many_layers(8))
    found = Page(page)
    assert not {"link", "img", "iframe", "object", "embed", "base"} & set(found.tags)
    assert all(name not in {"src", "srcset", "action"} for name, _ in found.attributes)
    assert all(value.startswith("#") for name, value in found.attributes if name.endswith("href"))
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    assert "@import" not in page
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    data, script = re.findall(r"<script([^>]*)>(.*?)</script>", page, re.DOTALL)
    assert data[0] == ' type="application/json" id="content"'
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert policy is not None
    assert policy[1] == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_a_command_or_name_cannot_end_the_script_that_holds_it() -> None:
    plain = many_layers(8)
    hostile = "</script><script>alert(1)</script><!--"
    named = replace(plain, command=f"compress '{hostile}' --keep 0.25", source=hostile, output=hostile)
    assert Page(report_page(named)).tags == Page(report_page(replace(plain, output="small"))).tags


def test_ids_are_unique_and_every_reference_has_its_target() -> None:
    page = report_page(compression("a", "b", "c"))
    found = Page(page)
    ids = [value for name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {value[1:] for name, value in found.attributes if name.endswith("href")}
    assert targets | set(re.findall(r"url\(#([^)]*)\)", page)) <= set(ids)


def test_every_color_comes_from_the_style_so_that_dark_mode_has_its_own() -> None:
    page = report_page(many_layers(8))
    style, body = page.partition("<style>")[2].split("</style>")
    assert not re.search(r"#[0-9a-fA-F]{6}\b|\b(?:fill|stroke)[=:]", body.partition("<script")[0])
    light, dark = (each.partition("}")[0] for each in style.split(":root {")[1:])
    assert re.findall(r"--\w+:", light) == re.findall(r"--\w+:", dark)


def test_the_page_tells_the_numbers_of_the_result() -> None:
    text = " ".join(Page(report_page(compression("first", "second"))).text.split())
    for words in ("123,456", "65,432", "53.0 %", "494 kB", "262 kB", "3 of 30", "dense", "0.0625", "its share"):
        assert words in text
    for words in ("keep 0.5", "check the accuracy", "learning rate", "flag --lr", "digits.safetensors"):
        assert words in text


def test_every_row_and_every_column_has_a_header() -> None:
    page = re.sub("<template.*?</template>", "", report_page(many_layers(8)), flags=re.DOTALL)
    for table in re.findall("<table.*?</table>", page, re.DOTALL):
        head, *rows = re.findall("<tr.*?</tr>", table, re.DOTALL)
        headers = re.findall("<th[^>]*>(.*?)</th>", head)
        # A corner may be empty.
        assert all(headers[1:])
        for row in rows:
            assert len(re.findall("<t[hd][ >]", row)) == len(headers)


def test_every_layer_is_in_the_table_with_the_number_of_its_reason() -> None:
    result = compression("10.dense", "2.dense", "2.other")
    layers = tuple(replace(layer, reason=f"because of {layer.name}") for layer in result.plan.layers)
    page = report_page(replace(result, plan=replace(result.plan, layers=layers)))
    rows = re.findall('<tr class="layer".*?</tr>', page)
    names = [Page(row.partition("</th>")[0]).text for row in rows]
    # In natural order, with or without the script.
    assert names == ["2.dense", "2.other", "10.dense"]
    assert [Page(row).text[-1] for row in rows] == ["1", "2", "3"]
    reasons = page.partition('<ol class="reasons">')[2].partition("</ol>")[0]
    assert re.findall("<li>(.*?)</li>", reasons) == [
        f"because of {name}" for name in ("2.dense", "2.other", "10.dense")
    ]


def test_calibration_is_told_where_it_was_done() -> None:
    plain = compression("a")
    result = CalibrationResult(examples=96, holdout=32, exponent=0.5, predicted_loss=0.0123, holdout_loss=0.0341)
    calibrated = replace(plain, plan=replace(plain.plan, calibration=result))
    text = " ".join(Page(report_page(calibrated)).text.split())
    for words in ("96 examples", "holdout of 32", "0.034", "0.012"):
        assert words in text
    assert "holdout" not in Page(report_page(plain)).text


def test_a_dozen_sizes_from_the_smallest_to_the_dense_model_are_listed() -> None:
    result = many_layers(12)
    page, sizes = report_page(result), other_sizes(result)
    assert sizes is not None
    table = re.search('aria-label="Other sizes">(.*?)</table>', page, re.DOTALL)
    assert table is not None
    listed = re.findall(r'<tr><td class="n">(.*?)</td>', table[1])
    assert len(listed) == 12
    assert (listed[0], listed[-1]) == (format_size(sizes.sizes[0].bytes), format_size(sizes.sizes[-1].bytes))


def test_an_output_that_is_the_input_again_is_called_so() -> None:
    dense = compression("a", plan=replace(compression("a").plan, layers=(layer("a", None),)))
    assert "no layer was factorized; the output holds the same weights" in report_page(dense)
    assert "no layer would be factorized" in report_page(compression("a", plan=dense.plan, output=None))
    assert "factorized" not in Page(report_page(compression("a"))).text


def test_the_page_tells_what_it_cost() -> None:
    evaluation = Evaluation(
        metric="accuracy",
        baseline=0.975,
        compressed=0.97,
        drop=0.005,
        baseline_loss=0.1,
        compressed_loss=0.12,
        count=360,
        data="builtin:digits, test split",
        task="image-classification",
        device="cpu",
        baseline_cost=Cost(1000, 4000, 990, 9000),
        compressed_cost=Cost(500, 2000, 480, 5000),
        latency=(Latency(1, 2e-3, 1e-3, 0.5, 7),),
    )
    text = " ".join(Page(report_page(compression("a", evaluation=evaluation))).text.split())
    for words in (
        "97.5 %",
        "97.0 %",
        "-0.50 points",
        "360 predictions",
        "2 ms",
        "1 ms",
        "0.50 x the time",
        "builtin:digits",
    ):
        assert words in text
    assert "large loss" not in text
    heading = re.search("<h1>(.*?)</h1>", report_page(compression("a", evaluation=evaluation)), re.DOTALL)
    assert heading is not None
    assert " ".join(Page(heading[1]).text.split()) == "47 % smaller, 0.50x latency, accuracy 97.5 -> 97.0 %"
    # Without a standard error any drop is worse.
    page = report_page(compression("a", evaluation=evaluation))
    worse = re.findall(r'class="[^"]*worse">(.*?)<', page)
    assert worse == ["accuracy 97.5 -&gt; 97.0 %", "97.5 % &rarr; 97.0 %", "-0.50 points", "-0.50 points"]
    alike = replace(evaluation, drop_error=0.006)
    assert (
        "worse" not in report_page(compression("a", evaluation=alike)).partition("</style>")[2].partition("<script")[0]
    )
    lost = replace(evaluation, compressed=0.9, drop=0.075)
    assert "this is a large loss: keep more, or pass `calibration`" in report_page(compression("a", evaluation=lost))
    alone = replace(evaluation, baseline=None, drop=None, baseline_loss=None, baseline_cost=None, latency=())
    assert "97.0 %" in Page(report_page(compression("a", evaluation=alone))).text


def test_a_report_of_500_layers_with_long_names_takes_no_more_than_a_megabyte() -> None:
    page = report_page(many_layers(500))
    assert len(page.encode()) <= 1_000_000
    assert page.count('<tr class="layer"') == page.count('<svg class="spectrum"') == 500
    assert all(len(row.name) == 120 for row in layer_rows(many_layers(4)).rows)


def test_a_report_that_cannot_be_written_is_refused_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    existing = tmp_path / "there.html"
    existing.write_text("mine")
    for path in (existing, tmp_path / "model.safetensors", tmp_path / "no folder" / "r.html", Path("/proc/r.html")):
        with pytest.raises(BadInput):
            check_report_path(path, source=None, overwrite=False)
        with pytest.raises(BadInput):
            write_report(compression("a"), path, overwrite=False)
    assert existing.read_text() == "mine"
    check_report_path(existing, source=None, overwrite=True)
    write_report(compression("a"), existing, overwrite=True)
    assert existing.read_text().startswith("<!DOCTYPE html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.html"]
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(BadInput, match=r"pip install 'compressor\[report\]'"):
        check_report_path(tmp_path / "new.html", source=None, overwrite=False)


def test_a_report_in_an_output_folder_is_replaced_with_it_and_no_other_page_is(tmp_path: Path) -> None:
    def write_model() -> None:
        with staged_folder(tmp_path / "out", overwrite=True) as folder:
            (folder / "model.safetensors").write_bytes(b"")
            write_json(folder / "compression.json", {})

    for _ in range(2):
        write_model()
        write_report(compression("a"), tmp_path / "out" / "report.html", overwrite=True)
    write_model()
    assert not (tmp_path / "out" / "report.html").exists()
    (tmp_path / "out" / "mine.html").write_text("mine")
    with pytest.raises(BadInput, match=r"also holds mine\.html"):
        write_model()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "compression.json").write_text("{}")
    write_report(compression("a"), tmp_path / "elsewhere" / "report.html", overwrite=False)
    assert (tmp_path / "elsewhere" / "compression.json").read_text() == "{}"


def test_a_report_inside_the_model_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    inside = tmp_path / "model" / "r.html"
    with pytest.raises(BadInput, match="inside the input folder"):
        check_report_path(inside, source=tmp_path / "model", overwrite=True)
    with pytest.raises(BadInput, match="inside the input folder"):
        write_report(compression("a", source=str(tmp_path / "model")), inside, overwrite=True)
    assert not inside.exists()
