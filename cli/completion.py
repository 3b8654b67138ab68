"""Completion at a shell: of commands, options, and values that are fixed."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, get_args

from typer.completion import get_completion_inspect_parameters, install_callback, show_callback

from compressor.choices import Shell
from compressor.cli.terminal import write_text
from compressor.errors import BadInput

# By which a shell asks for completions; the scripts for the shells set it.
ASKED_BY = "_COMPRESS_COMPLETE"


@contextmanager
def prepared_completion() -> Iterator[bool]:
    """Whether a shell asks for completions, which then are ready."""
    asked = os.environ.get(ASKED_BY)
    if asked is None:
        yield False
        return
    get_completion_inspect_parameters()  # which makes the shells known
    if asked != "complete_bash" or not (kept := _words_of_bash_joined()):
        yield True
        return
    answer = io.StringIO()
    try:
        with redirect_stdout(answer):
            yield True
    finally:
        write_text("".join(line.removeprefix(kept) for line in answer.getvalue().splitlines(keepends=True)))


def _words_of_bash_joined() -> str:
    """Put together what bash takes apart at colons and equals signs, as in `--data=builtin:di`; the part it then keeps.

    It does so where `COMP_WORDBREAKS` has these signs, as by default: each is a word, and what follows the last one is
    replaced by a completion, so that this must not begin with what comes before it.
    """
    words, at = os.environ.get("COMP_WORDS", "").split("\n"), int(os.environ.get("COMP_CWORD", "0"))
    joined = list[str]()
    for place, word in enumerate(words[: at + 1]):
        if place and (_is_sign(word) or _is_sign(words[place - 1])):
            joined[-1] += word
        else:
            joined.append(word)
    os.environ["COMP_WORDS"], os.environ["COMP_CWORD"] = "\n".join(joined), str(len(joined) - 1)
    value = joined[-1].rpartition("=")[2]
    return value[: value.rfind(":") + 1] if len(joined) <= at else ""


def _is_sign(word: str) -> bool:
    return bool(word) and set(word) <= {":", "="}


def install_completion(context: Any, parameter: Any, shell: str | None) -> None:
    """Install completion and leave, where that is asked for."""
    if shell is not None:
        install_callback(context, parameter, _named(shell, "install_completion"))


def show_completion(context: Any, parameter: Any, shell: str | None) -> None:
    """Print the script that completes and leave, where that is asked for."""
    if shell is not None:
        show_callback(context, parameter, _named(shell, "show_completion"))


def _named(shell: str, option: str) -> str:
    """The shell, found by the processes above this one where it is not named."""
    found = shell
    if shell == "auto":
        import shellingham  # type: ignore[import-untyped]

        try:
            found, _ = shellingham.detect_shell()
        except shellingham.ShellDetectionFailure:
            found = "none of them"
    known = [each for each in get_args(Shell) if each != "auto"]
    if found not in known:
        what = f"`{option}` is for {', '.join(known)}, not for {found}"
        raise BadInput(what, option=option, remedy=f"name one, such as `{option}=bash`")
    return str(found)
