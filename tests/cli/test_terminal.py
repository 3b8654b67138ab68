"""Progress lines and JSON documents."""

from __future__ import annotations

import io
import json
import logging
import math
import sys
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.cli.terminal import Pace, ProgressLines, document_text, shown_progress, write_rendered
from compressor.inspection import FACTORS_COST

finite = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)


@given(st.dictionaries(st.text(max_size=3), finite, max_size=3))
def test_a_finite_document_comes_back_as_it_was(document: dict[str, Any]) -> None:
    assert json.loads(document_text(document)) == document


@given(st.sampled_from([math.nan, math.inf, -math.inf]))
def test_what_json_has_no_word_for_becomes_null_at_any_depth(value: float) -> None:
    document = {"a": value, "b": [1.0, {"c": (value,)}]}
    text = document_text(document)
    assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "b": [1.0, {"c": [None]}]}


@given(st.lists(st.floats(0, 50), min_size=1, max_size=60))
def test_progress_lines_are_at_least_ten_seconds_apart_and_a_finished_stage_has_its_line(pauses: list[float]) -> None:
    now, written = 0.0, [(0.0, "")]
    progress = ProgressLines(lambda line: written.append((now, line)), lambda: now)
    for done, pause in enumerate(pauses, start=1):
        now += pause
        progress("measure", done, len(pauses))
    ends = [line for _, line in written if line.endswith("done")]
    assert len(ends) == (now >= 10)
    underway = [at for at, line in written if line not in ends]
    assert all(later - earlier >= 10 for earlier, later in pairwise(underway))


def test_the_time_left_counts_from_the_start_of_the_stage() -> None:
    now, lines = 0.0, list[str]()
    progress = ProgressLines(lines.append, lambda: now)
    progress("measure", 1, 1)
    # Work that reports nothing, and the first step, come before the first call of the next stage.
    now = 500.0
    for done in range(1, 11):
        progress("factorize", done, 10)
        now += 20
    assert lines[:3] == [
        "factorize: 1 of 10",
        "factorize: 2 of 10, about 3 min left of this step",
        "factorize: 3 of 10, about 2 min left of this step",
    ]
    assert not any("about 0 s" in line for line in lines)
    assert lines[-1] == "factorize: all 10 done"


def test_progress_at_a_steady_pace_tells_the_time_that_is_left() -> None:
    now, lines = 0.0, list[str]()
    progress = ProgressLines(lines.append, lambda: now)
    progress("measure", 0, 10)
    for done in range(1, 11):
        now += 12
        progress("measure", done, 10)
    assert lines[4] == "measure: 5 of 10, about 60 s left of this step"
    assert len(lines) == 10


def test_a_silent_minute_is_broken_even_without_a_tenth_more() -> None:
    now, lines = 0.0, list[str]()
    progress = ProgressLines(lines.append, lambda: now)
    for done in range(1, 121):
        now += 1
        progress("factorize", done, 10_000)
    assert lines == [
        "factorize: 60 of 10000, about 2.8 h left of this step",
        "factorize: 120 of 10000, about 2.7 h left of this step",
    ]


def test_logs_of_the_package_go_to_standard_error_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("compressor.recipe.find")
    before = list(logging.getLogger("compressor").handlers)
    with shown_progress(quiet=True) as progress:
        logger.info("not this")
        logger.warning("left out:\x1b[2J\nthe card " + "x" * 200)
    assert progress is None
    assert capsys.readouterr().err == "warning: left out:\\x1b[2J the card " + "x" * 200 + "\n"
    assert logging.getLogger("compressor").handlers == before


def test_styles_are_for_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.text import Text

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    written = {}
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr("sys.stdout", stream)
        write_rendered(Text("ranks", style="bold red"))
        written[type(stream)] = stream.getvalue()
    assert written[io.StringIO] == "ranks\n"
    assert "\x1b[" in written[Terminal]
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal()
    monkeypatch.setattr("sys.stdout", plain)
    write_rendered(Text("ranks", style="red"))
    assert "\x1b[31" not in plain.getvalue()


@given(st.floats(10, 5000), st.floats(0.7, 1.4), st.integers(20, 200))
def test_the_time_left_in_all_is_near_the_truth_from_a_quarter_on(seconds: float, pace: float, layers: int) -> None:
    """Stages whose costs were said to within two fifths: at a quarter, a half and three quarters of the time."""
    now = 0.0
    estimate = Pace(lambda: now)
    estimate.expect({"measure": 1.0, "factorize": FACTORS_COST})
    stages = {"measure": 1.0, "factorize": pace * FACTORS_COST}
    whole = seconds * sum(stages.values())
    wanted = [0.25, 0.5, 0.75]
    for stage, cost in stages.items():
        for done in range(1, layers + 1):
            now += seconds * cost / layers
            estimate.note(stage, done, layers)
            if wanted and now >= wanted[0] * whole:
                wanted.pop(0)
                left = estimate.left()
                assert left is not None
                assert (whole - now) / 1.5 <= left <= 1.5 * (whole - now)
    assert not wanted
    assert estimate.left() == 0


def test_an_estimate_waits_for_a_measurement_and_is_one_for_all_stages() -> None:
    now, lines = 0.0, list[str]()
    progress = ProgressLines(lines.append, lambda: now)
    progress.expect({"measure": 1.0, "factorize": 3.0})
    for stage, taken in (("measure", 10), ("factorize", 30)):
        for done in range(1, 11):
            now += taken
            progress(stage, done, 10)
    left = [line.rpartition(", about ")[2] for line in lines if "left in all" in line]
    # 400 s in all: the first lines of both stages, and the last.
    assert (left[0], left[9], left[-1]) == ("6 min left in all", "4 min left in all", "30 s left in all")
    assert not any("of this step" in line for line in lines)


def test_something_is_shown_before_the_libraries_are_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    with shown_progress(quiet=False):
        assert capsys.readouterr().err == "loading the libraries\n"
