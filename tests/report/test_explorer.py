"""The explorer: the same simulation as the Python code, drawn and operated in a real browser, with nothing loaded."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from playwright.sync_api import Browser, Page
from safetensors.torch import save_file

import compressor
from compressor.cli.run import run
from compressor.errors import BadInput
from compressor.measure import EPSILON, entropy_rank, memory_window, stable_rank
from compressor.measure.simulation import (
    SimulatedTraining,
    gaussian_spectra,
    remembered_strokes,
    simulated_weights,
    standard_normals,
)
from compressor.recipe import TrainingRecipe
from compressor.report.explorer import LIMITS, PRESETS, ExploredLayers, WrittenSpectrum, explorer_page, pictured
from tests.report.browsing import OpenedPage, contrast, in_browser

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\u2028'\""


def constant(training: SimulatedTraining) -> TrainingRecipe:
    return TrainingRecipe(
        optimizer="sgd",
        momentum=0.0,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        batch_size=training.batch_size,
        schedule="constant",
    )


def true_window(training: SimulatedTraining) -> float:
    shape = (training.width, training.width)
    steps = memory_window(constant(training), shape=shape, uses=training.uses, epsilon=EPSILON).steps
    return math.inf if steps is None else steps


def explored(names: tuple[str, ...], shape: tuple[int, int] | None, uses: int | None, *, recipe: TrainingRecipe) -> Any:
    window = memory_window(recipe, shape=shape or (1, 1), uses=uses, epsilon=EPSILON)
    return ExploredLayers(names, shape, uses, window, (3.0, 4.5))


# The file


class Tags(HTMLParser):
    """The tags and attributes that a browser would find, and the text of the embedded content."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[tuple[str, str | None], ...]]] = []
        self.content: str | None = None
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(attrs)))
        self.inside = ("id", "content") in attrs

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.content, self.inside = data, False


def test_the_page_is_one_small_file_that_refers_to_nothing() -> None:
    page = explorer_page()
    assert len(page.encode()) < 150_000
    attributes = {name for _, attrs in Tags(page).found for name, _ in attrs}
    assert not attributes & {"src", "srcset", "href", "action", "data"}
    assert not re.search(r"@import|url\(|https?://|fetch\(|XMLHttpRequest|WebSocket|\bimport\b", page)
    assert "default-src 'none'" in page
    assert explorer_page() == page


def test_names_from_a_checkpoint_are_content_and_never_markup() -> None:
    recipe = TrainingRecipe(optimizer="sgd", learning_rate=0.1, sources={"learning_rate": HOSTILE})
    plain, hostile = (
        Tags(explorer_page(recipe, [explored((name,), (8, 8), 1, recipe=recipe)])) for name in ("plain", HOSTILE)
    )
    assert hostile.found == plain.found
    assert hostile.content is not None
    # Not only tags: an opened comment with a script in it would hide the script element's own end.
    assert "<" not in hostile.content
    [layer] = json.loads(hostile.content)["recipe"]["layers"]
    assert "</script><script>alert(1)</script>" in layer["name"]


@settings(max_examples=60)
@given(
    learning_rate=st.none() | st.floats(0, 1e3),
    weight_decay=st.none() | st.floats(0, 10),
    batch_size=st.none() | st.integers(1, 10**7),
    uses=st.none() | st.integers(1, 10**5),
    shape=st.none() | st.tuples(st.integers(1, 10**5), st.integers(1, 10**5)),
    steps=st.none() | st.integers(1, 1000),
)
def test_the_picture_of_a_recipe_is_the_recipe_or_says_where_it_is_not(
    learning_rate: Any, weight_decay: Any, batch_size: Any, *, uses: Any, shape: Any, steps: Any
) -> None:
    recipe = TrainingRecipe(
        optimizer="sgd",
        momentum=0.0,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        batch_size=batch_size,
        steps=steps,
        schedule="constant",
    )
    training, remarks = pictured(recipe, explored(("a",), shape, uses, recipe=recipe))
    said = " ".join(remarks)
    asked = {
        "learning_rate": (learning_rate, "learning rate"),
        "weight_decay": (weight_decay, "weight decay"),
        "batch_size": (batch_size, "batch size"),
        "uses": (uses, "uses per example"),
        "width": (None if shape is None else min(shape), "width"),
    }
    for name, (value, words) in asked.items():
        drawn = getattr(training, name)
        assert LIMITS[name][0] <= drawn <= LIMITS[name][1] or (name, drawn) == ("weight_decay", 0)
        assert (drawn == value) != (words in said)
    assert 0 <= training.surviving_initialization <= 1


def test_what_the_picture_leaves_out_of_a_recipe_is_said() -> None:
    recipe = replace(constant(PRESETS[0].training), momentum=0.9, schedule="cosine", steps=50)
    _, remarks = pictured(recipe, explored(("a",), (32, 32), 1, recipe=recipe))
    assert any("momentum" in remark for remark in remarks)
    assert any("schedule" in remark for remark in remarks)
    adaptive = TrainingRecipe(optimizer="adamw", learning_rate=0.1, weight_decay=0.1, batch_size=4)
    assert any("adamw" in remark for remark in pictured(adaptive, explored(("a",), (32, 32), 1, recipe=adaptive))[1])


def test_explore_writes_where_it_may_and_refuses_by_name_where_not(tmp_path: Path) -> None:
    path = compressor.explore(output=tmp_path / "page.html")
    assert path.read_text(encoding="utf-8") == explorer_page()
    with pytest.raises(BadInput, match="already exists"):
        compressor.explore(output=path)
    assert compressor.explore(output=path, overwrite=True) == path
    with pytest.raises(BadInput, match="is an HTML file"):
        compressor.explore(output=tmp_path / "model.safetensors", overwrite=True)
    with pytest.raises(BadInput, match="no such file"):
        compressor.explore(output=tmp_path / "other.html", recipe=tmp_path / "missing.yaml")
    assert not (tmp_path / "other.html").exists()


def test_the_command_says_what_it_wrote_and_fails_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 0.07\nweight_decay: 0.3\n", encoding="utf-8")
    page = tmp_path / "page.html"
    assert run(["explore", "-o", str(page), "--recipe", str(recipe)]) == 0
    assert capsys.readouterr().out == f"explorer  {page}\n"
    assert '"learning_rate": 0.07' in page.read_text(encoding="utf-8")
    assert run(["explore", "-o", str(page)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)


ODD = SimulatedTraining(12, 3, 5, learning_rate=0.15, weight_decay=0.0347, anisotropy=0.7, surviving_initialization=0.4)
DIGITS_MLP = Path(__file__).parents[2] / "model_cards" / "digits-mlp"


def test_the_page_tells_the_windows_that_inspect_tells(tmp_path: Path) -> None:
    page = compressor.explore(output=tmp_path / "page.html", recipe=DIGITS_MLP)
    content = json.loads(Tags(page.read_text(encoding="utf-8")).content or "")
    told = {layer["name"]: (layer["window"], layer["bound"], layer["vacuous"]) for layer in content["recipe"]["layers"]}
    windows = {each.layer.name: each.window for each in compressor.inspect(DIGITS_MLP).layers if each.window}
    assert told == {name: (w.steps, w.rank_bound, w.vacuous) for name, w in windows.items()}
    assert (767, 767, False) in told.values()
    assert {content["epsilon"]} == {window.epsilon for window in windows.values()} == {EPSILON}


@pytest.mark.parametrize(("schedule", "momentum"), [("cosine", 0.0), ("constant", 0.9), ("linear", 0.5)])
def test_the_picture_forgets_as_fast_as_the_recipe(schedule: str, momentum: float) -> None:
    recipe = replace(constant(ODD), schedule=schedule, momentum=momentum, steps=3000, learning_rate=0.05)
    layers = explored(("a",), (32, 32), 1, recipe=recipe)
    training, remarks = pictured(recipe, layers)
    assert true_window(training) == layers.window.steps
    assert any("recipe's window" in remark for remark in remarks)


# The browser


class Opened(OpenedPage):
    """The explorer in a browser."""

    def __init__(self, browser: Browser, path: Path, **options: Any) -> None:
        super().__init__(browser, path, **options)
        self.settle()

    def state(self) -> dict[str, Any]:
        return self.page.evaluate("explorer.state()")

    def settle(self) -> dict[str, Any]:
        """Wait until all steps are taken and drawn; from here, since the page allows no evaluation of text."""
        for _ in range(600):
            state = self.state()
            if state["step"] == state["target"] and state["drawn"]:
                return state
            time.sleep(0.02)
        raise AssertionError(f"still at step {state['step']} of {state['target']}")

    def drawn(self, name: str) -> str:
        return self.page.evaluate(
            "id => { const e = document.getElementById(id); return e.toDataURL ? e.toDataURL() : e.innerHTML; }", name
        )

    def text(self, name: str) -> str:
        return self.page.locator(f"#{name}").inner_text()

    def reading(self, name: str) -> str:
        return self.page.locator(f"#readings div:has(dt:text-is('{name}')) dd").inner_text()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compressor.explore(output=tmp_path_factory.mktemp("explorer") / "explorer.html")


@pytest.fixture(scope="module")
def functions(browser: Browser, path: Path) -> Iterator[Page]:
    """A page for the functions alone, which have no state."""
    opened = Opened(browser, path)
    yield opened.page
    opened.context.close()


@pytest.fixture
def opened(browser: Browser, path: Path) -> Iterator[Opened]:
    opened = Opened(browser, path)
    yield opened
    assert opened.errors == []
    assert opened.requests == [path.as_uri()]
    opened.context.close()


@in_browser
@pytest.mark.parametrize(
    "training",
    [*(preset.training for preset in PRESETS), ODD, replace(ODD, width=64, seed=2**32 - 1, weight_decay=0.0)],
)
def test_a_seeded_run_is_that_of_the_python_code(training: SimulatedTraining, functions: Page) -> None:
    steps = 120
    drawn = functions.evaluate("([training, steps]) => explorer.simulate(training, steps)", [training.to_dict(), steps])
    weights = next(islice(simulated_weights(training), steps, None))
    values = np.linalg.svd(weights, compute_uv=False)
    # 1e-6 was promised; the two differ by rounding alone.
    np.testing.assert_allclose(np.reshape(drawn["weights"], weights.shape), weights, rtol=0, atol=1e-11)
    np.testing.assert_allclose(drawn["singularValues"], values, rtol=0, atol=1e-11)
    assert drawn["entropyRank"] == pytest.approx(entropy_rank(values), abs=1e-9)
    assert drawn["stableRank"] == pytest.approx(stable_rank(values), abs=1e-9)


@in_browser
def test_normals_are_the_same_far_into_a_stream(functions: Page) -> None:
    for seed, start in ((1, 0), (2**32 - 1, 2**32 - 4), (7, 2**45 + 2)):
        drawn = functions.evaluate(
            "([seed, start]) => Array.from(explorer.standardNormals(seed, start, 9))", [seed, start]
        )
        np.testing.assert_allclose(drawn, standard_normals(seed, start, 9), rtol=1e-13, atol=1e-15)


@in_browser
@pytest.mark.parametrize("kind", ["zero", "rank one", "deficient", "graded", "orthogonal", "large"])
def test_singular_values_are_those_of_lapack(kind: str, functions: Page) -> None:
    z = np.random.default_rng(0).standard_normal((24, 24))
    matrix = {
        "zero": 0 * z,
        "rank one": np.outer(z[0], z[1]),
        "deficient": z[:, :7] @ z[:7],
        "graded": z * np.geomspace(1, 1e-12, 24),
        "orthogonal": np.linalg.qr(z)[0],
        "large": 1e9 * z,
    }[kind]
    drawn = functions.evaluate("([m, n]) => Array.from(explorer.singularValues(m, n))", [matrix.ravel().tolist(), 24])
    expected = np.linalg.svd(matrix, compute_uv=False)
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=1e-13 * max(expected[0], 1))


@in_browser
def test_the_window_is_the_librarys_wherever_the_sliders_stand(functions: Page) -> None:
    rates = [digit * 10.0**power for power in range(-4, 0) for digit in (1, 1.5, 3, 5, 8)] + [1.0]
    trainings = [replace(ODD, learning_rate=lr, weight_decay=wd) for lr in rates for wd in [0.0, *rates]]
    found = functions.evaluate("all => all.map(explorer.windowSteps)", [each.to_dict() for each in trainings])
    for training, steps in zip(trainings, found, strict=True):
        expected, decay = true_window(training), training.learning_rate * training.weight_decay
        # The n-th power of a number next to 1 is known to a relative n * 2^-53, which is less than a step but for
        # windows of a hundred million.
        assert steps == expected or abs(steps - expected) <= expected * 2**-53 / decay


@in_browser
def test_remembered_strokes_and_the_gaussian_reference_are_the_librarys(functions: Page) -> None:
    for preset in PRESETS:
        found = functions.evaluate("training => explorer.rememberedStrokes(training)", preset.training.to_dict())
        assert found == pytest.approx(remembered_strokes(preset.training), rel=1e-12)
    for width, anisotropy in ((8, 0.0), (12, 1.3)):
        spectra = gaussian_spectra(width, anisotropy)
        found = functions.evaluate(
            "([n, a]) => { const r = explorer.gaussianReference(n, a); return [r.entropyRank, ...r.spectrum]; }",
            [width, anisotropy],
        )
        expected = [np.mean([entropy_rank(s) for s in spectra]), *spectra.mean(axis=0)]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)


@in_browser
def test_every_preset_opens_without_an_error_and_shows_the_true_window(opened: Opened) -> None:
    for preset in PRESETS:
        opened.page.get_by_role("button", name=preset.name, exact=True).click()
        state = opened.settle()
        assert state["training"] == preset.training.to_dict()
        assert opened.reading("window n") == f"{true_window(preset.training):,} steps"
        assert opened.page.locator("[aria-pressed=true]").all_inner_texts() == [preset.name]
        assert preset.note in opened.text("note")


@in_browser
def test_every_slider_changes_what_is_drawn_at_the_same_step(opened: Opened) -> None:
    figures = ("matrix", "spectrum", "ranks")
    for name in LIMITS:
        opened.page.locator("#presets button").first.click()
        before = opened.settle()
        drawn = {figure: opened.drawn(figure) for figure in figures}
        slider = opened.page.locator(f"#{name}")
        slider.focus()
        slider.press("ArrowLeft" if name == "weight_decay" else "ArrowRight")
        after = opened.settle()
        assert after["step"] == before["step"] > 0
        assert {key for key, value in before["training"].items() if value != after["training"][key]} == {name}
        assert not [figure for figure in figures if opened.drawn(figure) == drawn[figure]]
        assert slider.get_attribute("aria-valuetext") == opened.text(f"{name}-value") == f"{after['training'][name]:g}"
        # The run under the new settings is the one that starts with them.
        weights = next(islice(simulated_weights(SimulatedTraining(**after["training"])), after["step"], None))
        rank = entropy_rank(np.linalg.svd(weights, compute_uv=False))
        assert opened.reading("entropy rank") == f"{rank:.3g} of {after['training']['width']}"


@in_browser
def test_the_heat_map_is_strongest_where_the_matrix_is_largest(opened: Opened) -> None:
    state = opened.state()
    weights = next(islice(simulated_weights(SimulatedTraining(**state["training"])), state["step"], None))
    pixels = opened.page.evaluate(
        "() => { const c = document.getElementById('matrix');"
        " return Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data); }"
    )
    colors = np.reshape(pixels, (*weights.shape, 4))[..., :3].astype(float)
    zero = colors[np.abs(weights) < 0.01 * np.abs(weights).max()].mean(axis=0)
    strength = np.linalg.norm(colors - zero, axis=2)
    assert np.argmax(np.where(weights > 0, strength, 0)) == np.argmax(weights)
    assert np.argmax(np.where(weights < 0, strength, 0)) == np.argmin(weights)
    positive, negative = (colors[np.unravel_index(i, weights.shape)] for i in (weights.argmax(), weights.argmin()))
    assert positive[0] > positive[2]
    assert negative[0] < negative[2]


@in_browser
def test_playback_works_from_the_keyboard_alone(opened: Opened) -> None:
    keyboard = opened.page.keyboard
    opened.page.locator("#play").focus()
    keyboard.press("Tab")
    keyboard.press("Tab")
    assert opened.page.evaluate("document.activeElement.id") == "reset"
    keyboard.press("Enter")
    assert opened.settle()["step"] == 0
    keyboard.press("Shift+Tab")
    for steps in (1, 2):
        keyboard.press("Space")
        assert opened.settle()["step"] == steps
    keyboard.press("Shift+Tab")
    keyboard.press("Enter")
    assert opened.text("play") == "Pause"
    for _ in range(200):
        if opened.state()["step"] >= 5:
            break
        time.sleep(0.02)
    keyboard.press("Enter")
    paused = opened.settle()
    assert paused["step"] >= 5
    assert not paused["playing"]
    time.sleep(0.3)
    assert opened.state() == paused


@in_browser
def test_keys_play_step_and_go_back(opened: Opened) -> None:
    keyboard = opened.page.keyboard
    keyboard.press("Home")
    assert opened.settle()["step"] == 0
    start = opened.drawn("matrix")
    for key, step in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("ArrowLeft", 0), ("ArrowLeft", 0)):
        keyboard.press(key)
        assert opened.settle()["step"] == step
    assert opened.drawn("matrix") == start
    keyboard.press("Space")
    assert opened.state()["playing"]
    keyboard.press("Space")
    assert not opened.settle()["playing"]
    for key in ("Space", "Home"):
        assert key in opened.page.locator(".keys").inner_text()
    # A slider keeps its own arrows.
    opened.page.locator("#batch_size").focus()
    before = opened.settle()
    keyboard.press("ArrowRight")
    after = opened.settle()
    assert after["step"] == before["step"]
    assert after["training"]["batch_size"] > before["training"]["batch_size"]


@in_browser
def test_the_address_has_the_settings_and_the_step(opened: Opened, browser: Browser, path: Path) -> None:
    opened.page.locator("#learning_rate").focus()
    opened.page.keyboard.press("ArrowRight")
    opened.page.locator("#step").click()
    before = opened.settle()
    opened.page.wait_for_url(re.compile(rf"&step={before['step']}$"))  # the page's policy refuses evaluated strings
    address = opened.page.url.removeprefix(path.as_uri())
    other = Opened(browser, path, address=address)
    after = other.settle()
    assert (after["training"], after["step"]) == (before["training"], before["step"])
    assert other.drawn("matrix") == opened.drawn("matrix")
    assert other.errors == []
    other.context.close()


@in_browser
@pytest.mark.parametrize("kept", ["step=3", "width=1e9", "batch_size=1.5&uses=1", "%", "learning_rate=__proto__"])
def test_an_address_that_says_something_else_is_ignored(kept: str, browser: Browser, path: Path) -> None:
    usual, odd = Opened(browser, path), Opened(browser, path, address=f"#{kept}")
    assert (odd.settle()["training"], odd.errors) == (usual.settle()["training"], [])
    for opened in (usual, odd):
        opened.context.close()


@in_browser
def test_a_step_of_the_address_is_one_of_the_run(browser: Browser, path: Path, tmp_path: Path) -> None:
    settings = "&".join(f"{name}={value}" for name, value in PRESETS[0].training.to_dict().items())
    settings = settings.replace("width=32", "width=64").replace("uses=1", "uses=64")
    opened = Opened(browser, path, address=f"#{settings}&step=1{'0' * 200}")
    # What a jump may take: so many random numbers.
    assert opened.page.evaluate("window.explorer.state().target") <= 4e6 / (2 * 64 * 64)
    opened.context.close()
    recipe = replace(constant(PRESETS[0].training), steps=40)
    page = tmp_path / "page.html"
    page.write_text(explorer_page(recipe, [explored(("a",), (32, 32), 1, recipe=recipe)]))
    training, _ = pictured(recipe, explored(("a",), (32, 32), 1, recipe=recipe))
    settings = "&".join(f"{name}={value}" for name, value in training.to_dict().items())
    for asked, shown in ((30, 30), (300, 40)):
        opened = Opened(browser, page, address=f"#{settings}&step={asked}")
        assert opened.settle()["step"] == shown
        opened.context.close()


@in_browser
@pytest.mark.parametrize("width", [400, 800, 1400])
def test_axes_have_titles_and_no_label_lies_on_another(browser: Browser, path: Path, width: int) -> None:
    opened = Opened(browser, path, viewport={"width": width, "height": 900})
    opened.settle()
    plots = opened.page.locator("svg.plot:visible").evaluate_all(
        """all => all.map(plot => Array.from(plot.querySelectorAll('text')).map(e => {
            const box = e.getBoundingClientRect();
            return [e.textContent, box.left, box.top, box.right, box.bottom];
        }))"""
    )
    titles = [{"index", "singular value"}, {"step, logarithmic", "effective rank"}]
    titles.append({"steps back from now", "left of a stroke"})
    for labels, expected in zip(plots, titles, strict=True):
        assert expected <= {name for name, *_ in labels}
        for i, (name, *box) in enumerate(labels):
            assert 0 <= box[0] <= box[2] <= width, name
            for other, *its in labels[:i]:
                apart = box[2] <= its[0] or its[2] <= box[0] or box[3] <= its[1] + 2 or its[3] <= box[1] + 2
                assert apart, (name, other)
    # Neither do the headings above the pictures, and the step is told.
    heads = opened.page.locator(".stage h2").evaluate_all(
        "all => all.map(e => { const r = document.createRange(); r.selectNodeContents(e);"
        " const box = r.getBoundingClientRect(); return [box.left, box.right]; })"
    )
    assert all(right <= left for (_, right), (left, _) in pairwise(heads))
    assert opened.page.locator("#time").is_visible()
    opened.context.close()


@in_browser
def test_a_phone_shows_the_picture_above_every_slider(browser: Browser, path: Path) -> None:
    opened = Opened(browser, path, viewport={"width": 400, "height": 800})
    on_top = "e => { const r = e.getBoundingClientRect();"
    on_top += " return document.elementFromPoint((r.left + r.right) / 2, (r.top + r.bottom) / 2) === e; }"
    for slider in opened.page.get_by_role("slider").all():
        slider.evaluate("e => e.scrollIntoView({block: 'center'})")
        assert slider.evaluate(on_top)
        for picture in ("matrix", "play"):
            assert opened.page.locator(f"#{picture}").evaluate(on_top)
    opened.context.close()


@in_browser
def test_tab_reaches_every_control_and_each_has_a_name(opened: Opened) -> None:
    visible = opened.page.locator("button:visible, input:visible, select:visible, summary:visible")
    reached = set()
    for _ in range(visible.count() + 3):
        opened.page.keyboard.press("Tab")
        reached.add(opened.page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        outline = opened.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or opened.page.evaluate("document.activeElement === document.body")
    assert set(visible.evaluate_all("all => all.map(e => e.id || e.textContent)")) <= reached
    for slider in opened.page.get_by_role("slider").all():
        assert slider.evaluate("e => e.labels[0].textContent.length") > 4


@in_browser
def test_light_and_dark_differ_and_both_can_be_read(browser: Browser, path: Path) -> None:
    papers = []
    for scheme in ("light", "dark"):
        opened = Opened(browser, path, color_scheme=scheme)
        color = opened.page.evaluate(
            "names => Object.fromEntries(names.map("
            "n => [n, getComputedStyle(document.documentElement).getPropertyValue('--' + n)]))",
            ["paper", "card", "ink", "quiet", "accent", "on-accent", "entropy", "stable", "start", "reference"],
        )
        papers.append(color["paper"])
        for ground in ("paper", "card"):
            # WCAG 2.1: 4.5 for text, 3 for what a figure is understood by.
            assert min(contrast(color[name], color[ground]) for name in ("ink", "quiet")) >= 4.5
            assert min(contrast(color[n], color[ground]) for n in ("entropy", "stable", "start", "reference")) >= 3
        assert contrast(color["accent"], color["on-accent"]) >= 4.5
        matrix = opened.drawn("matrix")
        opened.page.emulate_media(color_scheme="dark" if scheme == "light" else "light")
        # The browser tells the page of the change when it comes to it.
        for _ in range(100):
            opened.settle()
            if opened.drawn("matrix") != matrix:
                break
            opened.page.wait_for_timeout(50)
        assert opened.drawn("matrix") != matrix
        opened.context.close()
    assert papers[0] != papers[1]


@in_browser
def test_a_phone_shows_all_of_it_without_scrolling_sideways(browser: Browser, path: Path) -> None:
    opened = Opened(browser, path, viewport={"width": 400, "height": 800})
    assert opened.page.evaluate("document.documentElement.scrollWidth") == 400
    boxes = opened.page.locator("canvas, svg.plot, button, input, select, h2").evaluate_all(
        "all => all.map(e => e.getBoundingClientRect()).map(r => [r.left, r.right, r.width])"
    )
    assert len(boxes) > 20
    assert all(left >= 0 and right <= 400 for left, right, width in boxes if width)
    opened.context.close()


@in_browser
def test_the_picture_agrees_with_inspect_on_a_reference_model(browser: Browser, tmp_path: Path) -> None:
    opened = Opened(browser, compressor.explore(output=tmp_path / "page.html", recipe=DIGITS_MLP))
    opened.settle()
    assert opened.reading("window n") == "767 steps"
    assert opened.reading("rank bound B R n") == "767 of 768"
    assert opened.reading("epsilon") == f"{EPSILON:g}"
    assert opened.text("verdict").startswith(
        "The bound binds: all but 10 % of an earlier W is overwritten in 767 steps"
    )
    assert "window n, all but 10 %" in opened.page.locator("#recipe th").all_inner_texts()
    # A slider makes it a run of one's own, of which the recipe says nothing.
    opened.page.locator("#batch_size").focus()
    opened.page.keyboard.press("ArrowRight")
    opened.settle()
    assert opened.text("verdict").startswith("The bound is vacuous")
    assert opened.errors == []
    opened.context.close()


@in_browser
def test_it_opens_on_the_numbers_of_a_model(browser: Browser, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shapes = {"first.weight": (40, 24), "second.weight": (40, 24), "head.weight": (300, 100)}
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    (tmp_path / "recipe.yaml").write_text(
        "optimizer: sgd\nmomentum: 0.0\nlearning_rate: 0.07\nweight_decay: 0.13\nbatch_size: 500\nsteps: 600\n"
        "schedule: constant\nsequence_length: 1\n",
        encoding="utf-8",
    )
    path = compressor.explore(output=tmp_path / "page.html", recipe=tmp_path / "model.safetensors")
    opened = Opened(browser, path)
    inspection = compressor.inspect(tmp_path / "model.safetensors")
    head = next(each for each in inspection.layers if each.layer.name == "head")
    rows = opened.page.locator("#layers tr")
    # The two that are alike share a row, below the largest.
    assert [row.split("\t")[1].split() for row in rows.all_inner_texts()] == [
        ["head"],
        ["first", "and", "1", "like", "it"],
    ]
    for words in (
        f"{head.window.steps:,}",
        f"{500 * head.window.steps:,}",
        "vacuous",
        f"{head.window.forgetting_exponent:.3g}",
        "300 × 100",
    ):
        assert words in rows.first.inner_text()
    training = opened.state()["training"]
    assert (training["learning_rate"], training["weight_decay"], training["batch_size"]) == (0.07, 0.13, 64)
    assert training["surviving_initialization"] == pytest.approx(math.exp(-head.window.forgetting_exponent))
    assert "the batch size, 500, is out of range; the simulation uses 64" in opened.text("remarks")
    rows.nth(1).get_by_role("button").click()
    assert opened.settle()["training"]["width"] == 24
    assert opened.errors == []
    opened.context.close()


@in_browser
@pytest.mark.parametrize("width", [400, 1400])
def test_what_training_wrote_is_drawn_beside_its_layer(browser: Browser, tmp_path: Path, width: int) -> None:
    recipe = TrainingRecipe(optimizer="sgd", learning_rate=0.1)
    values = np.linspace(2.0, 1.0, 300)
    written = WrittenSpectrum(HOSTILE, "seed 0", 0.95, values, values[0] * 0.5 ** np.arange(300))
    known, unknown = explored(("first",), (300, 300), 1, recipe=recipe), explored(("last",), (8, 8), 1, recipe=recipe)
    (tmp_path / "page.html").write_text(explorer_page(recipe, [replace(known, written=written), unknown]))
    opened = Opened(browser, tmp_path / "page.html", width=width)
    opened.settle()
    words = opened.text("written-words")
    assert "= 0.95 × its initial weights (seed 0)" in words
    assert "rank 294 of the layer, and 4 of what training wrote" in words
    paths = opened.page.locator("#written-plot path")
    # The two end at the same index, and only the layer's far above the axis.
    ends = [path.bounding_box() for path in paths.all()]
    assert len(ends) == 2
    assert [end["width"] for end in ends] == pytest.approx([ends[0]["width"]] * 2, abs=1)
    assert ends[0]["height"] < 0.6 * ends[1]["height"]
    # A slider makes the run one of one's own; the model is still that model.
    opened.page.locator("#width").focus()
    opened.page.keyboard.press("ArrowRight")
    opened.settle()
    assert opened.text("written-words") == words
    opened.page.locator("#layers button").nth(1).click()
    opened.settle()
    assert not opened.page.locator("#written").is_visible()
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.errors == []
    opened.context.close()
