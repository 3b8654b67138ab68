"""The HTML report: true to the result, safe to open, the same bytes for the same result."""

from __future__ import annotations

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
from compressor.io import staged_folder, write_json
from compressor.planning import Budget, CalibrationResult, LayerPlan, Plan
from compressor.recipe import TrainingRecipe
from compressor.report import check_report_path, write_report
from compressor.report.figures import sizes_figure, spectrum_figure
from compressor.report.html import report_page
from compressor.report.wording import warning_words
from compressor.results import BeforeAfter, Compression

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
        assert hostile.text.count(name) >= 2
    write_report(compression(*HOSTILE, source=HOSTILE[0], output=HOSTILE[1]), tmp_path / "r.html", overwrite=False)
    written = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert sorted(set(written.tags)) == sorted(set(plain.tags))
    assert "\x1b" not in written.text


def test_nothing_is_loaded_from_anywhere() -> None:
    page = report_page(compression("a", "b"))
    found = Page(page)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(found.tags)
    assert all(name not in {"src", "srcset", "action"} for name, _ in found.attributes)
    assert all(value.startswith("#") for name, value in found.attributes if name.endswith("href"))
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_ids_are_unique_and_every_reference_has_its_target() -> None:
    page = report_page(compression("a", "b", "c"))
    found = Page(page)
    ids = [value for name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {value[1:] for name, value in found.attributes if name.endswith("href")}
    assert targets | set(re.findall(r"url\(#([^)]*)\)", page)) <= set(ids)


def test_every_color_comes_from_the_page_so_that_dark_mode_has_its_own() -> None:
    svg = sizes_figure([layer("a"), layer("b", None)]) + spectrum_figure(np.geomspace(1, 0.1, 30), 3, prefix="s")
    assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg)) <= {
        *("none", "var(--ink)", "var(--faint)", "var(--before)", "var(--after)")
    }
    assert not re.search(r"#[0-9a-fA-F]{6}\b", svg)
    style = report_page(compression("a")).partition("<style>")[2].partition("</style>")[0]
    light, dark = style.split("prefers-color-scheme: dark")
    for name in ("ink", "faint", "before", "after", "paper"):
        assert f"--{name}:" in light
        assert f"--{name}:" in dark


def test_the_page_tells_the_numbers_of_the_result() -> None:
    text = " ".join(Page(report_page(compression("first", "second"))).text.split())
    for words in ("123,456", "65,432", "53.0 %", "494 kB", "262 kB", "rank 3", "dense", "0.0625", "its share"):
        assert words in text
    for words in ("keep 0.5", "check the accuracy", "learning rate", "flag --lr", "digits.safetensors"):
        assert words in text


def test_every_row_and_every_column_has_a_header() -> None:
    headers = re.findall(r"<th[^>]*>([^<]*)</th>", report_page(compression("a")))
    # The corner of "before and after" alone is empty.
    assert [header for header in headers if not header] == [""]
    assert "compared" in headers


def test_every_layer_and_its_reason_is_in_the_table() -> None:
    page = report_page(compression("first.dense", "second.dense"))
    table = page.partition("<h2>Layers</h2>")[2].partition("</table>")[0]
    rows = [Page(row).text for row in table.split("<tr>")[2:]]
    assert [row.startswith(name) for row, name in zip(rows, ("first.dense", "second.dense"), strict=True)] == [True] * 2
    assert all("its share" in row for row in rows)


def test_calibration_is_told_where_it_was_done() -> None:
    plain = compression("a")
    result = CalibrationResult(examples=96, holdout=32, exponent=0.5, predicted_loss=0.0123, holdout_loss=0.0341)
    calibrated = replace(plain, plan=replace(plain.plan, calibration=result))
    text = " ".join(Page(report_page(calibrated)).text.split())
    for words in ("96 examples", "holdout of 32", "0.034", "0.012"):
        assert words in text
    assert "holdout" not in Page(report_page(plain)).text


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
    assert re.findall(r'class="[^"]*worse">([^<]*)<', page) == ["accuracy 97.5 -&gt; 97.0 %", "-0.50 points"]
    alike = replace(evaluation, drop_error=0.006)
    assert "worse" not in report_page(compression("a", evaluation=alike)).partition("</style>")[2]
    lost = replace(evaluation, compressed=0.9, drop=0.075)
    assert "this is a large loss: keep more, or pass `calibration`" in report_page(compression("a", evaluation=lost))
    alone = replace(evaluation, baseline=None, drop=None, baseline_loss=None, baseline_cost=None, latency=())
    assert "97.0 %" in Page(report_page(compression("a", evaluation=alone))).text


def widths(svg: str, color: str) -> list[float]:
    """The widths of the filled shapes of a color."""
    found = []
    for outline, style in re.findall(r'<path d="([^"]*)"[^>]*style="([^"]*)"', svg):
        if f"fill: var(--{color})" in style:
            across = [float(x) for x, _ in re.findall(r"[ML] (\S+) (\S+)", outline)]
            found.append(max(across) - min(across))
    return found


def test_bars_are_in_proportion_to_the_stored_parameters() -> None:
    layers = [layer("a", 3), layer("b", None), layer("c", 9)]
    svg = sizes_figure(layers)
    before, after = (np.array(widths(svg, color)) for color in ("before", "after"))
    scale = before[0] / layers[0].parameters_before
    np.testing.assert_allclose(before / scale, [each.parameters_before for each in layers], rtol=1e-4)
    np.testing.assert_allclose(after / scale, [each.parameters for each in layers], rtol=1e-4)


def test_a_chosen_rank_is_marked_in_the_spectrum_and_a_dense_layer_has_no_mark() -> None:
    spectrum = np.geomspace(3.0, 1e-4, 40)
    assert "var(--after)" in spectrum_figure(spectrum, 7, prefix="a")
    assert ">7<" in re.sub(r"\s", "", spectrum_figure(spectrum, 7, prefix="a"))
    assert "var(--after)" not in spectrum_figure(spectrum, None, prefix="a")


@pytest.mark.parametrize(
    "values",
    [
        np.ones(64),
        np.linspace(1, 0.9, 64),
        np.geomspace(1, 0.2, 64),
        np.geomspace(1, 1e-3, 64),
        np.geomspace(1, 1e-9, 64),
    ],
)
def test_the_height_of_a_spectrum_can_be_read_from_two_labels_or_more(values: np.ndarray[Any, Any]) -> None:
    # Labels of the index are whole numbers above one.
    labels = {
        float(text) for text in re.findall(r">\s*([\d.e-]+)\s*</text>", spectrum_figure(values, None, prefix="a"))
    }
    assert len([label for label in labels if label <= 1]) >= 2


def test_bars_of_layers_with_long_names_have_labels_of_their_own() -> None:
    names = [f"encoder.{'x' * 30}.layers.{i}.blocks.{j}.{'y' * 40}" for i in range(2) for j in range(3)]
    labels = re.findall(r">\s*(…[^<]*?)\s*</text>", sizes_figure([layer(name) for name in names]))
    assert len(set(labels)) == len(names)


@pytest.mark.parametrize("values", [np.zeros(5), np.ones(1), np.array([]), np.geomspace(1, 1e-30, 5000)])
def test_any_spectrum_has_a_small_figure(values: np.ndarray[Any, Any]) -> None:
    svg = spectrum_figure(values, None, prefix="a")
    assert svg.startswith("<svg")
    assert "nan" not in svg
    assert len(svg) < 12_000


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
    monkeypatch.setitem(sys.modules, "matplotlib", None)
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
