"""What other sizes of the same model would give by its allocation: loss, ranks and bits, and the command."""

from __future__ import annotations

import math
import re
import shlex
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.formatting import format_size
from compressor.forms import DENSE, pair_name, quantization_of
from compressor.planning import StoredForm, plan_loss
from compressor.report.layer_groups import kinds_of
from compressor.report.wording import loss_words

if TYPE_CHECKING:
    from compressor.planning import MeasuredLayer
    from compressor.results import Compression

# Sizes that a slider can tell apart.
_SIZES = 60

# A word of a command with its quotes.
_WORD = re.compile(r"""(?:[^\s'"]|'[^']*'|"[^"]*")+""")

# The flags that may say the size, each with one value: the first that is there does, and others are limits beside it.
_BUDGETS = tuple(f"--{name}" for name in ("plan", "keep", "max-size", "tolerance", "max-latency", "max-drop"))


@dataclass(frozen=True)
class StoredKind:
    """The ranks and bits of the layers of one kind, in words."""

    ranks: str
    bits: str


@dataclass(frozen=True)
class OtherSize:
    """One size of the weight files with its predicted loss and what each kind of layer would be.

    `keep` is the share of the eligible parameters that gives it; `this` is the size that was made.
    """

    bytes: int
    keep: float
    loss: float
    command: str
    kinds: tuple[StoredKind, ...]
    this: bool = False

    def to_dict(self, unit: str) -> dict[str, Any]:
        """The size as the page's script shows it, with its loss in a unit."""
        return {
            "bytes": self.bytes,
            "size": format_size(self.bytes),
            "lossWords": loss_words(self.loss, unit),
            "command": self.command,
            "made": self.this,
            "kinds": [[kind.ranks, kind.bits] for kind in self.kinds],
        }


@dataclass(frozen=True)
class OtherSizes:
    """Sizes in rising order; `kinds` and `counts` name the kinds of layers and how many there are of each."""

    sizes: tuple[OtherSize, ...]
    kinds: tuple[str, ...]
    counts: tuple[int, ...]

    @property
    def made(self) -> int:
        """The place of the size that was made."""
        return next(place for place, each in enumerate(self.sizes) if each.this)


def other_sizes(compression: Compression) -> OtherSizes | None:
    """What the allocation gives at other sizes; None where nothing was measured that says so."""
    curve, measured, plan = compression.curve, compression.measured, compression.plan
    if curve is None or not curve.layers or {m.layer.name for m in measured} != {layer.name for layer in plan.layers}:
        return None
    by_name = {layer.name: layer for layer in plan.layers}
    layers = [by_name[m.layer.name] for m in measured]
    places: dict[str, list[int]] = defaultdict(list)
    for place, kind in enumerate(kinds_of(layers)):
        places[kind].append(place)
    # What the files hold beside the layers' numbers is about the same at every size.
    own = sum(int(m.nbytes(layer.form, layer.rank or 0)) for m, layer in zip(measured, layers, strict=True))
    beside = compression.bytes.after - own
    shown = np.unique(np.linspace(0, len(curve.layers) - 1, min(len(curve.layers), _SIZES)).round().astype(int))
    found = []
    for number, nbytes in zip(shown, _bytes(measured, [curve.layers[number] for number in shown]), strict=True):
        keep = min(1.0, max(1, math.ceil(1e4 * curve.parameters[number] / plan.eligible_before)) / 1e4)
        command = command_for(compression.command, keep, compression.output)
        kinds = tuple(_stored_kind([curve.layers[number][place] for place in own]) for own in places.values())
        found.append(OtherSize(beside + nbytes, keep, curve.losses[number], command, kinds))
    loss = plan_loss(curve, layers, None if plan.calibration is None else plan.calibration.predicted_loss)
    stored = [StoredForm(layer.form, layer.rank or 0) for layer in layers]
    kinds = tuple(_stored_kind([stored[place] for place in own]) for own in places.values())
    keep = plan.eligible_after / plan.eligible_before
    command = compression.command or command_for("", math.ceil(1e4 * keep) / 1e4)
    found.append(OtherSize(compression.bytes.after, keep, loss, command, kinds, this=True))
    found.sort(key=lambda each: each.bytes)
    return OtherSizes(tuple(found), tuple(places), tuple(map(len, places.values())))


def _bytes(measured: Sequence[MeasuredLayer], at_sizes: Sequence[Sequence[StoredForm]]) -> Iterator[int]:
    """What the layers take at every size; layers are mostly the same at the next one."""
    known: list[dict[StoredForm, int]] = [{} for _ in measured]
    for stored in at_sizes:
        total = 0
        for m, each, cached in zip(measured, stored, known, strict=True):
            if each not in cached:
                cached[each] = int(m.nbytes(each.form, each.rank))
            total += cached[each]
        yield total


def _stored_kind(stored: Sequence[StoredForm]) -> StoredKind:
    pairs = [each.rank for each in stored if pair_name(each.form) not in (DENSE, f"initial+{DENSE}")]
    widths = [16 if (of := quantization_of(each.form)) is None else of.bits for each in stored]
    dense = len(stored) - len(pairs)
    ranks = _range(pairs) if pairs else "full"
    if pairs and dense:
        ranks += f"; {dense} of {len(stored)} full"
    return StoredKind(ranks, _range(widths))


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def command_for(command: str, keep: float, output: str | None = None) -> str:
    """The command with another size in place of its own, and another output; without one what to pass in Python.

    Limits beside the size stay. Where a limit was all that said the size, what is about it goes along.
    """
    if not command:
        return f"keep={keep:g}"
    # As written: a name may contain what begins a comment, or be called like an option, and is then in quotes.
    words = _WORD.findall(command)
    comment = words.index("#") if "#" in words else len(words)
    flags = [word.partition("=")[0] for word in words[:comment]]
    replaced = next((flag for flag in _BUDGETS if flag in flags), None)
    dropped = {replaced} if output is None else {replaced, "--output", "-o"}
    kept, skipped = [], False
    for word, flag in zip(words, flags, strict=False):
        if skipped or flag in dropped:
            skipped = not skipped and word == flag
        elif flag != "--allow-miss" or replaced != "--max-drop":
            kept.append(word)
    named = [] if output is None else ["--output", shlex.quote(_beside(output, keep))]
    return " ".join([*kept, "--keep", f"{keep:g}", *named, *words[comment:]])


def _beside(output: str, keep: float) -> str:
    """The name of an output of another size, which would not replace this one."""
    path = PurePath(output)
    end = path.suffix if path.suffix == ".safetensors" else ""
    return f"{path.name.removesuffix(end)}-{keep:g}{end}"
