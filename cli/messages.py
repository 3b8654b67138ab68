"""The library's messages in the words of the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from compressor.api.option import described
from compressor.api.options import VERBS

_OPTION = re.compile(r"`([a-z_]+)(?:=([^`]*))?`")


def with_flags(message: str) -> str:
    """A message of the library with flags in the place of Python's parameters: `keep=0.8` becomes --keep 0.8."""
    return _OPTION.sub(_flag, message)


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
    for verb in VERBS:
        for name, option, _ in described(verb):
            if not option.only_python:
                flag, _, opposite = option.flag_of(name).partition("/")
                flags[name] = (flag, opposite or f"no {flag}")
    return flags
