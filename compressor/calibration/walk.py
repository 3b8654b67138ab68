"""The compressed model, walked a segment at a time beside the dense one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compressor.calibration.activation_cache import CachedBatches
from compressor.calibration.calibration import Calibration, dense_inputs, of_segment, rows_of, with_layers
from compressor.calibration.examples import PARTS, Chunk, Part
from compressor.calibration.segments import State
from compressor.measure.moments import patches
from compressor.network import SeparateExperts


@dataclass(frozen=True)
class Kept:
    """What a walk has made of a segment: the factors of layers, moved statistics by place, and the places it passed."""

    factors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    statistics: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    places: Sequence[str] = ()

    def by_key(self) -> dict[str, Tensor]:
        """All tensors, by names for a file."""
        both = {"factors": self.factors, "statistics": self.statistics}
        return {
            json.dumps([kind, name, key]): each
            for kind, named in both.items()
            for name, tensors in named.items()
            for key, each in tensors.items()
        }

    @classmethod
    def of(cls, by_key: Mapping[str, Tensor], places: Sequence[str]) -> Self:
        """What was kept in a file."""
        both: dict[str, dict[str, dict[str, Tensor]]] = {"factors": {}, "statistics": {}}
        for text, each in by_key.items():
            kind, name, key = json.loads(text)
            both[kind].setdefault(name, {})[key] = each
        return cls(both["factors"], both["statistics"], places)


@dataclass(frozen=True)
class Stage:
    """Groups of layers whose inputs do not depend on each other, and whether each is called once."""

    groups: Sequence[Sequence[str]]
    once: bool


@dataclass
class Walk:
    """A model that is compressed on the way: the modules that replace others, and the segment that comes next.

    The inputs of that segment, in the model compressed so far, are in the calibration's cache under the walk's name.
    Those `modules` that the segment may run are `placed`, and others that were put there meanwhile.
    """

    calibration: Calibration
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    segment: int = 0
    name: str = "walk"
    placed: dict[str, nn.Module] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._enter()

    def _enter(self) -> None:
        """Hold the modules that the segment may run, and no others."""
        segments = self.calibration.segments
        if self.segment < segments.count:
            before = of_segment(segments, self.segment, self.placed)
            left = {place: None for place in self.modules if place not in before}
            new = {place: self.modules[place] for place in left if segments.may_run(self.segment, place)}
            self.placed = {**before, **new}

    @property
    def last(self) -> bool:
        """Whether the segment outputs the model's outputs."""
        return self.segment == self.calibration.segments.count - 1

    def run_dense(self, chunk: Chunk) -> State:
        """Outputs of the segment in the dense model."""
        calibration = self.calibration
        state = dense_inputs(calibration, self.segment, chunk)
        return calibration.segments.run(calibration.model, self.segment, calibration.data.read(chunk), state=state)

    def run_compressed(self, chunk: Chunk) -> State:
        """Outputs of the segment in the model compressed so far."""
        calibration = self.calibration
        inputs = self._inputs(chunk.part, self.segment).read(chunk.batch) if self.segment > 0 else ()
        batch = calibration.data.read(chunk)
        with with_layers(calibration.model, self.placed) as model:
            return calibration.segments.run(model, self.segment, batch, state=rows_of(inputs, chunk))

    def advance(self, kept: Callable[[], Kept] = Kept) -> None:
        """Go on to the next segment: cache its inputs in the model compressed so far.

        In a journal that stays, what is `kept` of this segment is recorded then, for a walk that is interrupted.
        """
        chunks, journal = self.calibration.data.chunks(*PARTS), self.calibration.cache.journal
        if not self.last:
            for chunk in chunks:
                self._inputs(chunk.part, self.segment + 1).write(chunk.batch, self.run_compressed(chunk))
        if journal.kept:
            made = kept()
            journal.write(self._record("factors"), made.by_key())
            journal.value(self._record("places"), lambda: list(made.places))
        for chunk in chunks:
            self._inputs(chunk.part, self.segment).drop(chunk.batch)
        self.skip()

    def kept_before(self) -> Kept | None:
        """What an interrupted walk kept of the segment that comes next, which is not walked again."""
        if self.segment == 0:
            self._forget_if_damaged()
        journal = self.calibration.cache.journal
        if not journal.knows(self._record("places")):
            return None
        # Copies: kernels may add up in another order where numbers begin at another address.
        tensors = {key: each.clone() for key, each in journal.read(self._record("factors")).items()}
        return Kept.of(tensors, journal.value(self._record("places"), list))

    def skip(self) -> None:
        """Go on to the next segment after one that an interrupted walk had done."""
        self.segment += 1
        self._enter()

    def _forget_if_damaged(self) -> None:
        journal, count = self.calibration.cache.journal, self.calibration.segments.count
        records = [(self._record("factors", each), self._record("places", each)) for each in range(count)]
        done = next((place for place, (_, name) in enumerate(records) if not journal.knows(name)), count)
        whole = all(journal.holds(name) for name, _ in records[:done])
        if 0 < done < count:
            chunks = self.calibration.data.chunks(*PARTS)
            whole &= all(self._inputs(chunk.part, done).holds(chunk.batch) for chunk in chunks)
        if not whole:
            for _, name in records[:done]:
                journal.drop(name)

    def _record(self, what: str, segment: int | None = None) -> str:
        return f"{self.name}/{what}-{self.segment if segment is None else segment}"

    def _inputs(self, part: Part, segment: int) -> CachedBatches:
        return self.calibration.cache.compressed(part, self.name, segment)

    def groups(self, places: Iterable[str]) -> list[list[str]]:
        """Modules, of those at some places, that the segment runs, in order; those with one input are a group.

        Every batch normalization is a group of its own.
        """
        return self._trace(places)[0]

    def stages(self, places: Iterable[str]) -> list[Stage]:
        """The `groups` of some places in order, those of one kind of layer in all experts of a block together."""
        groups, calls = self._trace(places)
        named = self.calibration.model.named_modules()
        mixtures = [f"{name}." for name, module in named if isinstance(module, SeparateExperts)]
        stages: dict[str, list[list[str]]] = {}
        for group in groups:
            inside = next((name for name in mixtures if group[0].startswith(name)), None)
            # Without the number of the expert.
            kind = group[0] if inside is None else inside + group[0].removeprefix(inside).partition(".")[2]
            stages.setdefault(kind, []).append(group)
        return [Stage(each, all(calls[place] == 1 for group in each for place in group)) for each in stages.values()]

    def _trace(self, places: Iterable[str]) -> tuple[list[list[str]], Counter[str]]:
        """The groups of some places, and how often each of these is called, on the first batch."""
        model = self.calibration.model
        groups: dict[Any, list[str]] = {}
        calls: Counter[str] = Counter()
        inputs: list[Tensor] = []  # kept, so that an address stands for one tensor

        def note(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], *, place: str) -> None:
            x = arguments[0] if arguments else next(iter(named.values()))
            inputs.append(x)
            calls[place] += 1
            alone = place if isinstance(layer, _BatchNorm) else None
            if not any(place in group for group in groups.values()):
                groups.setdefault((id(x), x._version, patches(layer), alone), []).append(place)

        with ExitStack() as stack:
            for place in places:
                hook = partial(note, place=place)
                stack.callback(model.get_submodule(place).register_forward_pre_hook(hook, with_kwargs=True).remove)
            self.run_dense(Chunk("fit", 0))
        return list(groups.values()), calls
