"""The report in a real browser: nothing is asked of a network, and it can be read and operated on any screen."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from playwright.sync_api import Browser
from safetensors.torch import save_file

import compressor
from compressor.planning import Budget, CalibrationResult, DropSearch, SizeCurve, Trial
from compressor.report import write_report
from compressor.report.figures import RankMarks, curve_figure, ranks_figure
from compressor.report.html import report_page
from compressor.report.losses import curve_points
from compressor.results import Compression
from tests.report.browsing import OpenedPage, contrast, in_browser

PHONE, DESK = 380, 1280


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
        words = f"{layer.initialization.above_edge} above the edge, bound {layer.window.rank_bound}"
        assert page.count(words) >= 1
    assert page.count("var(--edge)") > len(compression.inspected)
    assert page.count("var(--bound)") > len(compression.inspected)
    unknown = report_page(replace(compression, inspected=()))
    assert "var(--edge)" not in unknown.partition("</style>")[2]
    assert "memory window" not in unknown


@pytest.mark.slow
def test_the_losses_predicted_and_measured_are_told_and_one_that_has_no_logarithm_is_not_drawn(
    calibrated: Compression,
) -> None:
    page = report_page(calibrated)
    assert "predicted for the ranks chosen:\n 0.02" in page
    assert "measured on the 32 holdout examples:\n 0.05" in page
    assert calibrated.curve is not None
    points = curve_points(calibrated)
    negative = [replace(point, loss=-0.01) for point in points]
    drawn, without = (curve_figure(calibrated.curve, given, 1000).count("var(--after)") for given in (points, negative))
    assert drawn > without
    assert "not above zero" in negative[0].words


def test_a_curve_without_loss_has_a_figure() -> None:
    assert curve_figure(SizeCurve((64,), (0.0,), "nats per prediction"), (), 64).startswith("<svg")


def test_bars_of_ranks_are_in_proportion_to_the_ranks(compression: Compression) -> None:
    layers = compression.plan.layers
    svg = ranks_figure(layers, [RankMarks(full=48) for _ in layers])
    widths: dict[str, list[float]] = {}
    for outline, color in re.findall(r'<path d="([^"]*)"[^>]*style="fill: var\(--(before|after)\)', svg):
        across = [float(x) for x, _ in re.findall(r"[ML] (\S+) (\S+)", outline)]
        widths.setdefault(color, []).append(max(across) - min(across))
    shares = np.array(widths["after"]) / np.array(widths["before"])
    np.testing.assert_allclose(shares, [(layer.rank or 48) / 48 for layer in layers], rtol=1e-4)


# The browser


@pytest.fixture(scope="module")
def path(calibrated: Compression, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(calibrated, path, overwrite=False)
    return path


@in_browser
def test_one_file_is_asked_for_and_nothing_goes_wrong(browser: Browser, path: Path) -> None:
    opened = OpenedPage(browser, path)
    assert opened.requests == [path.as_uri()]
    assert opened.errors == []
    assert opened.page.locator("svg").count() == 4 + 7
    opened.context.close()


@in_browser
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_nothing_is_wider_than_the_screen_but_what_can_be_scrolled(browser: Browser, path: Path, width: int) -> None:
    opened = OpenedPage(browser, path, width)
    assert opened.page.evaluate("document.documentElement.scrollWidth") == width
    boxes = opened.page.locator("h1, h2, p, figure, figure svg, .scroll").evaluate_all(
        "all => all.map(e => e.getBoundingClientRect()).map(r => [r.left, r.right])"
    )
    assert len(boxes) > 20
    assert all(left >= 0 and right <= width for left, right in boxes)
    opened.context.close()


@in_browser
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_labels_of_figures_are_large_enough_and_apart(browser: Browser, path: Path, width: int) -> None:
    opened = OpenedPage(browser, path, width)
    figures = opened.page.locator("svg").evaluate_all(
        """all => all.map(svg => Array.from(svg.querySelectorAll('text')).map(text => {
            const box = text.getBoundingClientRect();
            const size = parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a;
            return [text.textContent.trim(), size || Infinity, box.left, box.top, box.right, box.bottom];
        }))"""
    )
    assert sum(map(len, figures)) > 40
    for labels in figures:
        for i, (name, size, *box) in enumerate(labels):
            assert size >= 9, name
            for other, _, *its in labels[:i]:
                apart = box[2] <= its[0] or its[2] <= box[0] or box[3] <= its[1] + 1 or its[3] <= box[1] + 1
                assert apart, (name, other)
    opened.context.close()


@in_browser
def test_light_and_dark_differ_and_both_can_be_read(browser: Browser, path: Path) -> None:
    seen = []
    for scheme in ("light", "dark"):
        opened = OpenedPage(browser, path, color_scheme=scheme)
        color = opened.page.evaluate(
            "names => Object.fromEntries(names.map("
            "n => [n, getComputedStyle(document.documentElement).getPropertyValue('--' + n)]))",
            ["paper", "ink", "quiet", "before", "after", "edge", "bound"],
        )
        # WCAG 2.1: 4.5 for text, which marks are explained in too, and 3 for what a figure is understood by.
        assert min(contrast(color[name], color["paper"]) for name in ("ink", "quiet", "after", "edge", "bound")) > 4.5
        assert contrast(color["before"], color["paper"]) >= 3
        shown = opened.page.locator("svg text").first.evaluate("e => getComputedStyle(e).fill")
        seen.append((color["paper"], shown))
        opened.context.close()
    assert all(light != dark for light, dark in zip(*seen, strict=True))


@in_browser
def test_what_is_too_wide_can_be_reached_named_and_scrolled_from_the_keyboard(browser: Browser, path: Path) -> None:
    opened = OpenedPage(browser, path, PHONE)
    regions = opened.page.get_by_role("region")
    names = regions.evaluate_all("all => all.map(e => e.getAttribute('aria-label'))")
    assert len(set(names)) == len(names) == opened.page.locator(".scroll").count() > 3
    reached = []
    for _ in names:
        opened.page.keyboard.press("Tab")
        reached.append(opened.page.evaluate("document.activeElement.getAttribute('aria-label')"))
        assert opened.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    assert reached == names
    ranks = opened.page.get_by_role("region", name="Rank of every layer")
    ranks.focus()
    opened.page.keyboard.press("ArrowRight")
    # From here, since the page allows no evaluation of text.
    for _ in range(200):
        scrolled = opened.page.evaluate("document.activeElement.scrollLeft")
        if scrolled > 0:
            break
        opened.page.wait_for_timeout(20)
    assert scrolled > 0
    opened.context.close()


@in_browser
def test_figures_have_names_and_headings_are_in_order(browser: Browser, path: Path) -> None:
    opened = OpenedPage(browser, path)
    labels = opened.page.locator("svg").evaluate_all("all => all.map(e => [e.getAttribute('role'), e.ariaLabel])")
    assert all(role == "img" and label for role, label in labels)
    assert opened.page.locator("h1").count() == 1
    assert opened.page.locator("h2").all_inner_texts() == [
        "Before and after",
        "Loss against size",
        "Stored parameters of every layer",
        "Rank of every layer",
        "Singular values",
        "Layers",
        "Training recipe",
    ]
    opened.context.close()
