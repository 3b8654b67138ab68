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

from compressor.api.shell_options import ShownOptions
from compressor.cli import terminal
from compressor.cli.terminal import ProgressLines, document_text, shown_progress, write_rendered
from compressor.progress import Step

finite = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)


@pytest.mark.slow
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
        "factorize: 60 of 10000, about 3 h left of this step",
        "factorize: 120 of 10000, about 3 h left of this step",
    ]


def test_logs_of_the_package_go_to_standard_error_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("compressor.recipe.find")
    before = list(logging.getLogger("compressor").handlers)
    with shown_progress(ShownOptions(quiet=True)) as progress:
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


def test_the_lines_of_a_command_that_announced_its_steps_are_few_and_of_the_whole() -> None:
    now, lines = 0.0, list[str]()
    progress = ProgressLines(lines.append, lambda: now)
    progress.expect([Step("measure", (1.0,) * 100), Step("factorize", (3.0,) * 100)])
    for step, taken in (("measure", 1), ("factorize", 3)):
        for done in range(1, 101):
            now += taken
            progress(step, done, 100)
    assert 6 <= len(lines) <= 10
    assert lines[0] == "measure 40 of 100; 10% of all done, about 6 min left in all"
    assert lines[-1] == "factorize 91 of 100; 93% of all done, about 25 s left in all"


def test_the_most_that_may_be_left_is_called_so() -> None:
    now, lines = 0.0, list[str]()
    progress = ProgressLines(lines.append, lambda: now)
    progress.expect([Step("measure", (1.0,)), Step("search", (1.0,) * 2, certain=False)])
    now = 30.0
    progress("measure", 1, 1)
    assert lines == ["measure 1 of 1; 33% of all done, at most about 60 s left in all"]


def test_something_is_shown_before_the_libraries_are_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    with shown_progress(ShownOptions()):
        assert capsys.readouterr().err == "loading the libraries\n"


def test_on_a_terminal_there_is_one_bar_for_all_steps() -> None:
    from rich.console import Console

    now, shown = 0.0, io.StringIO()
    with terminal._bars(Console(file=shown, force_terminal=True, width=110), lambda: now) as progress:
        progress.expect([Step("measure", (1.0,)), Step("refine", (3.0,))])  # type: ignore[attr-defined]
        now = 20.0
        progress("measure", 1, 1)
        progress._bars.refresh()  # type: ignore[attr-defined]
        assert len(progress._bars.tasks) == 1  # type: ignore[attr-defined]
    assert "measure" in shown.getvalue()
    assert "25%, about 60 s left" in shown.getvalue()


def test_a_bar_of_announced_steps_begins_with_nothing_of_what_went_before() -> None:
    from rich.console import Console

    with terminal._bars(Console(file=io.StringIO(), force_terminal=True), lambda: 0.0) as progress:
        [task] = progress._bars.tasks  # type: ignore[attr-defined]
        progress("search the seed", 7, 9)
        assert (task.completed, task.total, task.fields["left"]) == (7, 9, "7 of 9")
        progress.expect([Step("measure", (1.0,) * 2)])  # type: ignore[attr-defined]
        progress("measure", 1, 2)
        assert (task.description, task.completed, task.total, task.fields["left"]) == ("measure", 0, None, "")


def test_on_request_the_log_tells_how_long_each_step_took_and_what_was_decided(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger = logging.getLogger("compressor.calibration.candidates")
    for asked, told in ((ShownOptions(verbose=True), True), (ShownOptions(), False)):
        with shown_progress(asked) as progress:
            assert progress is not None
            progress("measure", 0, 2)
            progress("measure", 2, 2)
            logger.debug("refined: 0.1 instead of 0.2")
        lines = capsys.readouterr().err.splitlines()
        assert ("measure: 2 of 2, 0.0 s" in lines) == told
        assert ("refined: 0.1 instead of 0.2" in lines) == told


def test_a_bar_of_steps_that_were_not_announced_never_begins_again() -> None:
    from rich.console import Console

    with terminal._bars(Console(file=io.StringIO(), force_terminal=True), lambda: 0.0) as progress:
        [task] = progress._bars.tasks  # type: ignore[attr-defined]
        for done in range(3):
            progress("measure", done, 2)
        assert (task.completed, task.total) == (2, 2)
        progress("evaluate", 0, 7)
        # How far the whole is cannot be told, and is not.
        assert task.total is None
        assert task.fields["left"] == "0 of 7"
