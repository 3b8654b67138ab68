"""What a shell completes: commands, options, and values that are fixed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest

from compressor.api.options import VERBS
from compressor.choices import Effort, ExportTarget, FormRequest
from compressor.cli.routes import BESIDE
from compressor.cli.run import run

Captured = pytest.CaptureFixture[str]


def completed(words: Sequence[str], capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What bash is told where the last of the words is being written."""
    monkeypatch.setenv("_COMPRESS_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "\n".join(["compress", *words]))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    assert run([]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out.split()


@pytest.mark.parametrize("before", [[], ["-q"], ["--json", "-v"]], ids=str)
def test_commands_are_completed_where_one_may_stand(
    before: list[str], capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert completed([*before, ""], capsys, monkeypatch) == list(BESIDE)
    assert completed([*before, "ex"], capsys, monkeypatch) == ["export", "explore"]
    assert completed([*before, "model/"], capsys, monkeypatch) == []  # a file


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--max-"], ["--max-size", "--max-latency", "--max-drop", "--max-shard-size"]),
        (["model", "--keep", "0.5", "--calibration-"], None),
        (["inspect", "--b"], ["--batch-size", "--bits"]),
        (["model", "--form", ""], list(get_args(FormRequest))),
        (["--effort", "b"], [each for each in get_args(Effort) if each.startswith("b")]),
        (["export", "model", "--to", ""], list(get_args(ExportTarget))),
        (["model", "--calibration", ""], ["self", "none", "builtin:digits", "builtin:stdlib"]),
        (["model", "--bits", ""], ["auto"]),
        (["model", "--output", ""], []),
    ],
    ids=str,
)
def test_options_and_their_fixed_choices_are_completed(
    words: list[str], found: list[str] | None, capsys: Captured, *, monkeypatch: pytest.MonkeyPatch
) -> None:
    got = completed(words, capsys, monkeypatch)
    if found is None:
        assert got
        assert all(each.startswith(words[-1]) for each in got)
    else:
        assert sorted(got) == sorted(found)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        # As bash takes words apart, with colons and equals signs in COMP_WORDBREAKS; it keeps what is before a colon.
        (["m", "--data", "builtin"], ["builtin:digits", "builtin:stdlib"]),
        (["m", "--data", "builtin", ":"], ["digits", "stdlib"]),
        (["m", "--data", "builtin", ":", "di"], ["digits"]),
        (["m", "--data", "=", "builtin", ":", "di"], ["digits"]),
        (["m", "--data", "=", "bui"], ["builtin:digits", "builtin:stdlib"]),
        (["m", "--data", "builtin", ":", "digits", "--effort", "ba"], ["balanced"]),
        (["m", "--model", "net.py", ":", "build", "--data", "builtin", ":", "s"], ["stdlib"]),
        # Without them.
        (["m", "--data", "builtin:di"], ["builtin:digits"]),
        (["m", "--data", "builtin:digits", "--effort", "ba"], ["balanced"]),
    ],
    ids=str,
)
def test_words_with_a_colon_are_completed(
    words: list[str], found: list[str], capsys: Captured, *, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert completed(words, capsys, monkeypatch) == found


@pytest.mark.parametrize("of", VERBS, ids=lambda of: of.verb)
def test_every_command_completes_its_own_options(of: type, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--"] if of.verb == "compress" else [of.verb, "--"]
    flags = completed(words, capsys, monkeypatch)
    assert "--quiet" in flags
    assert len(flags) == len(set(flags))


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_told_what_each_is(shell: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_COMPRESS_COMPLETE", f"complete_{shell}")
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    for line, value, about in (
        ("compress insp", "inspect", "Show effective ranks and memory windows, layer by layer."),
        ("compress model --max-si", "--max-size", "Size of the weight files, such as 40MB."),
    ):
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", line)
        assert run([]) == 0
        out = capsys.readouterr().out
        assert value in out
        assert about in out
        assert len(out.splitlines()) == 1


@pytest.mark.slow
def test_the_script_for_bash_completes_in_bash(tmp_path: Path) -> None:
    program = tmp_path / "compress"
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'from compressor.cli import main; main()' \"$@\"\n")
    program.chmod(0o755)
    script = (
        'eval "$(compress --show-completion bash)"\n'
        "complete -p compress\n"
        "COMP_WORDS=(compress export model/ --to hf) COMP_CWORD=4\n"
        '_compress_completion compress\nprintf "%s\\n" "${COMPREPLY[@]}"\n'
        "COMP_WORDS=(compress model/ --data builtin : di) COMP_CWORD=5\n"
        '_compress_completion compress\nprintf "%s\\n" "${COMPREPLY[@]}"'
    )
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    lines = ["complete -o default -F _compress_completion compress", "hf-remote"]
    assert done.stdout.splitlines() == [*lines, "digits"]
    assert done.stderr == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_installed_in_the_home_of_the_user(
    shell: str, tmp_path: Path, capsys: Captured, *, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(["--install-completion", shell]) == 0
    assert f"{shell} completion installed in {tmp_path}" in capsys.readouterr().out
    scripts = [path for path in tmp_path.rglob("*compress*") if path.is_file()]
    assert len(scripts) == 1
    assert run(["--show-completion", shell]) == 0
    assert scripts[0].read_text().strip() == capsys.readouterr().out.strip()


def test_a_shell_that_is_not_known_is_refused_with_those_that_are(capsys: Captured) -> None:
    assert run(["--show-completion", "tcsh"]) == 2
    assert capsys.readouterr().err.startswith("error: --show-completion is for bash, zsh, fish, ")


def test_without_a_name_the_script_is_for_the_shell_at_hand(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    import shellingham

    monkeypatch.setattr(shellingham, "detect_shell", lambda: ("fish", "/usr/bin/fish"))
    assert run(["--show-completion"]) == 0
    assert capsys.readouterr().out.startswith("complete --command compress")

    def fail() -> None:
        raise shellingham.ShellDetectionFailure

    monkeypatch.setattr(shellingham, "detect_shell", fail)
    assert run(["--show-completion"]) == 2
    assert "--show-completion bash" in capsys.readouterr().err
