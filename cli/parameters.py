"""The parameters of the commands, generated from the options that the verbs take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from compressor.errors import BadInput

Asked = TypeVar("Asked", bound=Options)

_CONTEXT, _CONFIG = "context", "config"


def typer_command(function: Callable[..., None], of: type[Options]) -> Callable[..., None]:
    """A command for typer: the function's own parameters, and a flag for each option that the shell can give.

    The function is called with the options in place of these flags.
    """
    own = [each for each in signature(function, eval_str=True).parameters.values() if each.name != "options"]
    arguments = [each for each in own if each.kind is Parameter.POSITIONAL_OR_KEYWORD]
    required_first = sorted(described(of), key=lambda each: each[2] is not MISSING)
    flags = [parameter for name, option, default in required_first for parameter in _parameters(name, option, default)]
    context = Parameter(_CONTEXT, Parameter.KEYWORD_ONLY, annotation=typer.Context)
    last = [each for each in own if each.kind is Parameter.KEYWORD_ONLY]
    parameters = [*(each.replace(kind=Parameter.KEYWORD_ONLY) for each in arguments), *flags, _config(), *last, context]
    named = {each.name for each in own}

    @wraps(function)
    def command(**values: Any) -> None:
        context = values.pop(_CONTEXT)
        given = {name: value for name, value in values.items() if _is_given(context, name)}
        options = _options(of, given.pop(_CONFIG, None), {k: v for k, v in given.items() if k not in named})
        function(options=options, **{name: value for name, value in values.items() if name in named})

    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _options(of: type[Asked], config: Path | None, given: dict[str, Any]) -> Asked:
    before = {} if config is None else of.values_in(config)
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
    declared = [option.flag_of(name), *([option.short] if option.short else [])]
    shown: bool | str = option.default_text or (not switch and default not in (None, (), MISSING))
    described_as = typer.Option(
        *declared,
        metavar="" if switch else option.metavar or kind.metavar,
        help=with_flags(option.help) + (" Required." if default is MISSING else ""),
        rich_help_panel=option.panel,
        show_default=shown,
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


def _training_parameter(name: str) -> Parameter:
    kind, flag, text = TRAINING_FLAGS[name]
    metavar = "" if kind is bool else None
    described_as = typer.Option(flag, metavar=metavar, help=text, rich_help_panel=TRAINING, show_default=False)
    return _parameter(name, annotation=kind | None, option=described_as, default=None)


def _config() -> Parameter:
    text = "Options in YAML or JSON, by their names in Python; flags take precedence."
    option = typer.Option("--config", metavar="FILE", parser=given("--config"), help=text)
    return _parameter(_CONFIG, annotation=Path | None, option=option, default=None)


def _parameter(name: str, *, annotation: Any, option: Any, default: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, option])


def given(what: str, kind: Callable[[str], Any] = Path) -> Callable[[str], Any]:
    """A parser for the name of a file or folder that refuses the empty one, which would mean the folder one is in."""

    def parse(text: str) -> Any:
        if not text:
            raise BadInput(f"{what} is empty", remedy="name a file or folder")
        return kind(text)

    return parse
