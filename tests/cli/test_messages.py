"""What the library says in the words of Python, the command line says in its own."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path

import pytest

import compressor
from compressor import BadInput
from compressor.api.option import described
from compressor.api.options import VERBS
from compressor.cli.messages import with_flags
from compressor.cli.run import run
from compressor.cli.terminal import shown_progress


@pytest.mark.parametrize(
    ("python", "shell"),
    [
        ("`keep` and `max_size` are two budgets", "--keep and --max-size are two budgets"),
        ("ask for `keep=0.8`", "ask for --keep 0.8"),
        ("export it with `to='dense'` first", "export it with --to dense first"),
        ("the model that `factory` builds", "the model that --model builds"),
        ("`refine=False` is about calibration data", "--no-refine is about calibration data"),
        ("`embeddings=True` includes it", "--embeddings includes it"),
        ("`push_to` 'a b' is no name of the hub", "--push-to 'a b' is no name of the hub"),
        ("`calibration_length` or `recipe`", "--calibration-length or --recipe"),
        ("run `git lfs pull`", "run `git lfs pull`"),
        ("`model.state_dict()` and `nothing`", "`model.state_dict()` and `nothing`"),
    ],
)
def test_options_become_flags_and_other_code_stays(python: str, shell: str) -> None:
    assert with_flags(python) == shell


def test_every_option_of_python_has_a_flag() -> None:
    alone = {name for of in VERBS for name, option, _ in described(of) if option.only_python}
    of_python_alone = {"model", "options", "given"} | alone
    for verb in (compressor.compress, compressor.inspect):
        for name in set(inspect.signature(verb).parameters) - of_python_alone:
            assert with_flags(f"`{name}`").startswith("--"), name


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
    with shown_progress(quiet=True):
        logging.getLogger("compressor").warning("more than `max_drop` %g", 0.5)
    assert capsys.readouterr().err == "warning: more than --max-drop 0.5\n"
