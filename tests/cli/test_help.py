"""The help of the commands, read in windows of several widths."""

from __future__ import annotations

import io
import re

import pytest
import typer
from rich.console import Console

from compressor.api.options import VERBS, CompressOptions
from compressor.cli.commands import app
from compressor.cli.help import STATUSES, command_help
from compressor.cli.routes import BESIDE, MAIN
from compressor.cli.run import run

Captured = pytest.CaptureFixture[str]
COMMANDS = typer.main.get_group(app).commands


def shown(command: str, capsys: Captured) -> str:
    assert run(["--help"] if command == MAIN else [command, "-h"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def places(text: str, titles: list[str]) -> list[int]:
    return [re.search(rf"^{re.escape(title)}", text, re.MULTILINE).start() for title in titles]  # type: ignore[union-attr]


def test_the_main_help_begins_with_the_commands_and_the_options_that_matter(capsys: Captured) -> None:
    text = shown(MAIN, capsys)
    titles = ["Usage: compress MODEL", "       compress COMMAND", "Commands", "Main options", "Examples", "Budget"]
    at = places(text, titles)
    assert at == sorted(at)
    assert len(CompressOptions.main) == 6
    first_screen = text.splitlines()[:21]
    for command in BESIDE:
        assert [line.startswith(f"  {command} ") for line in first_screen].count(True) == 1
    main = re.findall(r"^  (?:-\w, )?(--[a-z-]+)", text[at[3] : at[4]], re.MULTILINE)
    assert main == ["--keep", "--max-size", "--max-drop", "--calibration", "--data", "--output"]


@pytest.mark.parametrize("of", VERBS, ids=lambda of: of.verb)
def test_every_option_is_in_its_help_once_and_whole(of: type, capsys: Captured) -> None:
    text = shown(of.verb, capsys)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    stated = [
        flag for each in COMMANDS[of.verb].params for flag in (*each.opts, *each.secondary_opts) if flag[:2] == "--"
    ]
    found = re.findall(r"^  (?:-\w, )?(--[a-z-]+)", text, re.MULTILINE)
    assert sorted(found) == sorted([*stated, "--help"])
    for status, meaning in STATUSES:
        assert re.search(rf"^  {status} +{meaning}$", text, re.MULTILINE)


@pytest.mark.parametrize("of", VERBS, ids=lambda of: of.verb)
def test_every_help_has_an_example_that_is_parsed(of: type, capsys: Captured) -> None:
    text = shown(of.verb, capsys)
    assert of.examples
    for example in of.examples:
        assert f"\n  compress {example.command}\n" in text
        assert len(example.command) + len("  compress ") <= 80


@pytest.mark.parametrize("width", [30, 60, 80, 200])
@pytest.mark.parametrize("of", [VERBS[0], VERBS[5]], ids=lambda of: of.verb)
def test_texts_fit_the_window(of: type, width: int) -> None:
    command, window = COMMANDS[of.verb], io.StringIO()
    parts = command_help(of, command.params, about="What it does. " * 10, commands=[COMMANDS["plan"]])
    Console(file=window, width=width).print(parts)
    lines = window.getvalue().splitlines()
    # A flag with its choices, and a command to copy, stay whole.
    texts = [line for line in lines if not line.startswith(("  -", "  compress "))]
    assert max(map(len, texts)) <= min(width, 100)
    assert max(map(len, texts)) > 0.7 * min(width, 100)


def test_no_words_at_all_are_answered_with_a_short_help(capsys: Captured) -> None:
    assert run([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) <= 60
    at = places(err, ["Usage", "Commands", "Main options", "Examples", "All options"])
    assert at == sorted(at)
    assert "--lr" not in err
