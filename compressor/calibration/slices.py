"""Slices of the calibration examples as jobs: each worker runs the model forward and backward on its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from compressor.calibration.activation_cache import ActivationCache
from compressor.calibration.backward import BackwardPass
from compressor.calibration.calibration import Calibration, frozen
from compressor.calibration.examples import CalibrationData
from compressor.calibration.forward import cache_outputs
from compressor.calibration.prepare import collectors_of, modules_of, prepared
from compressor.calibration.settings import CalibrationSettings
from compressor.calibration.sums import SegmentSums
from compressor.data import Batch
from compressor.engine import Fingerprint, InProcess, Journal, Run
from compressor.measure.moments import InputSums, LayerSums, require_finite
from compressor.model import ModelFiles, evaluation_mode
from compressor.network import Layer
from compressor.torch_state import brought_to, neutral_torch_state

logger = logging.getLogger(__name__)


@contextmanager
def slices_in_workers(
    calibration: Calibration, files: ModelFiles | None, first: Batch
) -> Iterator[SlicesOnDisk | None]:
    """The sums over the slices of the fit examples, each formed by a job of the run's engine.

    None where this process forms them: where the run has no workers, these cannot read the model from files or do not
    see the folder of the run, there is only one slice, or all metrics are known.
    """
    run, count = calibration.run, calibration.segments.count
    known = all(calibration.cache.moments.knows(f"backward-{segment}") for segment in range(count))
    if files is None or known or isinstance(run.engine, InProcess) or len(calibration.slices) < 2:
        yield None
        return
    folder = calibration.cache.journal.folder("slices").absolute()  # workers may be at work in another one
    asked = [
        _SliceOfExamples(
            number=each.number,
            files=files,
            layers=tuple(calibration.layers.values()),
            data=_without_holdout(calibration.data),
            first=_bare(first),
            folder=folder,
            settings=calibration.settings,
            device=run.job_device,
            seed=run.seed,
        )
        for each in calibration.slices
    ]
    seen = []
    for done, sees_it in enumerate(run.engine.map(_formed, asked), start=1):
        seen.append(sees_it)
        run.report("run", done, len(asked) + count)
    with ExitStack() as stack:
        journals = []
        for own in asked if all(seen) else ():
            journals.append(own.opened())
            stack.callback(journals[-1].close)
        formed = SlicesOnDisk(calibration, journals)
        # On another machine there may be a folder of that name that is not this one.
        if not all(seen) or not formed.can_begin(count - 1):
            logger.warning(
                "the moments are taken in this process: not all workers see %s; give a work folder (`work_dir`) that"
                " all machines share",
                folder,
            )
            yield None
            return
        formed.take_outputs()
        yield formed
        for journal in journals:
            journal.remove()


@dataclass(frozen=True)
class _SliceOfExamples:
    """What a worker needs to form the sums over a slice of the fit examples, and the folder that it keeps them in."""

    number: int
    files: ModelFiles
    layers: Sequence[Layer]
    data: CalibrationData
    first: Batch
    folder: Path
    settings: CalibrationSettings
    device: torch.device
    seed: int

    def opened(self) -> Journal:
        """The journal of the slice, once a worker that died has let go of it."""
        return Journal.open(self.folder / str(self.number), Fingerprint(), option="work_dir", patience=60.0)


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
    if not asked.folder.is_dir():
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
        own = replace(whole, slices=(whole.slices[asked.number],), cache=cache)
        modules, collectors = modules_of(own), collectors_of(own)
        backward = BackwardPass(own, modules, collectors)
        order = list(reversed(range(own.segments.count)))
        done = next((place for place, each in enumerate(order) if not journal.holds(f"sums-{each}")), len(order))
        if done == len(order):
            return
        cache_outputs(own, ("fit",), modules)
        if done and not backward.can_begin(order[done]):
            done = 0
        with collectors.watching():
            for segment in order[done:]:
                journal.write(f"sums-{segment}", backward.sums(segment).tensors())
                backward.drop(segment)


class SlicesOnDisk:
    """The sums that workers have formed over the slices, added up in the order of these."""

    def __init__(self, calibration: Calibration, journals: Sequence[Journal]) -> None:
        self._calibration, self._journals = calibration, journals

    def sums(self, segment: int) -> SegmentSums:
        """Those of a segment, over the examples that are run backward."""
        return self._read(f"sums-{segment}", self._journals)

    def can_begin(self, segment: int) -> bool:
        """Whether a segment, of which later ones are done, can be the first that is asked for."""
        return all(each.holds(f"sums-{before}") for each in self._journals for before in range(segment + 1))

    def drop(self, segment: int) -> None:
        """Let go of what a segment was made of."""

    def take_outputs(self) -> None:
        """Take over what the workers kept when they ran the model forward."""
        calibration = self._calibration
        cache = calibration.cache
        for segment in range(calibration.segments.count):
            for own, journal in zip(calibration.slices, self._journals, strict=True):
                made = ActivationCache(calibration.run.device, journal).dense("fit", segment)
                for chunk in own.chunks:
                    cache.dense("fit", segment).take(chunk.batch, made)
            name = f"inputs-{segment}"
            inputs = self._read(name, [each for each in self._journals if each.holds(name)]).layers
            if inputs.inputs and not cache.has_inputs(segment):
                require_finite(calibration.layers, inputs)
                cache.write_inputs(segment, inputs.inputs)

    def _read(self, name: str, journals: Sequence[Journal]) -> SegmentSums:
        found = SegmentSums()
        for journal in journals:
            read = {key: brought_to(self._calibration.run.device, each) for key, each in journal.read(name).items()}
            found.add(SegmentSums.of(read))
        return found


def _without_holdout(data: CalibrationData) -> CalibrationData:
    return replace(data, fit=tuple(map(_bare, data.fit)), holdout=())


def _bare(batch: Batch) -> Batch:
    """A batch without what its loader gave, which may be anything."""
    return replace(batch, given=None)
