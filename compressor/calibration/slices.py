"""Slices of the calibration examples as jobs: each worker runs the model forward and backward on its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from compressor.calibration.activation_cache import ActivationCache
from compressor.calibration.backward import BackwardPass
from compressor.calibration.calibration import Calibration, frozen
from compressor.calibration.examples import CalibrationData, Slice
from compressor.calibration.forward import cache_outputs
from compressor.calibration.prepare import collectors_of, modules_of, prepared
from compressor.calibration.replacements import Replacements, SentReplacements
from compressor.calibration.settings import CalibrationSettings
from compressor.calibration.sums import SegmentSums
from compressor.data import Batch
from compressor.engine import Fingerprint, InProcess, Journal, Run
from compressor.initial import InitialWeights
from compressor.measure.moments import InputSums, LayerSums, require_finite
from compressor.model import ModelFiles, evaluation_mode
from compressor.network import Layer
from compressor.torch_state import brought_to, neutral_torch_state

logger = logging.getLogger(__name__)


@contextmanager
def slices_in_workers(calibration: Calibration) -> Iterator[AddedSlices | None]:
    """The sums over the slices of the fit examples, each formed by a job of the run's engine, and added up in order.

    A slice is added once it and those before it are formed, and its sums are removed: so there are those of one slice
    more than there are workers, and the total.

    None where this process forms them: where the run has no workers, these cannot read the model from files or do not
    see the folder of the run, there is only one slice, or all metrics are known.
    """
    run, count = calibration.run, calibration.segments.count
    added = AddedSlices(calibration)
    known = all(calibration.cache.moments.knows(f"backward-{segment}") for segment in range(count))
    files, replaced = calibration.files, calibration.replaced
    here = known or isinstance(run.engine, InProcess) or len(calibration.slices) < 2
    if files is None or here or (replaced and not isinstance(replaced, Replacements)):
        added.drop_all()
        yield None
        return
    folder = calibration.cache.journal.folder("slices").absolute()  # workers may be at work in another one
    factors = run.journal.temporary()  # which goes when this ends
    sent = replaced.sent(factors) if isinstance(replaced, Replacements) else None
    asked = [
        _SliceOfExamples(
            place=place,
            own=each,
            files=files,
            layers=tuple(calibration.layers.values()),
            data=_without_holdout(calibration.data),
            first=calibration.first.bare(),
            folder=folder,
            settings=calibration.settings,
            device=run.job_device,
            seed=run.seed,
            initial=calibration.initial,
            replaced=sent,
        )
        for place, each in enumerate(calibration.slices)
    ]
    before = added.count()
    for own in asked[:before]:
        own.remove()
    seen = True
    for done, sees_it in enumerate(run.engine.map(_formed, asked[before:]), start=before):
        seen = seen and sees_it and added.add(asked[done])
        run.report("run", done + 1, len(asked) + count)
    if seen:
        added.take_inputs()
        yield added
    else:
        logger.warning(
            "the moments are taken in this process: not all workers see %s; give a work folder (`work_dir`) that all"
            " machines share",
            folder,
        )
        for own in asked:
            own.remove()
        added.drop_all()
        yield None
    added.drop_all()


@dataclass(frozen=True)
class _SliceOfExamples:
    """What a worker needs to form the sums over a slice of the fit examples, and the folder that it keeps them in.

    At a compressed model some modules of the dense one are `replaced`, and no embeddings or parameters are watched.
    """

    place: int
    own: Slice
    files: ModelFiles
    layers: Sequence[Layer]
    data: CalibrationData
    first: Batch
    folder: Path
    settings: CalibrationSettings
    device: torch.device
    seed: int
    initial: InitialWeights | None
    replaced: SentReplacements | None

    def opened(self) -> Journal:
        """The journal of the slice, once a worker that died has let go of it."""
        return Journal.open(self.folder / str(self.place), Fingerprint(), option="work_dir", patience=60.0)

    def remove(self) -> None:
        """Remove the journal, if there is one."""
        if (self.folder / str(self.place)).is_dir():
            self.opened().remove()


class _SliceCache(ActivationCache):
    """The activation cache of a slice, whose sums are added to those of other slices before they are rounded."""

    def write_inputs(self, segment: int, sums: InputSums) -> None:
        """Keep the sums of the inputs of a segment's layers over the examples that are not run backward."""
        self.journal.write(f"inputs-{segment}", SegmentSums(LayerSums(dict(sums))).tensors())

    def has_inputs(self, segment: int) -> bool:
        """Whether the sums of the inputs of a segment's layers are kept."""
        return self.journal.holds(f"inputs-{segment}")


def _formed(asked: _SliceOfExamples) -> bool:
    """Form the sums over a slice in its folder, from where a worker that died had left it; False if it is not seen."""
    if not asked.folder.is_dir() or (asked.replaced is not None and not asked.replaced.factors.are_seen):
        return False
    journal = asked.opened()
    try:
        with neutral_torch_state():
            _form(asked, journal)
    finally:
        journal.close()
    return True


def _form(asked: _SliceOfExamples, journal: Journal) -> None:
    model = asked.files.streamed()
    run = Run(asked.device, asked.seed, journal=journal)
    with evaluation_mode(run.device, model), frozen(model):
        whole = prepared(model, asked.layers, asked.data, first=asked.first, run=run, settings=asked.settings)
        cache = _SliceCache(run.device, journal)
        own = replace(whole, slices=(asked.own,), cache=cache, initial=asked.initial)
        modules, collectors = modules_of(own), None if asked.replaced is not None else collectors_of(own)
        if asked.replaced is not None:
            own = replace(own, replaced=asked.replaced.opened(own))
        backward = BackwardPass(own, modules, collectors)
        order = list(reversed(range(own.segments.count)))
        done = next((place for place, each in enumerate(order) if not journal.holds(f"sums-{each}")), len(order))
        if done == len(order):
            return
        cache_outputs(own, ("fit",), modules)
        if done and not backward.can_begin(order[done]):
            done = 0
        with nullcontext() if collectors is None else collectors.watching():
            for segment in order[done:]:
                journal.write(f"sums-{segment}", backward.sums(segment).tensors())
                backward.drop(segment)


class AddedSlices:
    """The sums that workers have formed over the first of the slices, added up in the order of these.

    A unit for the sums of each segment is called by how many slices are in it, so that a run that is interrupted while
    it adds one knows of every segment whether that is in it.
    """

    def __init__(self, calibration: Calibration) -> None:
        self._calibration, self._journal = calibration, calibration.cache.journal
        segments = range(calibration.segments.count)
        self._names = [f"{kind}-{segment}" for segment in segments for kind in ("inputs", "sums")]

    def count(self) -> int:
        """How many slices are in all sums; what cannot be gone on from is removed."""
        most = len(self._calibration.slices)
        found = next(count for count in range(most, -1, -1) if count == 0 or self._has(count))
        for name in self._names:
            for count in set(range(1, most + 1)) - {found, found + 1}:
                self._journal.drop(_unit(name, count))
        return found

    def add(self, own: _SliceOfExamples) -> bool:
        """Add a slice to those before it, and remove what its worker kept; False where it is not all here.

        On another machine there may be a folder of that name that is not this one.
        """
        journal, count = own.opened(), own.place
        try:
            if not all(journal.holds(name) for name in self._names if name.startswith("sums")):
                return False
            self._take_outputs(own.place, journal)
            for name in self._names:
                if not self._journal.holds(_unit(name, count + 1)):
                    total = self._read(self._journal, _unit(name, count))
                    total.add(self._read(journal, name))
                    self._journal.write(_unit(name, count + 1), total.tensors())
                self._journal.drop(_unit(name, count))
            journal.remove()
        finally:
            journal.close()
        return True

    def take_inputs(self) -> None:
        """Keep the sums of inputs over the examples that were not run backward as a run in process does."""
        calibration = self._calibration
        for segment in range(calibration.segments.count):
            inputs = self._whole(f"inputs-{segment}").layers
            if inputs.inputs and not calibration.cache.has_inputs(segment):
                require_finite(calibration.layers, inputs)
                calibration.cache.write_inputs(segment, inputs.inputs)

    def sums(self, segment: int) -> SegmentSums:
        """Those of a segment, over the examples that are run backward."""
        return self._whole(f"sums-{segment}")

    def can_begin(self, segment: int) -> bool:
        """Whether a segment, of which later ones are done, can be the first that is asked for."""
        count = len(self._calibration.slices)
        return all(self._journal.holds(_unit(f"sums-{before}", count)) for before in range(segment + 1))

    def drop(self, segment: int) -> None:
        """Let go of what a segment was made of: all at the end, for the metrics of a segment may be damaged."""

    def drop_all(self) -> None:
        """Remove all sums."""
        for name in self._names:
            for count in range(1, len(self._calibration.slices) + 1):
                self._journal.drop(_unit(name, count))

    def _has(self, count: int) -> bool:
        """Whether so many slices are in all sums; in some there may be the next one too."""
        return all(any(self._journal.holds(_unit(name, each)) for each in (count, count + 1)) for name in self._names)

    def _take_outputs(self, place: int, journal: Journal) -> None:
        """Take over what a worker kept when it ran the model forward."""
        calibration = self._calibration
        made = ActivationCache(calibration.run.device, journal)
        for segment in range(calibration.segments.count):
            for chunk in calibration.slices[place].chunks:
                calibration.cache.dense("fit", segment).take(chunk.batch, made.dense("fit", segment))

    def _read(self, journal: Journal, name: str) -> SegmentSums:
        return SegmentSums.of(journal.read(name)) if journal.holds(name) else SegmentSums()

    def _whole(self, name: str) -> SegmentSums:
        tensors = self._journal.read(_unit(name, len(self._calibration.slices)))
        return SegmentSums.of({key: brought_to(self._calibration.run.device, each) for key, each in tensors.items()})


def _unit(name: str, count: int) -> str:
    return f"slices/{count}/{name}"


def _without_holdout(data: CalibrationData) -> CalibrationData:
    return replace(data.bare(), holdout=())
