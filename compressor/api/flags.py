"""The library's messages in the words of the command line.

Messages, results and the documents that are made of results name options as Python does, in backticks: `keep=0.8`. What
is read at a shell names flags instead, --keep 0.8: everything that the command line prints, and the model cards and
reports, which repeat the command that made a model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from compressor.api.option import described
from compressor.api.options import VERBS
from compressor.api.shell_options import OF_COMMANDS, ConfigOptions, MainOptions

if TYPE_CHECKING:
    from compressor.results import Compression

_OPTION = re.compile(r"`([a-z_]+)(?:=([^`]*))?`")


def with_flags(message: str) -> str:
    """A message of the library with flags in the place of Python's parameters: `keep=0.8` becomes --keep 0.8."""
    return _OPTION.sub(_flag, message)


def in_flags(compression: Compression) -> Compression:
    """The result with flags in its warnings and its advice, for a card or a report."""
    advice = compression.plan.advice
    plan = replace(compression.plan, advice=None if advice is None else with_flags(advice))
    return replace(compression, plan=plan, warnings=tuple(map(with_flags, compression.warnings)))


def _flag(option: re.Match[str]) -> str:
    name, value = option[1], option[2]
    flags = _flags().get(name)
    if flags is None:
        return option[0]
    flag, opposite = flags
    if value in ("True", "False"):
        return flag if value == "True" else opposite
    return flag if value is None else f"{flag} {value.strip(chr(39))}"


@cache
def _flags() -> Mapping[str, tuple[str, str]]:
    """The flag of each option, and the one that says the opposite."""
    flags = {}
    for stated in (*VERBS, *OF_COMMANDS.values(), ConfigOptions, MainOptions):
        for name, option, _ in described(stated):
            if not option.only_python:
                flag, _, opposite = option.flag_of(name).partition("/")
                flags[name] = (flag, opposite or f"no {flag}")
    return flags
