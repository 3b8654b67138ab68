"""Which command a command line is for, and what is said of one that is for none."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from compressor.api.option import described
from compressor.api.options import VERBS
from compressor.api.shell_options import ResultOptions
from compressor.errors import BadInput

MAIN = "compress"
BESIDE = tuple(of.verb for of in VERBS if of.verb != MAIN)
ALSO = {word: of.verb for of in VERBS for word in of.also}
HELP = ("-h", "--help")
COMPLETION = ("--install-completion", "--show-completion")
_OF_RESULTS = {
    name: {flag for flag in (option.flag_of(name), option.short) if flag}
    for name, option, _ in described(ResultOptions)
}
# An unexpected error is shown with where it comes from.
VERBOSE = frozenset(_OF_RESULTS["verbose"])
# What may stand before a command as well as after it.
ANYWHERE = frozenset(HELP).union(*_OF_RESULTS.values())


@dataclass(frozen=True)
class Route:
    """A command, and the words that it takes."""

    command: str
    words: tuple[str, ...]

    @property
    def spelled(self) -> str:
        """How the command is called."""
        return MAIN if self.command == MAIN else f"{MAIN} {self.command}"


def route(arguments: Sequence[str]) -> Route:
    """The command that comes first but for flags that all take; the main one where none does.

    Raises:
        BadInput: the first word is neither a command nor a file, and is like a command.
    """
    count = next((at for at, word in enumerate(arguments) if word not in ANYWHERE), len(arguments))
    before, rest = arguments[:count], arguments[count:]
    first = rest[0] if rest else ""
    if first in (MAIN, *BESIDE):
        return Route(first, (*before, *rest[1:]))
    if first.lower() == "help" and not os.path.lexists(first):
        about = [word for word in rest[1:2] if word in BESIDE]
        raise BadInput(f"{first} is no command", remedy=f"for help: {' '.join([MAIN, *about, '--help'])}")
    if (meant := _meant(first)) is not None:
        raise BadInput(f"{first} is neither a command nor a file", remedy=f"did you mean '{MAIN} {meant}'?")
    return Route(MAIN, tuple(_with_shell(arguments)))


def _meant(word: str) -> str | None:
    """What a word stands for that cannot be a model; None where nothing is near."""
    if not re.fullmatch(r"[A-Za-z]+(-[A-Za-z]+)*", word) or os.path.lexists(word):
        return None
    known = dict.fromkeys(BESIDE) | ALSO
    near = get_close_matches(word.lower(), sorted(known), n=1, cutoff=0.7)
    return (ALSO.get(near[0]) or near[0]) if near else None


def _with_shell(arguments: Sequence[str]) -> Iterable[str]:
    """The arguments, with `auto` where completion is asked for and no shell is named."""
    for at, word in enumerate(arguments):
        yield word
        if word in COMPLETION and (*arguments, "-")[at + 1].startswith("-"):
            yield "auto"


def require_no_more(command: str, given: Sequence[str], extra: Sequence[str]) -> None:
    """Refuse words that are left over; often the first of all was meant as a command.

    Raises:
        BadInput: there are such words.
    """
    if not extra:
        return
    word, others = (given[0] if given else ""), " ".join(extra)
    if command == MAIN and word in BESIDE:
        what = f"the options of '{MAIN} {word}' come after it"
        raise BadInput(what, remedy=f"write {MAIN} {word} {others} ..., or ./{word} for a model of that name")
    if command == MAIN and "/" not in word and not os.path.lexists(word):
        raise BadInput(f"{word} is neither a command nor a file", remedy=f"the commands are {', '.join(BESIDE)}")
    takes = f"one model, {word}, and not also" if given else "no model, and not"
    called = MAIN if command == MAIN else f"{MAIN} {command}"
    raise BadInput(f"'{called}' takes {takes} {others}", remedy="leave it out, or quote a name that has spaces")


def usage_words(error: Any, at: Route, flags: Iterable[str]) -> str:
    """What is wrong with a command line, in one line: with the nearest of a command's flags, or who has such a one."""
    wrong = getattr(error, "option_name", None)
    if wrong is None or not hasattr(error, "possibilities"):
        said = str(error.format_message()).rstrip(".")
        return f"{said}; see '{at.spelled} --help'"
    having = [of.verb for of in VERBS for name, option, _ in described(of) if wrong == option.flag_of(name)]
    if having:
        others = ", ".join(f"'{Route(verb, ()).spelled}'" for verb in having)
        return f"'{at.spelled}' has no option {wrong}; it is one of {others}"
    near = get_close_matches(wrong, sorted(flag for flag in flags if flag.startswith("--")), n=1)
    remedy = f"did you mean {near[0]}?" if near else f"see '{at.spelled} --help'"
    return f"'{at.spelled}' has no option {wrong}; {remedy}"
