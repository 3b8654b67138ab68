"""Completion at a shell: of commands, options, and values that are fixed."""

from __future__ import annotations

import os
from typing import Any, get_args

from typer.completion import get_completion_inspect_parameters, install_callback, show_callback

from compressor.choices import Shell
from compressor.errors import BadInput

# By which a shell asks for completions; the scripts for the shells set it.
ASKED_BY = "_COMPRESS_COMPLETE"


def prepare_completion() -> bool:
    """Whether a shell asks for completions, which then are ready."""
    asked = ASKED_BY in os.environ
    if asked:
        get_completion_inspect_parameters()  # which makes the shells known
    return asked


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
