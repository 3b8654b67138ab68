"""What an option is: stated once as the field of a dataclass, and read alike from Python, a file and a shell."""

from __future__ import annotations

import difflib
import functools
import inspect
import reprlib
import shlex
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path, PurePath
from typing import Any, ClassVar, ParamSpec, Self, TypeVar, dataclass_transform

from compressor.documents import read_yaml
from compressor.errors import BadInput

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Kind:
    """How the values of an option are written, and how they are read.

    `accepts` is what Python callers may pass, as an annotation. `read` checks a value from anywhere, given the name of
    its option, and returns what the verbs use. `shell` is what the command line reads the text as, and `repeated`
    whether a flag may be given several times. A `switch` takes no value. `flags` and `plain` tell how a value that is
    not a text, number or path stands at a shell and in a file. A shell completes `words`, beside the names of files.
    """

    accepts: str
    read: Callable[[Any, str], Any]
    metavar: str | None = None
    shell: Any = str
    repeated: bool = False
    switch: bool = False
    flags: Callable[[Any], list[str]] | None = None
    plain: Callable[[Any], Any] | None = None
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Option:
    """What a field of an options dataclass says of itself.

    `flag` is the one of the command line where it is not the field's name with dashes, `short` its one letter. `panel`
    is the group that the help shows it in; what has none is among the main options. `default_text` describes a default
    that is not a value. Some options exist only in Python, `positional` ones are arguments of their own there, and what
    does not change the result is not in the command that repeats it.
    """

    help: str
    kind: Kind
    panel: str | None = None
    metavar: str | None = None
    flag: str | None = None
    short: str | None = None
    default_text: str | None = None
    only_python: bool = False
    repeatable: bool = True
    positional: bool = False

    def flag_of(self, name: str) -> str:
        """The flag of the option of that name."""
        return self.flag or "--" + name.replace("_", "-")


def option(help: str, kind: Kind, default: Any = None, **described: Any) -> Any:
    """A field of an options dataclass: `described` are the further attributes of `Option`."""
    return field(default=default, metadata={"option": Option(help, kind, **described)})


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(option,))
def options(cls: type[R]) -> type[R]:
    """A frozen dataclass of options that checks its values and remembers which of them were given.

    An option that is passed as None was not given.
    """
    made = dataclass(frozen=True, kw_only=True, repr=False)(cls)
    made.__doc__ = _with_lines(inspect.getdoc(cls) or "", "Attributes", made)
    initialize = made.__init__

    @functools.wraps(initialize)
    def checked(self: Any, given: frozenset[str] | None = None, **values: Any) -> None:
        known = {name: value for name, value in values.items() if value is not None}
        if given is not None:
            defaults = {each.name: _read(each, each.default) for each in stated(made) if each.default is not MISSING}
            known = {
                name: value
                for name, value in known.items()
                if name in given or defaults.get(name) is None or value != defaults[name]
            }
        initialize(self, **known)
        for each in stated(made):
            object.__setattr__(self, each.name, _read(each, getattr(self, each.name)))
        object.__setattr__(self, "given", frozenset(known))
        self.check()

    made.__init__ = checked  # type: ignore[method-assign]
    return made


def _read(each: Field[Any], value: Any) -> Any:
    try:
        return None if value is None else each.metadata["option"].kind.read(value, each.name)
    except BadInput as error:
        error.option = error.option or each.name
        raise


def stated(cls: type[Any]) -> list[Field[Any]]:
    """The options of a dataclass, in the order in which they are stated."""
    return [each for each in fields(cls) if "option" in each.metadata]


def described(cls: type[Any]) -> Iterator[tuple[str, Option, Any]]:
    """Name, description and default of each option of a dataclass; `MISSING` where it must be given."""
    for each in stated(cls):
        yield each.name, each.metadata["option"], each.default


@dataclass(frozen=True)
class Example:
    """A command that works, and what it does, in a few words."""

    command: str
    does: str


@dataclass(frozen=True, kw_only=True, repr=False)
class Options:
    """What the dataclasses of options have in common.

    The help of a command begins with its `main` options and `examples`. A command is `also` looked for by other words.

    `given` holds the names of the options that were given. `dataclasses.replace` passes it on with all values, so that
    what is left at its default is not taken for given. Of `alternatives` an option replaces the others that were given
    before it.
    """

    verb: ClassVar[str] = ""
    alternatives: ClassVar[tuple[str, ...]] = ()
    main: ClassVar[Sequence[str]] = ()
    examples: ClassVar[Sequence[Example]] = ()
    also: ClassVar[Sequence[str]] = ()
    given: frozenset[str] = field(default=frozenset(), compare=False)

    def __repr__(self) -> str:
        listed = ", ".join(f"{name}={reprlib.repr(value)}" for name, value in self.as_given().items())
        return f"{type(self).__name__}({listed})"

    def check(self) -> None:
        """Raise `BadInput` where the options contradict each other, or one lacks another that it needs."""

    @classmethod
    def of(cls, base: Self | None, given: Mapping[str, object]) -> Self:
        """The options of a call: those of `base`, and what was given instead of them."""
        names = [each.name for each in stated(cls)]
        for name in given:
            if name not in names:
                raise TypeError(f"{cls.verb}() got an unexpected keyword argument {name!r}{_nearest(name, names)}")
        if base is not None and not isinstance(base, cls):
            remedy = f"give {cls.__name__}, or keywords"
            raise BadInput(f"the options are of type {type(base).__name__}", option="options", remedy=remedy)
        known = cls.merged({} if base is None else base.as_given(), given)
        if (missing := cls.missing(known)) is not None:
            raise TypeError(f"{cls.verb}() lacks the keyword argument {missing!r}")
        return cls(**known)

    @classmethod
    def missing(cls, values: Mapping[str, object]) -> str | None:
        """The first option that must be given and is not among the values."""
        required = (name for name, _, default in described(cls) if default is MISSING)
        return next((name for name in required if values.get(name) is None), None)

    @classmethod
    def merged(cls, before: Mapping[str, Any], given: Mapping[str, object]) -> dict[str, Any]:
        """The values of options `before`, with what was given instead of them."""
        replaced = cls.replaced_by({name for name, value in given.items() if value is not None})
        before = {name: value for name, value in before.items() if name not in replaced}
        return {**before, **{name: value for name, value in given.items() if value is not None}}

    @classmethod
    def replaced_by(cls, given: Set[str]) -> Set[str]:
        """The options that no longer hold where others of the alternatives are given after them."""
        return frozenset(cls.alternatives) if given & set(cls.alternatives) else frozenset()

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """The options in a YAML or JSON file, by the names of the keyword arguments.

        Raises:
            BadInput: the file is no mapping, names an unknown option, holds a value that an option does not take,
                contradicts itself, or lacks an option that must be given.
        """
        values = cls.values_in(path)
        if (missing := cls.missing(values)) is not None:
            raise BadInput(f"`{missing}` is missing", where=path, option=missing, remedy="give it")
        try:
            return cls(**values)
        except BadInput as error:
            raise error.in_file(path) from None

    @classmethod
    def values_in(cls, path: str | Path) -> dict[str, Any]:
        """The values of the options in a YAML or JSON file, each checked by itself, as further ones may join them.

        Raises:
            BadInput: the file is no mapping, names an unknown option, or holds a value that an option does not take.
        """
        document = read_yaml(Path(path))
        names = [name for name, stated_as, _ in described(cls) if not stated_as.only_python]
        for name in document:
            if name not in names:
                remedy = f"leave it out{_nearest(str(name), names)}"
                raise BadInput(f"holds the unknown option {str(name)[:80]!r}", where=path, remedy=remedy)
        try:
            read = {each.name: _read(each, document.get(each.name)) for each in stated(cls)}
        except BadInput as error:
            raise error.in_file(path) from None
        return {name: value for name, value in read.items() if value is not None}

    def as_given(self) -> dict[str, Any]:
        """The options that were given, by name."""
        return {each.name: getattr(self, each.name) for each in stated(type(self)) if each.name in self.given}

    def portable(self) -> dict[str, Any]:
        """The given options that a file can hold and that make a difference elsewhere, with paths by their last part.

        Objects such as loaders are left out.
        """
        kept = {}
        for name, stated_as, _ in described(type(self)):
            value = getattr(self, name)
            if name in self.given and stated_as.repeatable and not stated_as.only_python:
                plain = (stated_as.kind.plain or _plain)(value)
                if plain is not None:
                    kept[name] = plain
        return kept

    def command(self, *arguments: str) -> str:
        """The command line that asks for the same, with paths by their last part; `...` stands for an object.

        A comment names what only Python can give.
        """
        words, in_python = ["compress", *map(shlex.quote, arguments)], []
        for name, stated_as, _ in described(type(self)):
            if name not in self.given or not stated_as.repeatable:
                continue
            if stated_as.only_python:
                in_python.append(name)
            else:
                words += _flags(stated_as, name, getattr(self, name))
        return " ".join([*words, *([f"# and in Python {', '.join(in_python)}"] if in_python else [])])


def _flags(stated_as: Option, name: str, value: Any) -> list[str]:
    flag, _, opposite = stated_as.flag_of(name).partition("/")
    if stated_as.kind.switch:
        return [flag] if value else [opposite] if opposite else []
    if stated_as.kind.flags is not None:
        return list(map(shlex.quote, stated_as.kind.flags(value)))
    value = (stated_as.kind.plain or _as_is)(value)
    words = []
    for each in value if stated_as.kind.repeated and isinstance(value, list | tuple) else (value,):
        words += [flag, shlex.quote(" ".join(_named(each).split()))]
    return words


def _as_is(value: Any) -> Any:
    return value


def _named(value: object) -> str:
    if isinstance(value, PurePath):
        return value.name or str(value)
    if isinstance(value, float):
        return f"{value:.10g}"
    return str(value) if isinstance(value, str | int) else "..."


def _plain(value: Any) -> Any:
    """A value as a file can hold it; None for an object."""
    if isinstance(value, PurePath):
        return value.name or str(value)
    if isinstance(value, str | int | float):
        return value
    if isinstance(value, list | tuple):
        held = [_plain(each) for each in value]
        return None if None in held else held
    return None


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def verb(of: type[Options]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Show the options of a verb in its signature and docstring, where `help` and completion look for them."""

    def describe(function: Callable[P, R]) -> Callable[P, R]:
        positional = [
            each
            for each in inspect.signature(function).parameters.values()
            if each.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        keywords = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if default is MISSING else default,
                annotation=stated_as.kind.accepts + ("" if default is not None else " | None"),
            )
            for name, stated_as, default in described(of)
            if not stated_as.positional
        ]
        signature = inspect.signature(function)
        function.__signature__ = signature.replace(parameters=[*positional, *keywords])  # type: ignore[attr-defined]
        function.__doc__ = _with_lines(inspect.getdoc(function) or "", "Args", of)
        return function

    return describe


def _with_lines(documentation: str, section: str, of: type[Any]) -> str:
    """A docstring with a line for each option at the end of a section."""
    before, found, after = documentation.partition("\n\nReturns:")
    lines = []
    for name, stated_as, _ in described(of):
        if stated_as.positional:
            continue
        default = "" if stated_as.default_text is None else f" Default: {stated_as.default_text}."
        text = f"{name}: {stated_as.help}{default}"
        lines.append(textwrap.fill(text, 100, initial_indent="    ", subsequent_indent="        "))
    head = "" if f"\n\n{section}:\n" in before else f"\n\n{section}:"
    return "\n".join([before + head, *lines]) + found + after
