"""The library's messages in the words of the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

import typer

from compressor.cli.commands import main_command, subcommands

# Parameters of the Python interface that are called otherwise by the functions behind the commands.
_COMMAND_PARAMETERS = {
    "push_to": "push",
    "calibration_sequence_length": "sequence_length",
    "recipe": "recipe_file",
}
_OPTION = re.compile(r"`([a-z_]+)(?:=([^`]*))?`")


def with_flags(message: str) -> str:
    """A message of the library with flags in the place of Python's parameters: `keep=0.8` becomes --keep 0.8."""
    return _OPTION.sub(_flag, message)


def _flag(option: re.Match[str]) -> str:
    name, value = option[1], option[2]
    flags = _flags().get(_COMMAND_PARAMETERS.get(name, name))
    if flags is None:
        return option[0]
    flag, opposite = flags
    if value in ("True", "False"):
        return flag if value == "True" else opposite
    return flag if value is None else f"{flag} {value.strip(chr(39))}"


@cache
def _flags() -> Mapping[str, tuple[str, str]]:
    """The flag of each parameter of the commands, and the one that says the opposite."""
    flags = {}
    for app in (subcommands, main_command):
        command = typer.main.get_command(app)
        for each in [command, *getattr(command, "commands", {}).values()]:
            for parameter in each.params:
                if parameter.param_type_name == "option" and parameter.name:
                    opposite = parameter.secondary_opts[:1] or [f"no {parameter.opts[0]}"]
                    flags[parameter.name] = (parameter.opts[0], opposite[0])
    return flags
