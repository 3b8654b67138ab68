"""The report in a real browser: nothing is asked of a network, and it can be read and operated on any screen."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser
from safetensors.torch import save_file

import compressor
from compressor.formatting import format_size
from compressor.planning import Budget, CalibrationResult, DropSearch, Trial
from compressor.report import write_report
from compressor.report.html import report_page
from compressor.report.layer_groups import in_natural_order
from compressor.report.other_sizes import other_sizes
from compressor.results import Compression
from tests.report.browsing import OpenedPage, contrast, in_browser
from tests.report.many_layers import many_layers

PHONE, TABLET, DESK = 380, 800, 1280


@pytest.fixture(scope="module")
def compression(tmp_path_factory: pytest.TempPathFactory) -> Compression:
    """A small model trained by a recipe of which an edge and a bound that binds are known."""
    place = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    names = [f"encoder.layers.{i}.a_rather_long_block_name.{part}" for i in range(3) for part in ("query", "output")]
    save_file({f"{name}.weight": torch.randn(64, 48) for name in [*names, "head"]}, place / "model.safetensors")
    recipe = compressor.TrainingRecipe(
        optimizer="sgd",
        momentum=0.0,
        learning_rate=0.2,
        weight_decay=0.3,
        batch_size=1,
        steps=40,
        schedule="constant",
        sequence_length=1,
        undecayed=("*.bias",),
    )
    (place / "train.py").write_text(
        "from torch import nn\n\n\ndef build():\n    tree = nn.Module()\n"
        + "".join(f"    put(tree, {name!r})\n" for name in [*names, "head"])
        + "    return tree\n\n\ndef put(tree, name):\n    *path, last = name.split('.')\n    for part in path:\n"
        "        if part not in tree._modules:\n            tree.add_module(part, nn.Module())\n"
        "        tree = tree._modules[part]\n    tree.add_module(last, nn.Linear(48, 64, bias=False))\n"
    )
    return compressor.compress(
        place / "model.safetensors", keep=0.5, recipe=recipe, factory=f"{place / 'train.py'}:build"
    )


@pytest.fixture(scope="module")
def calibrated(compression: Compression) -> Compression:
    """The same as if calibration and a search had been done: every figure that there is."""
    plan, eligible = compression.plan, compression.plan.eligible_before
    trials = (
        Trial(0.5, plan.eligible_after, 0.004, 0.002),
        Trial(0.3, eligible * 3 // 10, 0.08, 0.01),
        Trial(0.8, 16000, -0.002, 0.0),
    )
    return replace(
        compression,
        plan=replace(
            plan,
            budget=Budget("max-drop", 0.01),
            calibration=CalibrationResult(96, 32, 1.0, predicted_loss=0.02, holdout_loss=0.05),
            search=DropSearch("accuracy", "builtin:digits, validation split", 360, 0.01, trials),
        ),
        measured=tuple(replace(m, weighted_values=m.singular_values) for m in compression.measured),
    )


# The page


@pytest.mark.slow
def test_an_edge_and_a_bound_are_told_and_drawn_where_they_are_known(compression: Compression) -> None:
    page = report_page(compression)
    for layer in compression.inspected:
        assert layer.window is not None
        assert layer.window.vacuous is False
        assert f"{layer.initialization.above_edge} above the edge, bound {layer.window.rank_bound}" in page
    layers = len(compression.inspected)
    assert page.count('<path class="e"') == page.count('<path class="m"') == layers
    assert len(re.findall(r'class="bar" style="[^"]*;--e:[\d.]+;--m:[\d.]+"', page)) == layers
    unknown = report_page(replace(compression, inspected=()))
    assert '<path class="e"' not in unknown
    assert "memory window" not in unknown


@pytest.mark.slow
def test_the_losses_predicted_and_measured_are_told_apart(calibrated: Compression) -> None:
    page = report_page(calibrated)
    assert "this model, predicted: 0.02" in page
    assert "this model, measured on the 32 holdout examples: 0.05" in page
    [predicted] = re.findall('<span class="mark ours predicted[^>]*aria-label="([^"]*)"', page)
    assert predicted.startswith("this model, predicted")


# The browser


@pytest.fixture(scope="module")
def path(calibrated: Compression, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(calibrated, path, overwrite=False)
    return path


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of 80 layers in 20 blocks."""
    path = tmp_path_factory.mktemp("many") / "report.html"
    path.write_text(report_page(many_layers(80)))
    return path


@in_browser
def test_one_file_is_asked_for_and_nothing_goes_wrong(browser: Browser, path: Path) -> None:
    opened = OpenedPage(browser, path)
    assert opened.requests == [path.as_uri()]
    assert opened.errors == []
    assert opened.page.locator("svg.spectrum").count() == 7
    opened.context.close()


@in_browser
@pytest.mark.parametrize("width", [PHONE, TABLET, DESK])
@pytest.mark.parametrize("of", ["path", "many"])
def test_nothing_is_wider_than_the_screen_but_what_can_be_scrolled(
    browser: Browser, request: pytest.FixtureRequest, *, width: int, of: str
) -> None:
    opened = OpenedPage(browser, request.getfixturevalue(of), width)
    assert opened.page.evaluate("document.documentElement.scrollWidth") == width
    boxes = opened.page.locator(
        "h1, h2, p, figure, .plot, .tick, .mark i, .tiles div, .scroll, .controls"
    ).evaluate_all("all => all.map(e => e.getBoundingClientRect()).map(r => [r.left, r.right])")
    assert len(boxes) > 30
    assert all(left >= 0 and right <= width for left, right in boxes)
    # What is said of a point stays on the screen too.
    for mark in opened.page.locator(".mark").all():
        mark.focus()
        tip = mark.locator(".tip").bounding_box()
        assert tip is not None
        assert tip["x"] >= 0
        assert tip["x"] + tip["width"] <= width
    opened.context.close()


@in_browser
@pytest.mark.parametrize("width", [PHONE, TABLET, DESK])
@pytest.mark.parametrize("of", ["path", "many"])
def test_no_table_is_cut_off_at_a_side(
    browser: Browser, request: pytest.FixtureRequest, *, width: int, of: str
) -> None:
    opened = OpenedPage(browser, request.getfixturevalue(of), width)
    page = opened.page
    page.locator("summary").click()
    fold = page.locator("#fold")
    if fold.inner_text() == "Unfold all":
        fold.click()
    cut = page.locator(".scroll").evaluate_all(
        "all => all.filter(e => e.scrollWidth > e.clientWidth).map(e => e.getAttribute('aria-label'))"
    )
    assert cut == []
    # What is stacked says in every cell what it is, also where it is grouped anew, and can still be sorted.
    if width == PHONE:
        page.get_by_label("Group by").select_option("kind")
        if fold.inner_text() == "Unfold all":
            fold.click()
        named = page.locator("#layers.stacked tbody td:visible").evaluate_all(
            "all => all.map(e => getComputedStyle(e, '::before').content)"
        )
        assert len(named) > 50
        assert {'"relative loss error"', '"rank"', '"numbers"'} <= set(named)
        assert all(page.get_by_role("button", name=name, exact=True).is_visible() for name in ("layer", "rank", "kept"))
    page.set_viewport_size({"width": 1900, "height": 900})
    assert page.locator(".stacked").count() == 0
    opened.context.close()


@in_browser
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_labels_of_axes_are_large_enough_and_apart(browser: Browser, path: Path, width: int) -> None:
    opened = OpenedPage(browser, path, width)
    areas = opened.page.locator(".area").evaluate_all(
        """all => all.map(area => Array.from(area.querySelectorAll('.tick, .axis')).map(e => {
            const box = e.getBoundingClientRect();
            return [e.textContent, parseFloat(getComputedStyle(e).fontSize), box.left, box.top, box.right, box.bottom];
        }))"""
    )
    assert len(areas) == 2
    for labels in areas:
        assert len(labels) > 6
        for i, (name, size, *box) in enumerate(labels):
            assert size >= 11, name
            for other, _, *its in labels[:i]:
                apart = box[2] <= its[0] or its[2] <= box[0] or box[3] <= its[1] + 1 or its[3] <= box[1] + 1
                assert apart, (name, other)
    titles = opened.page.locator(".axis").all_inner_texts()
    assert len(titles) == 4
    assert "weight files, kB" in titles
    opened.context.close()


@in_browser
def test_bars_are_as_long_as_their_numbers_say(browser: Browser, path: Path, calibrated: Compression) -> None:
    opened = OpenedPage(browser, path)
    places = opened.page.locator("#layers .layer .bar").evaluate_all(
        """all => all.map(e => {
            const sizes = getComputedStyle(e).backgroundSize;
            const shares = Array.from(sizes.matchAll(/([0-9.]+)%[)]/g), found => parseFloat(found[1]));
            return [...shares, e.getBoundingClientRect().width];
        })"""
    )
    layers = in_natural_order(calibrated.plan.layers)
    largest = max(layer.parameters_before for layer in layers)
    for layer, rank, size in zip(layers, places[::2], places[1::2], strict=True):
        assert rank[0] == pytest.approx(100 * (layer.truncated_to or 48) / 48, abs=0.1)
        assert size[0] == pytest.approx(100 * layer.parameters / largest, abs=0.1)
        assert size[1] == pytest.approx(100 * layer.parameters_before / largest, abs=0.1)
        assert size[2] > 50
    opened.context.close()


@in_browser
def test_the_slider_and_the_pointer_show_other_sizes(browser: Browser, path: Path, calibrated: Compression) -> None:
    sizes = other_sizes(calibrated)
    assert sizes is not None
    opened = OpenedPage(browser, path)
    slider, output = opened.page.get_by_role("slider"), opened.page.locator("output")
    assert output.inner_text().startswith("this model: ")
    slider.focus()
    opened.page.keyboard.press("Home")
    least = sizes.sizes[0]
    assert output.inner_text().startswith(format_size(least.bytes))
    assert f"{least.loss:.3g} nats per prediction" in output.inner_text()
    assert opened.page.locator("code.whole").inner_text() == least.command
    shown = opened.page.locator("#sizes tbody tr").evaluate_all(
        "rows => rows.map(row => [row.cells[2].textContent, row.cells[3].textContent])"
    )
    assert shown == [[kind.ranks, kind.bits] for kind in least.kinds]
    assert slider.get_attribute("aria-valuetext") == output.inner_text()
    area = opened.page.locator("#losses").bounding_box()
    assert area is not None
    opened.page.mouse.move(area["x"] + area["width"] - 2, area["y"] + 9)
    assert output.inner_text().startswith(format_size(sizes.sizes[-1].bytes))
    opened.context.close()


@in_browser
def test_layers_are_folded_grouped_sorted_and_searched(browser: Browser, many: Path) -> None:
    opened = OpenedPage(browser, many)
    page = opened.page
    shown = page.locator("#layers tr.layer:visible")
    heads = page.locator("#layers .group:visible th")
    # More than fit on a screen are folded into their blocks, 2 before 10.
    assert shown.count() == 0
    assert [text.strip() for text in heads.all_inner_texts()] == [f"model.decoder.layers.{i}" for i in range(20)]
    page.get_by_role("checkbox", name="Show the layers of model.decoder.layers.2", exact=True).check()
    assert shown.count() == 4
    page.get_by_role("button", name="Fold all").click()
    page.get_by_label("Search").fill("layers.11.mlp")
    assert shown.count() == 2
    assert page.locator("#found").inner_text() == "2 of 80 layers"
    page.get_by_label("Search").fill("")
    page.get_by_label("Group by").select_option("none")
    assert shown.count() == 80
    page.get_by_role("button", name="relative loss error").click()
    errors = [float(text) for text in page.locator("#layers tr.layer td:nth-child(8)").all_inner_texts()]
    assert errors == sorted(errors)
    page.get_by_role("button", name="relative loss error").click()
    assert [float(text) for text in page.locator("#layers tr.layer td:nth-child(8)").all_inner_texts()] == errors[::-1]
    assert page.locator("[aria-sort=descending]").count() == 1
    page.get_by_role("button", name="layer", exact=True).click()
    names = page.locator("#layers tr.layer th").all_inner_texts()
    blocks = [int(name.split(".")[3]) for name in names]
    assert blocks == sorted(blocks)
    page.get_by_label("Group by").select_option("kind")
    assert heads.count() < 20
    opened.context.close()


@in_browser
def test_a_spectrum_can_be_enlarged(browser: Browser, path: Path) -> None:
    opened = OpenedPage(browser, path)
    button = opened.page.locator("#layers .pictured").first
    button.press("Enter")
    assert button.get_attribute("aria-expanded") == "true"
    detail = opened.page.locator("#layers .detail")
    assert "singular value over the largest" in detail.inner_text()
    box = detail.locator("svg").bounding_box()
    assert box is not None
    assert box["height"] > 200
    button.press("Enter")
    assert detail.count() == 0
    button.press("Enter")
    opened.page.get_by_label("Search").fill("no such layer")
    assert not detail.is_visible()
    opened.page.get_by_label("Search").fill("")
    assert detail.is_visible()
    opened.page.get_by_role("button", name="form", exact=True).click()
    assert detail.count() == 0
    assert opened.page.locator("#layers [aria-expanded=true]").count() == 0
    opened.context.close()


@in_browser
def test_all_is_there_without_the_script(browser: Browser, many: Path) -> None:
    opened = OpenedPage(browser, many, java_script_enabled=False)
    page = opened.page
    assert page.locator("#layers tr.layer").count() == 80
    page.locator("#layers .group input").first.check()
    assert page.locator("#layers tr.layer:visible").count() == 4
    page.locator("summary").click()
    assert page.get_by_role("region", name="Other sizes").locator("tr:visible").count() > 10
    assert page.get_by_role("slider").count() == 0
    page.emulate_media(media="print")
    assert page.locator("#layers tr.layer:visible").count() == 80
    opened.context.close()


@in_browser
def test_light_and_dark_differ_and_both_can_be_read(browser: Browser, path: Path) -> None:
    seen = []
    for scheme in ("light", "dark"):
        opened = OpenedPage(browser, path, color_scheme=scheme)
        color = opened.page.evaluate(
            "names => Object.fromEntries(names.map("
            "n => [n, getComputedStyle(document.documentElement).getPropertyValue('--' + n)]))",
            ["paper", "card", "ink", "quiet", "before", "after", "edge", "bound", "worse"],
        )
        # WCAG 2.1: 4.5 for text, which marks are explained in too, and 3 for what a figure is understood by.
        for under in ("paper", "card"):
            read = ("ink", "quiet", "edge", "bound", "worse")
            assert min(contrast(color[name], color[under]) for name in read) > 4.5
            assert min(contrast(color[name], color[under]) for name in ("before", "after")) >= 3
        seen.append((color["paper"], opened.page.locator("h1").evaluate("e => getComputedStyle(e).color")))
        opened.page.emulate_media(media="print")
        assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        opened.context.close()
    assert all(light != dark for light, dark in zip(*seen, strict=True))


@in_browser
def test_what_can_be_scrolled_or_pointed_at_is_reached_by_keyboard_and_named(browser: Browser, path: Path) -> None:
    opened = OpenedPage(browser, path, PHONE)
    regions = opened.page.locator(".scroll").evaluate_all("all => all.map(e => e.getAttribute('aria-label'))")
    marks = opened.page.locator(".mark").evaluate_all("all => all.map(e => e.getAttribute('aria-label'))")
    assert len(set(regions)) == len(regions) > 4
    assert len(set(marks)) == len(marks) > 4
    reached = []
    for _ in range(100):
        opened.page.keyboard.press("Tab")
        reached.append(opened.page.evaluate("document.activeElement.getAttribute('aria-label')"))
        assert opened.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
        if reached[-1] == "Training recipe":
            break
    # The table in what is not unfolded is not reached.
    assert {*regions, *marks} - {*reached} == {"Other sizes"}
    opened.context.close()


@in_browser
def test_figures_have_names_and_headings_are_in_order(browser: Browser, path: Path) -> None:
    opened = OpenedPage(browser, path)
    unnamed = opened.page.locator("svg:not([aria-label]):not([aria-hidden])")
    assert unnamed.count() == 0
    assert opened.page.locator("h1").count() == 1
    assert opened.page.locator("h2").all_inner_texts() == [
        "Loss against size",
        "Layers",
        "Before and after",
        "How it was made",
        "Training recipe",
    ]
    opened.context.close()
