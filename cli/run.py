"""Dispatches to a command, and maps its outcome to an exit status."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence

import typer

from compressor.api.flags import with_flags
from compressor.cli.commands import app, write_short_help
from compressor.cli.completion import prepared_completion
from compressor.cli.main import FAILED
from compressor.cli.routes import MAIN, VERBOSE, Route, route, usage_words
from compressor.cli.terminal import write_error
from compressor.errors import BadInput, CompressorError
from compressor.system_errors import explained_anywhere

DONE, INTERRUPTED = 0, 130


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status.

    0 done; 1 failed; 2 bad request or input; 3 quality gate not met; 130 interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        # A layer may be called anything; a terminal of another encoding shows a question mark for what it lacks.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    at, verbose = Route(MAIN, ()), not VERBOSE.isdisjoint(arguments)
    if not verbose:
        _silence_libraries()
    try:
        with prepared_completion() as completes:
            if not arguments and not completes:
                write_short_help()
                return BadInput.exit_status
            at = route(arguments)
            # What typer returns is the status of an early exit: --help, --version, Ctrl-C.
            command = typer.main.get_command(app)
            status = command.main([at.command, *at.words], prog_name=MAIN, standalone_mode=False)
    except KeyboardInterrupt:
        status = INTERRUPTED
    except SystemExit as left:  # after completion
        status = left.code
    except Exception as error:
        return _failed(error, at, verbose=verbose)
    if status == INTERRUPTED:
        write_error("interrupted")
    return int(status or DONE)


def _silence_libraries() -> None:
    """Silence the bars and warnings of the libraries underneath, which read this when they are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TORCH_LOGS", "-all")
    for name in ("torchao", "onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _failed(error: Exception, at: Route, *, verbose: bool) -> int:
    """Report an error in one line, and return its exit status."""
    from compressor.formatting import one_line

    if isinstance(error, typer.TyperException):
        command = typer.main.get_group(app).commands[at.command]
        flags = [flag for each in command.params for flag in (*each.opts, *each.secondary_opts)]
        write_error(f"error: {one_line(usage_words(error, at, flags))}")
        return error.exit_code
    known = error if isinstance(error, CompressorError) else explained_anywhere(error)
    if known is not None:
        write_error(f"error: {one_line(with_flags(str(known)))}")
        return known.exit_status
    if verbose:
        write_error("".join(traceback.format_exception(error)))
    what = one_line(f"{type(error).__name__}: {error}")
    write_error(f"error: internal error: {what}" + ("" if verbose else "; add --verbose to see where"))
    return FAILED
