"""Which command a command line is for, and what is said of one that is for none."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressor.api.options import VERBS
from compressor.cli.routes import ALSO, ANYWHERE, BESIDE, MAIN, Route, route
from compressor.cli.run import run
from compressor.errors import BadInput

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", BESIDE)
def test_what_all_commands_take_may_stand_before_or_after_the_command(command: str) -> None:
    for flag in ANYWHERE:
        assert route([flag, command, "m.bin"]) == Route(command, (flag, "m.bin"))
        assert route([command, "m.bin", flag]) == Route(command, ("m.bin", flag))


def test_everything_else_is_for_the_main_command() -> None:
    for words in (["m.bin"], ["--keep", "0.5", "inspect"], ["./inspect"], ["org/inspect"], ["-q", "m.bin"], []):
        assert route(words) == Route(MAIN, tuple(words))
    assert route([MAIN, "m.bin"]) == Route(MAIN, ("m.bin",))


def test_a_command_is_found_by_the_words_it_is_also_looked_for_by() -> None:
    assert not set(ALSO) & {of.verb for of in VERBS}
    for word, command in ALSO.items():
        with pytest.raises(BadInput, match=f"did you mean 'compress {command}'"):
            route([word, "m.bin"])


def test_a_file_is_never_taken_for_a_misspelled_command() -> None:
    Path("inspct").touch()
    assert route(["inspct"]) == Route(MAIN, ("inspct",))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["list-layers", "M"], "list-layers is neither a command nor a file; did you mean 'compress inspect'?"),
        (["exprt", "M", "--to", "onnx"], "exprt is neither a command nor a file; did you mean 'compress export'?"),
        (["help"], "help is no command; for help: compress --help"),
        (["help", "plan"], "help is no command; for help: compress plan --help"),
        (["frobnicate", "M"], f"frobnicate is neither a command nor a file; the commands are {', '.join(BESIDE)}"),
        (["--kep", "0.5", "M"], "'compress' has no option --kep; did you mean --keep?"),
        (["M", "--to", "onnx"], "'compress' has no option --to; it is one of 'compress export'"),
        (["inspect", "M", "--xyzzy"], "'compress inspect' has no option --xyzzy; see 'compress inspect --help'"),
        (
            ["explore", "M"],
            "'compress explore' takes no model, and not M; leave it out, or quote a name that has spaces",
        ),
        (["M", "-q", "-v"], "--quiet and --verbose contradict each other; leave one of them out"),
        (["M", "--data-samples", "x"], "--data-samples 'x' is not a whole number; give one such as 8"),
        (["M", "--lr", "x"], "--lr 'x' is not a number; give one such as 0.1"),
        (["M", "--form", "round"], "--form 'round' does not exist; use one of auto, plain, pivoted"),
        (
            ["--keep", ".5", "inspect", "M"],
            "the options of 'compress inspect' come after it; write compress inspect M ..., or ./inspect for a model of"
            " that name",
        ),
        (
            ["inspect", "a.bin", "b.bin"],
            "'compress inspect' takes one model, a.bin, and not also b.bin; leave it out, or quote a name that has"
            " spaces",
        ),
    ],
    ids=str,
)
def test_a_mistake_is_answered_in_one_line_with_what_to_write(words: list[str], said: str, capsys: Captured) -> None:
    assert run(words) == 2
    assert capsys.readouterr() == ("", f"error: {said}\n")
