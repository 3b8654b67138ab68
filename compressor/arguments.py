"""Check arguments as users write them, in Python or at a shell, and convert them."""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from itertools import chain
from typing import TYPE_CHECKING, Any

from compressor.errors import BadInput

if TYPE_CHECKING:
    from torch import nn

_A_MODEL = "give a path, org/name of the hub, or a torch.nn.Module"
_MOST_SHOWN = 40
_UNITS = {
    unit: base**power
    for base, infix in ((1000, ""), (1024, "I"))
    for power, letter in enumerate("KMGT", start=1)
    for unit in (letter + infix + "B",)
} | {"": 1, "B": 1}


def as_number(value: object, option: str, *, percent: bool = False) -> float | None:
    """A number of any kind, also in text, as a float; with `percent` 60% is 0.6."""
    if value is None:
        return None
    text = value.strip() if isinstance(value, str) else None
    try:
        if isinstance(value, bool):
            raise TypeError
        if text is None:
            return float(value)  # type: ignore[arg-type]
        if percent and text.endswith("%"):
            return float(text[:-1]) / 100
        return float(text)
    except (TypeError, ValueError, ArithmeticError, RuntimeError):
        examples = "0.6 or 60%" if percent else "0.05"
        raise BadInput(
            f"`{option}` {_shown(value)} is not a number", option=option, remedy=f"give one such as {examples}"
        ) from None


class Percent(float):
    """A share that was written in percent."""


def as_drop(value: object, option: str) -> float | None:
    """A drop in a metric as a number; one in percent, which can only be of accuracy, remembers that."""
    number = as_number(value, option, percent=True)
    in_percent = isinstance(value, Percent) or (isinstance(value, str) and value.strip().endswith("%"))
    return Percent(number) if in_percent and number is not None else number


def as_numbers(value: object, option: str) -> tuple[float, ...]:
    """Finite numbers: one, several, or text such as 0.7,0.3."""
    parts = value.split(",") if isinstance(value, str) else value
    listed: Sequence[Any] = parts if isinstance(parts, list | tuple) else [parts]
    numbers = [as_number(part, option) for part in listed]
    if not all(number is not None and math.isfinite(number) for number in numbers):
        raise BadInput(
            f"`{option}` {_shown(value)} is out of range", option=option, remedy="give numbers such as 0.7,0.3"
        )
    return tuple(number for number in numbers if number is not None)


def as_count(value: object, option: str, *, least: int, most: int = 2**63 - 1) -> int:
    """A whole number of any kind from `least` to `most`."""
    number = None if isinstance(value, bool | str) else value
    try:
        count = int(number)  # type: ignore[call-overload]
    except (TypeError, ValueError, ArithmeticError, RuntimeError):
        count = None
    if count is None or count != number or not least <= count <= most:
        remedy = f"give a whole number from {least}" + (" on" if most == 2**63 - 1 else f" to {most}")
        wrong = "not a number" if number is None else "out of range"
        raise BadInput(f"`{option}` {_shown(value)} is {wrong}", option=option, remedy=remedy)
    return int(count)


def as_ratio(value: object, option: str) -> float | None:
    """A ratio to the dense model as a number, or in text: 0.7x, 0.7 or 70%."""
    if isinstance(value, str) and value.strip().lower().endswith("x"):
        value = value.strip()[:-1]
    return as_number(value, option, percent=True)


def as_counts(value: object, option: str, *, least: int) -> tuple[int, ...]:
    """Whole numbers of at least `least`, each once: one of them, several, or text such as 1,32."""
    parts = (value,) if isinstance(value, int) else _listed(value)
    require_kind(parts, option, (list, tuple), remedy="give whole numbers, such as (1, 32)")
    if not parts:
        raise BadInput(f"`{option}` is empty", option=option, remedy="give whole numbers, such as (1, 32)")
    return tuple(dict.fromkeys(as_count(part, option, least=least) for part in parts))


def _listed(value: object) -> Any:
    """The whole numbers and other parts of text such as 1,32; what is not text as it is."""
    if not isinstance(value, str):
        return value
    return [int(part) if part.strip().isdecimal() else part for part in value.split(",")]


def as_widths(value: object, option: str) -> tuple[int, ...]:
    """Bits that numbers may be stored in, each once and the most first: 8, (8, 4), or text such as 8,4.

    `auto`, any that pays, is the empty tuple.
    """
    if value == () or (isinstance(value, str) and value.strip() == "auto"):
        return ()
    parts, known = _listed(value), (16, *range(8, 1, -1))
    listed: Sequence[Any] = parts if isinstance(parts, list | tuple) and parts else [value]
    wrong = [part for part in listed if part not in known or isinstance(part, bool)]
    if wrong:
        remedy = "give 2 to 8, 16, several such as 8,4, or auto"
        raise BadInput(f"`{option}` {_shown(wrong[0])} is no width", option=option, remedy=remedy)
    return tuple(sorted({int(part) for part in listed}, reverse=True))


def as_size(value: object, option: str) -> int:
    """A size as a number of bytes: a whole number, or text such as 40MB or 1.5GiB; KB is 1000 bytes, KiB is 1024."""
    if not isinstance(value, str):
        return as_count(value, option, least=1)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)\s*", value, re.ASCII)
    unit = _UNITS.get(match[2].upper()) if match else None
    size = 0 if match is None or unit is None else int(Decimal(match[1]) * unit)
    if size <= 0:
        what, remedy = f"`{option}` {_shown(value)} is not a size", "write a number and a unit, such as 40MB or 1.5GiB"
        raise BadInput(what, option=option, remedy=remedy)
    return size


def as_patterns(value: str | Iterable[str] | None, option: str) -> tuple[str, ...]:
    """The patterns on layer names; a text is one pattern, and not its letters."""
    patterns: Any = (value,) if isinstance(value, str) else value or ()
    held = tuple(patterns) if isinstance(patterns, Iterable) else (None,)
    if not all(isinstance(each, str) and each for each in held):
        raise BadInput(
            f"`{option}` {_shown(value)} holds something else than patterns",
            option=option,
            remedy="give globs such as '*.mlp.*', or expressions such as 're:^encoder'",
        )
    for pattern in (each for each in held if each.startswith("re:")):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            what = f"`{option}` {_shown(pattern)} is not a regular expression ({error})"
            raise BadInput(what, option=option, remedy="correct it, or use a glob without 're:'") from error
    return held


def one_of(value: object, option: str, choices: Sequence[str]) -> None:
    """Refuse a value that is not among the choices of an option."""
    if value not in choices:
        what = f"`{option}` {_shown(value)} does not exist"
        raise BadInput(what, option=option, remedy=f"use one of {', '.join(choices)}")


def require_kind(value: object, option: str, kinds: tuple[Any, ...], *, remedy: str) -> None:
    """Refuse a value that is given and not of a type that an option takes."""
    if value is not None and not isinstance(value, kinds):
        raise BadInput(f"`{option}` is of type {type(value).__name__}", option=option, remedy=remedy)


def require_model(model: object, option: str = "model") -> None:
    """Refuse what is neither a path nor a module whose layers can be seen and replaced."""
    from torch import nn

    if isinstance(model, nn.Module):
        _require_plain(model)
        return
    if isinstance(model, os.PathLike) or (isinstance(model, str) and model):
        return
    what = f"the model is of type {type(model).__name__}" if model != "" else "the name of the model is empty"
    remedy = _A_MODEL
    if isinstance(model, dict):
        remedy = "load the state dict into its module and give that, or save it to a file"
    raise BadInput(what, option=option, remedy=remedy)


def _require_plain(module: nn.Module) -> None:
    from torch.jit import ScriptModule
    from torch.nn.parameter import is_lazy

    name = type(module).__name__
    try:
        for place, part in module.named_modules():
            if isinstance(part, ScriptModule):
                what = f"{place or name} is a TorchScript module, whose layers cannot be replaced"
                raise BadInput(what, option="model", remedy="give the module that it was made from")
        for place, tensor in chain(module.named_parameters(), module.named_buffers()):
            if is_lazy(tensor):
                what = f"{place} of {name} has no shape yet, because its layer is lazy"
                raise BadInput(what, option="model", remedy="run the module once on an example, and load its weights")
    except RecursionError:
        raise _too_deep(name) from None


def require_copyable(module: nn.Module) -> None:
    """Refuse a module that cannot be copied, as compression needs to; its tensors are not copied here."""
    tensors = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    with copying(module):
        copy.deepcopy(module, tensors)


@contextmanager
def copying(module: nn.Module) -> Iterator[None]:
    """Turn the ways in which a module refuses to be copied into `BadInput`."""
    name = type(module).__name__
    try:
        yield
    except RecursionError:
        raise _too_deep(name) from None
    except Exception as error:  # the code of any class may raise anything
        what = f"{name} cannot be copied ({type(error).__name__}: {str(error)[:120]})"
        remedy = "take away what it holds beside modules and tensors, or give its class a __deepcopy__"
        raise BadInput(what, option="model", remedy=remedy) from error


def _too_deep(name: str) -> BadInput:
    what = f"the modules of {name} are nested too deeply for Python's recursion limit"
    return BadInput(what, option="model", remedy="raise it, as with sys.setrecursionlimit(10_000), or nest them less")


def _shown(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**_MOST_SHOWN:
        return "of more than forty digits"
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
