"""The parameters of the commands, generated from the options that the verbs take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from types import GenericAlias
from typing import Annotated, Any, TypeVar

import typer

from compressor.api.flags import with_flags
from compressor.api.kinds import TRAINING_FLAGS
from compressor.api.option import Option, Options, described
from compressor.api.options import TRAINING
from compressor.api.shell_options import OF_COMMANDS, ConfigOptions, MainOptions
from compressor.cli.routes import require_no_more
from compressor.errors import BadInput

Asked = TypeVar("Asked", bound=Options)

_CONTEXT, _CONFIG = "context", "config"


def typer_command(
    function: Callable[..., None], of: type[Options], instead: Mapping[str, Callable[..., Any]] | None = None
) -> Callable[..., None]:
    """A command for typer: the function's own arguments, and a flag for each option that the shell can give.

    The function is called with the `options` of the verb and with what is to be `shown` in place of these flags. What
    is called `instead` of it, for one of the flags, takes the context, the parameter and its value.
    """
    own = signature(function, eval_str=True).parameters.values()
    arguments = [each for each in own if each.name not in ("options", "shown")]
    required_first = sorted(described(of), key=lambda each: each[2] is not MISSING)
    shell = [each for stated in (ConfigOptions, OF_COMMANDS[of]) for each in described(stated)]
    flags = [each for stated in (*required_first, *shell) for each in _parameters(*stated)]
    if instead is not None:
        flags += [_called_instead(*each, call=instead[each[0]]) for each in described(MainOptions)]
    context = Parameter(_CONTEXT, Parameter.KEYWORD_ONLY, annotation=typer.Context)
    parameters = [*(each.replace(kind=Parameter.KEYWORD_ONLY) for each in arguments), *flags, context]

    @wraps(function)
    def command(**values: Any) -> None:
        context = values.pop(_CONTEXT)
        taken = {each.name: values[each.name] for each in arguments}
        require_no_more(of.verb, _as_words(taken.values()), context.args)
        given = {name: value for name, value in values.items() if _is_given(context, name)}
        shown = {name: given.pop(name) for name, _, _ in described(OF_COMMANDS[of]) if name in given}
        about = {name: value for name, value in given.items() if name not in taken}
        function(**taken, shown=OF_COMMANDS[of](**shown), options=_options(of, about.pop(_CONFIG, None), about))

    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _as_words(values: Any) -> Sequence[str]:
    return [str(word) for value in values for word in (value if isinstance(value, list | tuple) else (value,))]


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _options(of: type[Asked], config: Any, given: dict[str, Any]) -> Asked:
    config_file = ConfigOptions(config=config).config
    before = {} if config_file is None else of.values_in(config_file)
    training = {name: given.pop(name) for name in TRAINING_FLAGS if name in given}
    if training:
        rest = [given["recipe"]] if "recipe" in given else before.get("recipe", ())
        given["recipe"] = [_recipe(training), *rest]
    known = of.merged(before, given)
    if (missing := of.missing(known)) is not None:
        remedy = f"give it, or see 'compress {of.verb} --help'"
        raise BadInput(f"`{missing}` is missing", option=missing, remedy=remedy)
    return of(**known)


def _recipe(flags: Mapping[str, object]) -> Any:
    """The recipe in the flags, with each flag as the source of its field."""
    from compressor.recipe import TrainingRecipe

    return TrainingRecipe.from_dict({**flags, "sources": {name: f"flag {TRAINING_FLAGS[name][1]}" for name in flags}})


def _parameters(name: str, option: Option, default: Any) -> list[Parameter]:
    if option.only_python:
        return []
    kind = option.kind
    switch = kind.switch
    shown: bool | str = option.default_text or (not switch and default not in (None, (), MISSING))
    described_as = typer.Option(
        *_declared(name, option),
        metavar="" if switch else option.metavar or kind.metavar,
        help=with_flags(option.help) + (" Required." if default is MISSING else ""),
        rich_help_panel=option.panel,
        show_default=shown,
        autocompletion=_completing(kind.words) if kind.words else None,
        parser=_number(option.flag_of(name), int) if kind.shell is int else None,
    )
    annotation: Any = GenericAlias(list, kind.shell) if kind.repeated else kind.shell
    value = default if default not in ((), MISSING) else None
    found = [
        _parameter(
            name, annotation=annotation if value is not None else annotation | None, option=described_as, default=value
        )
    ]
    if name == "recipe" and option.panel == TRAINING:
        found += [_training_parameter(field) for field in TRAINING_FLAGS]
    return found


def _declared(name: str, option: Option) -> tuple[str, ...]:
    return (option.flag_of(name), *([option.short] if option.short else []))


def _completing(words: Sequence[str]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete


def _called_instead(name: str, option: Option, default: Any, *, call: Callable[..., Any]) -> Parameter:
    kind = option.kind
    described_as = typer.Option(
        *_declared(name, option),
        metavar="" if kind.switch else option.metavar or kind.metavar,
        help=option.help,
        rich_help_panel=option.panel,
        show_default=False,
        is_eager=True,
        callback=call,
        expose_value=False,
        autocompletion=_completing(kind.words) if kind.words else None,
    )
    annotation = kind.shell if kind.switch else kind.shell | None
    return _parameter(name, annotation=annotation, option=described_as, default=default)


def _training_parameter(name: str) -> Parameter:
    kind, flag, text = TRAINING_FLAGS[name]
    metavar = {bool: "", int: "N", float: "X"}.get(kind, "NAME")
    described_as = typer.Option(
        flag,
        metavar=metavar,
        help=text,
        rich_help_panel=TRAINING,
        show_default=False,
        parser=_number(flag, kind) if kind in (int, float) else None,
    )
    return _parameter(name, annotation=kind | None, option=described_as, default=None)


def _parameter(name: str, *, annotation: Any, option: Any, default: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, option])


def _number(flag: str, kind: type) -> Callable[[str], Any]:
    """A parser for whole numbers, or for others, also in percent."""

    def parse(text: str) -> Any:
        try:
            return float(text[:-1]) / 100 if kind is float and text.endswith("%") else kind(text)
        except ValueError:
            what, example = ("number", "0.1") if kind is float else ("whole number", "8")
            raise BadInput(f"{flag} '{text[:40]}' is not a {what}", remedy=f"give one such as {example}") from None

    return parse


def given(what: str, kind: Callable[[str], Any] = Path) -> Callable[[str], Any]:
    """A parser for the name of a file or folder that refuses the empty one, which would mean the folder one is in."""

    def parse(text: str) -> Any:
        if not text:
            raise BadInput(f"{what} is empty", remedy="name a file or folder")
        return kind(text)

    return parse
