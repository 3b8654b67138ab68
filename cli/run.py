"""Dispatches to a command, and maps its outcome to an exit status."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches

import typer

from compressor.api.flags import with_flags
from compressor.cli.commands import main_command, subcommands
from compressor.cli.main import FAILED
from compressor.cli.terminal import write_error
from compressor.errors import BadInput, CompressorError
from compressor.system_errors import explained_anywhere

SUBCOMMANDS = frozenset(command.name or "" for command in subcommands.registered_commands)
DONE, INTERRUPTED = 0, 130


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status.

    0 done; 1 failed; 2 bad request or input; 3 quality gate not met; 130 interrupted.
    The default command gets everything unless the first argument is the name of a subcommand.
    """
    for stream in (sys.stdout, sys.stderr):
        # A layer may be called anything; a terminal of another encoding shows a question mark for what it lacks.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    # The libraries underneath have bars and warnings of their own; they read this when they are imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TORCH_LOGS", "-all")
    for name in ("torchao", "onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if (meant := _misspelled(arguments)) is not None:
        write_error(f"error: {arguments[0]} is neither a command nor a file; did you mean 'compress {meant}'?")
        return BadInput.exit_status
    app = subcommands if arguments and arguments[0] in SUBCOMMANDS else main_command
    try:
        # What typer returns is the status of an early exit: --help, --version, Ctrl-C.
        status = typer.main.get_command(app).main(list(arguments), prog_name="compress", standalone_mode=False)
    except KeyboardInterrupt:
        status = INTERRUPTED
    except Exception as error:
        return _failed(error, help_of=f"compress {arguments[0]}" if app is subcommands else "compress")
    if status == INTERRUPTED:
        write_error("interrupted")
    return int(status or DONE)


def _misspelled(arguments: Sequence[str]) -> str | None:
    """The subcommand that the first word misspells, if the word cannot be a model."""
    word = arguments[0] if arguments else ""
    if word in SUBCOMMANDS or not word.isalpha() or os.path.lexists(word):
        return None
    return next(iter(get_close_matches(word.lower(), sorted(SUBCOMMANDS), n=1, cutoff=0.7)), None)


def _failed(error: Exception, help_of: str) -> int:
    """Report an error in one line, and return its exit status."""
    from compressor.formatting import one_line

    if isinstance(error, typer.TyperException):
        write_error(f"error: {one_line(error.format_message()).rstrip('.')}; see '{help_of} --help'")
        return error.exit_code
    known = error if isinstance(error, CompressorError) else explained_anywhere(error)
    if known is not None:
        write_error(f"error: {one_line(with_flags(str(known)))}")
        return known.exit_status
    if os.environ.get("COMPRESSOR_DEBUG") == "1":
        write_error("".join(traceback.format_exception(error)))
    what = one_line(f"{type(error).__name__}: {error}")
    write_error(f"error: internal error: {what}; set COMPRESSOR_DEBUG=1 to see where")
    return FAILED
