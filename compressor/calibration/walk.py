"""The compressed model, walked a segment at a time beside the dense one."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compressor.calibration.calibrate import Calibration, dense_inputs, rows_of, with_layers
from compressor.calibration.examples import PARTS, Chunk
from compressor.calibration.segments import State
from compressor.measure.moments import patches


@dataclass
class Walk:
    """A model that is compressed on the way: the modules that are replaced so far, and the segment that comes next.

    The inputs of that segment, in the model compressed so far, are in the calibration's cache.
    """

    calibration: Calibration
    modules: dict[str, nn.Module] = field(default_factory=dict)
    segment: int = 0

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
        inputs = calibration.cache.compressed(chunk.part).read(chunk.batch) if self.segment > 0 else ()
        batch = calibration.data.read(chunk)
        with with_layers(calibration.model, self.modules) as model:
            return calibration.segments.run(model, self.segment, batch, state=rows_of(inputs, chunk))

    def advance(self) -> None:
        """Go on to the next segment: cache its inputs in the model compressed so far."""
        if not self.last:
            for chunk in self.calibration.data.chunks(*PARTS):
                self.calibration.cache.compressed(chunk.part).write(chunk.batch, self.run_compressed(chunk))
        self.segment += 1

    def groups(self, places: Iterable[str]) -> list[list[str]]:
        """Modules, of those at some places, that the segment runs, in order; those with one input are a group.

        Every batch normalization is a group of its own.
        """
        model = self.calibration.model
        groups: dict[Any, list[str]] = {}
        inputs: list[Tensor] = []  # kept, so that an address stands for one tensor

        def note(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], *, place: str) -> None:
            x = arguments[0] if arguments else next(iter(named.values()))
            inputs.append(x)
            alone = place if isinstance(layer, _BatchNorm) else None
            if not any(place in group for group in groups.values()):
                groups.setdefault((id(x), x._version, patches(layer), alone), []).append(place)

        with ExitStack() as stack:
            for place in places:
                hook = partial(note, place=place)
                stack.callback(model.get_submodule(place).register_forward_pre_hook(hook, with_kwargs=True).remove)
            self.run_dense(Chunk("fit", 0))
        return list(groups.values())
