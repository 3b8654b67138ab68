"""The contents of a training checkpoint besides the model's weights: the state of the run and its settings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.serialization import safe_globals

from compressor.io.tensors import TensorInfo

# Classes that hold settings and nothing else. Each is read as an inert mapping; the class itself is never imported.
_SETTINGS = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "easydict.EasyDict",
    "addict.addict.Dict",
    "yacs.config.CfgNode",
    "fvcore.common.config.CfgNode",
    "mmengine.config.config.ConfigDict",
    "mmcv.utils.config.ConfigDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
)
_KINDS = (
    ("optimizer state", re.compile(r"optim|(^|[._/])opt($|[._/]|_state)|(^|[._/])adam")),
    ("EMA copy of the weights", re.compile(r"(^|[._/-])ema($|[._/-])|shadow|averaged")),
    ("learning-rate schedule", re.compile(r"sched")),
)
# In a file without any nesting, these beginnings of a name say that a tensor is the optimizer's.
_OF_AN_OPTIMIZER = re.compile(r"(optimizer|optim|opt_state|optimizer_state|optimizer_state_dict|optimizer_weights)[./]")
_MOST_LEVELS = 8
_MOST_VALUES = 200_000
_MOST_READ = 4096
_MOST_CHARACTERS = 4096


@dataclass(frozen=True)
class LeftOut:
    """An entry of a checkpoint, under `key`, that is not among the model's weights, and its size."""

    key: str
    kind: str
    bytes: int


class Settings(dict[Any, Any]):
    """A mapping in the place of an object that holds settings, whatever its class was."""

    def __new__(cls, *_: object) -> Settings:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        if isinstance(state, Mapping):
            self.update(state)


@contextmanager
def settings_as_mappings() -> Iterator[None]:
    """Let `torch.load(..., weights_only=True)` read the known classes of settings as `Settings`."""
    stand_ins: list[Any] = []
    for path in _SETTINGS:
        module, _, name = path.rpartition(".")
        stand_ins.append(type(name, (Settings,), {"__module__": module}))
    with safe_globals(stand_ins):
        yield


def kind_of(key: str) -> str:
    """What an entry of a training checkpoint holds, in a few words."""
    return next((kind for kind, pattern in _KINDS if pattern.search(key.lower())), "not part of the model")


def is_ema(key: str) -> bool:
    """Whether a key is that of an exponential moving average of the weights."""
    return kind_of(key).startswith("EMA")


def of_an_optimizer(name: str) -> bool:
    """Whether a tensor in a flat file is an optimizer's, by its name."""
    return _OF_AN_OPTIMIZER.match(name) is not None


def left_out(document: Mapping[Any, Any], keys: Sequence[str], weights: Mapping[Any, Any]) -> tuple[LeftOut, ...]:
    """What of a training checkpoint is not in `weights`, which `keys` lead to, with the bytes of its tensors.

    Tensors that share their storage are counted once, and not at all where the weights share it too.
    """
    counted = {_storage(tensor) for tensor in weights.values() if isinstance(tensor, torch.Tensor)}
    found: list[LeftOut] = []
    for key, value in _beside(document, keys):
        size = 0
        for tensor in _tensors_in(value):
            storage = _storage(tensor)
            if storage not in counted:
                counted.add(storage)
                size += tensor.untyped_storage().nbytes()
        if size:
            found.append(LeftOut(key, kind_of(key), size))
    return tuple(found)


def plain_document(
    document: Mapping[Any, Any], weights: Mapping[Any, Any], scalar: Callable[[torch.Tensor], object]
) -> dict[str, Any]:
    """The mappings, lists and plain values of a training checkpoint, without `weights`.

    Of tensors with one element `scalar` gives the value, of others the shape and dtype stand there as a `TensorInfo`.
    """
    values, read = 0, 0

    def plain(value: object, level: int) -> Any:
        nonlocal values, read
        values += 1
        if value is weights or level > _MOST_LEVELS or values > _MOST_VALUES:
            return None
        if isinstance(value, torch.Tensor):
            if value.numel() == 1 and read < _MOST_READ:
                read += 1
                return scalar(value)
            return TensorInfo("", tuple(value.shape), value.dtype)
        if isinstance(value, Mapping):
            return {key: plain(inner, level + 1) for key, inner in value.items() if isinstance(key, str | int)}
        if isinstance(value, list | tuple | set):
            return [plain(inner, level + 1) for inner in value]
        if isinstance(value, str):
            return value[:_MOST_CHARACTERS]
        if isinstance(value, bool | int | float) or value is None:
            return value
        item = getattr(value, "item", None)  # numpy's numbers
        return item() if type(value).__module__ == "numpy" and item is not None and not value.shape else None  # type: ignore[attr-defined]

    found = plain(document, 0)
    return found if isinstance(found, dict) else {}


def _beside(document: Mapping[Any, Any], keys: Sequence[str]) -> Iterator[tuple[str, object]]:
    """The entries beside the weights, which `keys` lead to, by their own keys."""
    for depth, on_the_way in enumerate((*keys, None)):
        for key, value in document.items():
            if key != on_the_way and not (on_the_way is None and isinstance(value, torch.Tensor)):
                yield ".".join((*keys[:depth], str(key)[:80])), value
        if on_the_way is not None:
            document = document[on_the_way]


def _tensors_in(value: object) -> Iterator[torch.Tensor]:
    """The tensors in mappings and lists, each container once."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, torch.Tensor):
            if each.layout is torch.strided and not each.is_quantized:
                yield each
        elif isinstance(each, Mapping | list | tuple) and id(each) not in seen:
            seen.add(id(each))
            waiting.extend(each.values() if isinstance(each, Mapping) else each)


def _storage(tensor: torch.Tensor) -> object:
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return id(tensor)
    storage = tensor.untyped_storage()
    offset = getattr(storage, "_checkpoint_offset", None)
    return ("at", offset) if offset is not None else ("in", storage._cdata)
