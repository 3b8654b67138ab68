"""What the library says in the words of Python, the command line says in its own."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import compressor
from compressor import BadInput
from compressor.api.shell_options import ShownOptions
from compressor.cli.run import run
from compressor.cli.terminal import shown_progress


def test_one_error_in_both_words(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadInput, match=r"^`keep` 2 is out of range") as caught:
        compressor.compress(model, keep=2)
    assert caught.value.option == "keep"
    assert run([str(model), "--keep", "2"]) == 2
    assert capsys.readouterr().err.startswith("error: --keep 2 is out of range")


def test_a_size_that_cannot_be_reached_is_refused_in_both_words(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BadInput, match=r"^`max_size` 9 is below the smallest") as caught:
        compressor.compress(model, max_size=9)
    assert caught.value.option == "max_size"
    assert run([str(model), "--max-size", "9"]) == 2
    assert capsys.readouterr().err.startswith("error: --max-size 9 is below the smallest")


def test_warnings_in_the_log_have_flags_too(capsys: pytest.CaptureFixture[str]) -> None:
    with shown_progress(ShownOptions(quiet=True)):
        logging.getLogger("compressor").warning("more than `max_drop` %g", 0.5)
    assert capsys.readouterr().err == "warning: more than --max-drop 0.5\n"
