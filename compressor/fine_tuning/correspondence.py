"""A fine-tune in the names of its base: where one of the two is the language model in the other, or not all is there.

A model with images holds a language model whose names begin with `language_model.` or `model.language_model.`. Saved by
itself that has names without this. One prefix that stands for another relates the two, and it is found in names and
shapes. A fine-tune that lacks tensors of its base has them from there.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from compressor.errors import BadInput
from compressor.io import Checkpoint, StoredTensor, TensorInfo

_REMEDY = "give the fine-tune in the names that its base has"


@dataclass(frozen=True)
class Correspondence:
    """How the tensors of a fine-tune are called in its base.

    Attributes:
        prefix: What the fine-tune's names begin with where the base's begin with `prefix_in_base`; both are empty
            where the names are the same.
        prefix_in_base: What stands for it in the base.
        only_in_base: How many tensors the fine-tune lacks, which are taken to be as in the base.
        left_out: The tensors of the fine-tune that the base lacks, such as a vision tower, if the base is the language
            model in it.
    """

    prefix: str
    prefix_in_base: str
    only_in_base: int
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class _Names:
    """The names in the base, by those in the fine-tune, that follow from one prefix that stands for another."""

    prefix: str
    in_base: str
    of: Mapping[str, str]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class Renamed:
    """A fine-tune with the names of its base and all of its tensors, and how its own are called there."""

    checkpoint: Checkpoint
    own: frozenset[str]
    correspondence: Correspondence


def same_names(tuned: Checkpoint, base: Checkpoint) -> bool:
    """Whether two checkpoints have tensors of the same names, those of tied tensors among them."""
    return _shapes(tuned).keys() == _shapes(base).keys()


def renamed(tuned: Checkpoint, base: Checkpoint) -> Renamed | None:
    """A fine-tune as a checkpoint that has the names of its base; None where these are not found there.

    Of the base come the configuration, and the tensors that the fine-tune lacks. Raises `BadInput` where its names fit
    at two places of the base, or what it lacks was one tensor with another that it has.
    """
    names = _names(tuned, base)
    if names is None:
        return None
    stored: dict[str, StoredTensor] = {new: tuned.stored(old) for old, new in names.of.items()}
    aliases: dict[str, str] = {}
    for alias, name in base.aliases.items():
        if alias in stored and name not in stored:  # a tied tensor may have another of its names in the fine-tune
            stored[name] = stored.pop(alias)
        if alias not in stored:
            aliases[alias] = name
    known = _shapes(base)
    for alias, name in tuned.aliases.items():
        new = _renamed(alias, names, known)
        if new in base.tensors and new not in stored and name in names.of:
            aliases[new] = aliases.get(names.of[name], names.of[name])
    missing = [name for name in base.tensors if name not in stored and name not in aliases]
    _require_no_tie(tuned, base, own=stored, missing=missing)
    own = frozenset(stored)
    stored |= {name: base.stored(name) for name in missing}
    order = dict.fromkeys((*(name for name in base.tensors if name in stored), *stored))
    infos = {name: TensorInfo(name, stored[name].shape, stored[name].dtype) for name in order}
    checkpoint = replace(base, tensors=infos, aliases=aliases, _stored={**base._stored, **stored})
    found = Correspondence(names.prefix, names.in_base, len(missing), names.left_out)
    return Renamed(checkpoint, own, found)


def _names(tuned: Checkpoint, base: Checkpoint) -> _Names | None:
    ours, theirs = tuned.tensors, _shapes(base)
    outside = tuple(name for name in ours if name not in theirs)
    if not outside or (len(outside) < len(ours) and _is_around(tuned, base)):
        names = {name: name for name in ours if name in theirs}
        return _Names("", "", names, outside) if _may_share_names(tuned, base) else None
    fitting = [each for names in _prefixes(ours, theirs) if (each := _fitting(names, ours, theirs)) is not None]
    if not fitting:
        return None
    most = max(len(each.of) for each in fitting)
    best = [each for each in fitting if len(each.of) == most]
    if other := [each for each in best if each.of != best[0].of]:
        places = sorted(f"behind {each.in_base}" if each.in_base else "by themselves" for each in (best[0], other[0]))
        what = f"its tensors fit in the base {' and '.join(places)}"
        raise BadInput(what, where=tuned.source, option="base", remedy=_REMEDY)
    return best[0]


def _prefixes(ours: Mapping[str, TensorInfo], theirs: Mapping[str, TensorInfo]) -> list[_Names]:
    """Prefixes of the fine-tune and what may stand for them in the base, those of most tensors first.

    They are what is left of the names of two tensors of one shape without the longest end that both have.
    """
    ends: dict[str, list[str]] = defaultdict(list)
    for name in theirs:
        for end in _ends(name):
            ends[end].append(name)
    counts: Counter[tuple[str, str]] = Counter()
    for name in ours:
        if name in theirs:
            continue
        for end in _ends(name):
            if found := [each for each in ends.get(end, ()) if theirs[each].shape == ours[name].shape]:
                counts.update((name.removesuffix(end), each.removesuffix(end)) for each in found)
                break
    return [_Names(prefix, in_base, {}, ()) for (prefix, in_base), _ in counts.most_common()]


def _ends(name: str) -> Iterator[str]:
    """The ends of a name at its dots, the longest first."""
    parts = name.split(".")
    return (".".join(parts[place:]) for place in range(len(parts)))


def _fitting(names: _Names, ours: Mapping[str, TensorInfo], theirs: Mapping[str, TensorInfo]) -> _Names | None:
    """The names in the base by a prefix that stands for another; None where a tensor does not fit.

    Tensors without the prefix may be left out where the fine-tune has the language model, and more around it.
    """
    around = names.prefix.count(".") > names.in_base.count(".")
    found: dict[str, str] = {}
    left_out: list[str] = []
    for name, info in ours.items():
        new = _renamed(name, names, theirs)
        if new in theirs and theirs[new].shape == info.shape:
            found[name] = new
        elif around and not name.startswith(names.prefix):
            left_out.append(name)
        else:
            return None
    if len(set(found.values())) < len(found):
        return None
    return replace(names, of=found, left_out=tuple(left_out))


def _renamed(name: str, names: _Names, theirs: Mapping[str, TensorInfo]) -> str:
    """The name with the other prefix, or as it is where the base has no such tensor: a head outside, say."""
    if not name.startswith(names.prefix):
        return name
    new = names.in_base + name.removeprefix(names.prefix)
    return new if new in theirs else name


def _may_share_names(tuned: Checkpoint, base: Checkpoint) -> bool:
    """Whether equal names are the same tensors: of one architecture, or of a language model and one around it."""
    if tuned.folder is None or base.folder is None:
        return True
    said = [((each.config or {}).get("model_type"), (each.config or {}).get("architectures")) for each in (tuned, base)]
    return said[0] == said[1] or _is_around(tuned, base) or _is_around(base, tuned)


def _is_around(outer: Checkpoint, inner: Checkpoint) -> bool:
    """Whether one is a model with a language model in it by its configuration, and the other is not."""
    return "text_config" in (outer.config or {}) and inner.config is not None and "text_config" not in inner.config


def _require_no_tie(
    tuned: Checkpoint, base: Checkpoint, *, own: Mapping[str, StoredTensor], missing: list[str]
) -> None:
    """Refuse a tensor that is missing because it is one with another, which the base has twice.

    Embedding and head are two matrices of a shape that no other has.
    """
    by_shape: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, info in base.tensors.items():
        if len(info.shape) == 2:
            by_shape[info.shape].append(name)
    for name in missing:
        group = by_shape.get(base.tensors[name].shape, [])
        for other in group if len(group) == 2 else ():
            if other in own and torch.equal(base.read(name), base.read(other)):
                what = f"lacks {name}, which is the same as {other} in its base"
                remedy = "save the fine-tune with both, or compress it without `base`"
                raise BadInput(what, where=tuned.source, remedy=remedy)


def _shapes(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """Shape and dtype of each tensor by all of its names."""
    return dict(checkpoint.tensors) | {alias: checkpoint.tensors[name] for alias, name in checkpoint.aliases.items()}
