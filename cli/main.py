"""The console entry point: light, so that a signal ends the program in one line from the first moment on."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

FAILED = 1

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

# `timeout`, a service manager and a closing terminal send their signal twice; the second must not stop the cleaning up.
REPEAT_SECONDS = 2.0


class Interrupted(BaseException):
    """A signal asks the program to stop: it unwinds, so that what is half written is removed on the way."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_status = 128 + number


def main() -> NoReturn:
    """Run the command of `sys.argv` and leave with its exit status: 128 and its number after a signal."""
    # Python leaves a closed stream as None, and the next file that is opened would get its descriptor.
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - until the program ends
    try:
        _unwind_on_signals()
        status = _run()
    except Interrupted as interrupted:
        print("interrupted", file=sys.stderr)
        status = interrupted.exit_status
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(status)


def _run() -> int:
    if sys.stdout is None:
        print("error: standard output is closed; send it to a file or to /dev/null", file=sys.stderr)
        return FAILED
    from compressor.cli.run import run

    return run(sys.argv[1:])


def _unwind_on_signals() -> None:
    """Turn every signal that asks to stop into `Interrupted`, but for those that the parent has silenced (nohup)."""
    unwound_at = -REPEAT_SECONDS

    def unwind(number: int, _: FrameType | None) -> None:
        nonlocal unwound_at
        if time.monotonic() - unwound_at < REPEAT_SECONDS:
            return
        unwound_at = time.monotonic()
        raise Interrupted(number)

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, unwind)
