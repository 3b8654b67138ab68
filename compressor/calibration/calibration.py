"""What calibration knows of a model, and what the dense model's segments read and output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compressor.calibration.activation_cache import ActivationCache, CachedDecompositions
from compressor.calibration.criterion import UNITS, Criterion
from compressor.calibration.examples import CalibrationData, Chunk, Part, Slice
from compressor.calibration.segments import Segments, State
from compressor.calibration.settings import CalibrationSettings
from compressor.data import Batch
from compressor.engine import Run
from compressor.factorize import Metric, TiedMetric
from compressor.initial import InitialWeights
from compressor.lowrank import put_layer, start_matrix
from compressor.model import ModelFiles
from compressor.model.streaming import blocks_of, parameter_of
from compressor.network import Layer
from compressor.planning import LossUnit


@dataclass(frozen=True)
class Calibration:
    """A model, the calibration data, and what they say: metric and uses per prediction of the layers, by name.

    A layer that no example reached is in neither mapping. The `cache` holds the outputs of every segment of the dense
    model, and the second moments of the gradients at them. `decompositions` are those of the layers' matrices in their
    metrics, each there once it was asked for. The modules that are `replaced` run in the places of the model's own. The
    sums that moments are of are formed for one of the `slices` of the fit examples after the other.
    """

    model: nn.Module
    layers: Mapping[str, Layer]
    data: CalibrationData
    segments: Segments
    criterion: Criterion
    run: Run
    settings: CalibrationSettings
    cache: ActivationCache = field(repr=False)
    decompositions: CachedDecompositions = field(repr=False)
    slices: Sequence[Slice] = field(repr=False)
    first: Batch = field(repr=False)
    """A few of the examples, by which the segments were found."""
    metrics: Mapping[str, Metric | TiedMetric] = field(default_factory=dict)
    uses: Mapping[str, float] = field(default_factory=dict)
    replaced: Mapping[str, nn.Module] = field(default_factory=dict, repr=False)
    name: str = "dense"
    """What it is called in the journal, where all that follows from its metrics has names below."""
    initial: InitialWeights | None = field(default=None, repr=False)
    """The weights that training started from, where they are known."""
    files: ModelFiles | None = None
    """What other processes open the model from, where they can."""
    heads: frozenset[str] = frozenset()
    """Layers that output so many classes that of their gradients only the diagonal of the moment is used."""

    @property
    def unit(self) -> LossUnit:
        """The unit of losses."""
        return UNITS[self.criterion]

    def chunks(self, part: Part) -> list[Chunk]:
        """The batches of a part; of the fit examples those of its slices."""
        fit = [chunk for each in self.slices for chunk in each.chunks]
        return fit if part == "fit" else self.data.chunks(part)

    @contextmanager
    def running(self, segment: int) -> Iterator[nn.Module]:
        """The model with the modules that are `replaced`, as far as a segment runs them."""
        with with_layers(self.model, of_segment(self.segments, segment, self.replaced)) as model:
            yield model

    def weight(self, layer: Layer) -> Tensor:
        """The dense weight of a layer as it is stored, on the device, whether or not it is in memory."""
        return parameter_of(self.model, layer.module, layer.parameter).detach().to(self.run.device)

    def start(self, layer: Layer, share: float | None) -> Tensor | None:
        """What the pair of a layer that has a share of its initial weights is added to, as a `d_out x d_in` matrix in
        float64, read or drawn again. None without a share."""
        return start_matrix(layer, share, self.initial, device=self.run.device)


def dense_inputs(calibration: Calibration, segment: int, chunk: Chunk) -> State:
    """Inputs of a segment in the dense model; none for the first."""
    sources = calibration.segments.sources(segment)
    cached = calibration.cache
    return rows_of([cached.dense(chunk.part, source).read(chunk.batch)[place] for source, place in sources], chunk)


def dense_outputs(calibration: Calibration, segment: int, chunk: Chunk) -> State:
    """New outputs of a segment of the dense model."""
    segments = calibration.segments
    if segment == segments.count - 1 and segments.head is None:  # the predictions, which are not kept
        state = dense_inputs(calibration, segment, chunk)
        return segments.run(calibration.model, segment, calibration.data.read(chunk), state=state)
    return rows_of(calibration.cache.dense(chunk.part, segment).read(chunk.batch), chunk)


def of_segment(segments: Segments, index: int, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Of modules by their places those that a segment may run."""
    return {place: modules[place] for place in modules if segments.may_run(index, place)}


def rows_of(tensors: Sequence[Tensor], chunk: Chunk) -> State:
    """The rows of a chunk in tensors of its whole batch."""
    return tuple(tensors) if chunk.rows is None else tuple(each[chunk.rows] for each in tensors)


@contextmanager
def with_layers(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """Put other modules in their places in the model, by name, and the original ones back afterwards."""
    originals = {place: model.get_submodule(place) for place in modules}
    changed = model
    try:
        # A module that is replaced as a whole comes before the layers inside it.
        for place in sorted(modules, key=lambda name: name.count(".")):
            changed = put_layer(changed, place, modules[place])
        yield changed
    finally:
        for place, module in originals.items():
            put_layer(model, place, module)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Compute no gradients of the model's parameters."""
    blocks = blocks_of(model)
    # cuDNN runs recurrent layers backwards only in training mode.
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    with (
        nullcontext() if blocks is None else blocks.frozen(),
        torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext(),
    ):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield
        finally:  # before the blocks, whose matrices in memory become what is in their places otherwise
            for parameter in trained:
                parameter.requires_grad_(True)
