"""The weights that training started from, and what a layer still has of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from compressor.documents import read_json
from compressor.errors import BadInput
from compressor.initial.draws import Draws
from compressor.initial.fingerprint import Fingerprint
from compressor.initial.recording import record
from compressor.io import (
    Checkpoint,
    StoredTensor,
    TensorInMemory,
    local_model,
    open_checkpoint,
    refuse_adapter,
    refuse_fp8,
)
from compressor.measure.memory_window import memory_window, retention
from compressor.measure.window_between import Window, window_between
from compressor.network import Architecture, Layer
from compressor.recipe import TrainingRecipe
from compressor.torch_state import float64_device

logger = logging.getLogger(__name__)

LEAST_Z = 8.0
"""The correlation of a layer with its start, in standard deviations of chance: a hit from here on."""

# The remainder after the predicted share may be larger than after the fit by this share of it.
_CLEARLY_WORSE = 0.01


@dataclass(frozen=True)
class Start:
    """How a layer's weights correlate with its initial ones: `W = share * W_0 + what training wrote`.

    Attributes:
        correlation: Of the layer's numbers with its initial ones.
        z: The correlation times the square root of the count of numbers: of two random matrices about 1.
        predicted: The share that weight decay left by the layer's own recipe, exp(-K); None where that is not known.
        fitted: The share by least squares; in the metric of the loss where there is one.
        share: The one that is used: predicted where the recipe is known and leaves no more to write than the fit does
            by 1 %, else fitted.
        written: The norm of what training wrote beside that of the layer.
        rank_bound: The bound on the rank of what training wrote, `B R T`; None where it is vacuous.
    """

    correlation: float
    z: float
    predicted: float | None
    fitted: float
    share: float
    written: float
    rank_bound: int | None = None


@dataclass(frozen=True, eq=False)
class InitialWeights:
    """The initial weights of a model, which are read or drawn a tensor at a time.

    Attributes:
        source: What it is called in messages.
        tensors: Where the initial tensors are, by their names in the module's state.
        checkpoint_name: The name of the checkpoint that they were read from.
        digest: The SHA-256 of that checkpoint.
        draws: The draws that make them again; None where they were read.
        steps: The optimizer steps that had been taken: 0 of the start of a training, more of an early checkpoint.
    """

    source: str
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    checkpoint_name: str | None = None
    digest: str | None = None
    draws: Draws | None = field(default=None, repr=False)
    steps: int = 0
    _fingerprints: dict[str, Fingerprint] = field(default_factory=dict, init=False, repr=False)

    @property
    def seed(self) -> int | None:
        """The seed that they are drawn from; None where they are read."""
        return None if self.draws is None else self.draws.seed

    def read(self, name: str) -> Tensor | None:
        """The initial tensor of a name in the module's state; None where there is none."""
        return self.tensors[name].read() if name in self.tensors else None

    def fingerprint(self, name: str) -> Fingerprint | None:
        """What a tensor is checked by, which is read once for it; None where there is none."""
        if name not in self._fingerprints and (tensor := self.read(name)) is not None:
            self._fingerprints[name] = Fingerprint.of(tensor)
        return self._fingerprints.get(name)

    @classmethod
    def from_seed(cls, build: Callable[[], nn.Module], seed: int) -> InitialWeights:
        """What a model's own code draws after its seed was set, as `transformers.set_seed` sets it.

        Args:
            build: Builds the untrained model.
            seed: The seed of Python's, NumPy's and PyTorch's generators, which are restored afterwards.

        Returns:
            The initial weights, as far as their draws can be recorded; a tensor is drawn when it is read. Experts also
            have the names that they have when they are separate.

        Raises:
            BadInput: no generator takes the seed.
        """
        recorded = record(build, seed)
        matrices = {name for name, each in recorded.module.named_parameters() if each.dim() >= 2}
        if lost := sorted(matrices & recorded.unrecorded):
            logger.warning(
                "how %s and %d others are initialized cannot be recorded: they are taken to have no start",
                lost[0],
                len(lost) - 1,
            )
        return cls.from_draws(recorded.draws)

    @classmethod
    def from_draws(cls, draws: Draws) -> InitialWeights:
        """What a record of draws gives, such as that of a seed that was found; a tensor is drawn when it is read."""
        return cls(f"seed {draws.seed}", {name: _DrawnTensor(draws, name) for name in draws.names}, draws=draws)

    @classmethod
    def from_checkpoint(
        cls, model: str | Path | nn.Module | Checkpoint, architecture: Architecture | None = None
    ) -> InitialWeights:
        """The weights of a checkpoint of the initial model, or of an early step; read tensor by tensor.

        Args:
            model: A file, a folder, the name of a model of the hub, a module, or what was opened of one.
            architecture: What its tensors are called in the module; None where they have the same names.

        Raises:
            BadInput: it cannot be read, or is an adapter or of 8-bit floats.
        """
        checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(local_model(model))
        refuse_adapter(checkpoint)
        refuse_fp8(checkpoint)
        tensors: dict[str, StoredTensor] = {}
        for name in (*checkpoint.tensors, *checkpoint.aliases):
            in_module = name if architecture is None else architecture.module_name(name)
            if in_module is not None:
                tensors.setdefault(in_module, checkpoint.stored(name))
        digest = None if checkpoint.source is None else checkpoint.digest()
        steps = _steps_taken(checkpoint.directory)
        return cls(checkpoint.name, tensors, checkpoint_name=checkpoint.name, digest=digest, steps=steps)

    @classmethod
    def from_state(
        cls, state: Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]], *, source: str = "the initial state"
    ) -> InitialWeights:
        """The weights of a state dict, or of a function that returns one.

        Raises:
            BadInput: what was given, or what the function returns, is no state dict.
        """
        known = _checked_state(state() if callable(state) else state, source)
        return cls(source, {name: TensorInMemory(tensor) for name, tensor in known.items()})


@dataclass(frozen=True, eq=False)
class _DrawnTensor:
    """An initial tensor that is drawn whenever it is read."""

    draws: Draws
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.draws.tensors[self.name].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.draws.registers[self.draws.tensors[self.name].register].dtype

    @property
    def region(self) -> Hashable:
        return self.draws.tensors[self.name]

    def read(self) -> Tensor:
        return self.draws.tensor(self.name)


def _steps_taken(folder: Path | None) -> int:
    """The steps before a checkpoint of transformers' `Trainer`, as it states beside it; 0 where nothing is stated."""
    state = None if folder is None else folder / "trainer_state.json"
    if state is None or not state.is_file():
        return 0
    try:
        steps = read_json(state).get("global_step")
    except BadInput:
        return 0
    return steps if type(steps) is int and steps > 0 else 0


def _checked_state(state: object, source: str) -> Mapping[str, Tensor]:
    remedy = "give what `state_dict()` of the untrained model returns"
    if not isinstance(state, Mapping):
        raise BadInput(f"{source} is a {type(state).__name__}, not a state dict", option="initial", remedy=remedy)
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    if not tensors:
        raise BadInput(f"{source} holds no tensors", option="initial", remedy=remedy)
    return tensors


def initial_name(layer: Layer) -> str:
    """What the weight of a layer is called in the state of the model's module."""
    return f"{layer.module}.{layer.parameter}".lstrip(".")


def initial_tensor(layer: Layer, initial: InitialWeights) -> Tensor | None:
    """The initial weight of a layer, in the shape that it has in the checkpoint; None where there is none."""
    name = initial_name(layer)
    found = initial.read(name)
    if found is None and name != layer.tensor:
        found = initial.read(layer.tensor)
    fits = found is not None and tuple(found.shape) == layer.tensor_shape and found.is_floating_point()
    return found if fits else None


def starts_of(
    layers: Iterable[Layer],
    checkpoint: Checkpoint,
    initial: InitialWeights,
    *,
    recipe: TrainingRecipe | None = None,
    uses: Mapping[str, int | None] | None = None,
) -> dict[str, Start]:
    """What each layer still has of its initial weights; only the layers that correlate with them.

    Args:
        layers: The layers of a trained model.
        checkpoint: Their weights.
        initial: The weights that training may have started from.
        recipe: How the model was trained over the whole run; None predicts no share.
        uses: How often one example uses a layer, by the layer's name, for the bound on the rank.

    Returns:
        The start of each layer with `z` of at least 8, by the layer's name.
    """
    found: dict[str, Start] = {}
    for layer in layers:
        drawn = initial_tensor(layer, initial)
        if drawn is None:
            continue
        window = _window(layer, recipe, uses=(uses or {}).get(layer.name), steps=initial.steps)
        start = start_of(checkpoint.read(layer.tensor), drawn, predicted=window.share)
        if start is not None:
            # The bound holds for the rest after the predicted share alone.
            bound = window.rank_bound if start.share == start.predicted else None
            found[layer.name] = replace(start, rank_bound=bound)
    return found


def _window(layer: Layer, recipe: TrainingRecipe | None, *, uses: int | None, steps: int) -> Window:
    """What the recipe says of a layer since its initial weights, which were those after so many steps."""
    if recipe is None:
        return Window()
    own, uses = recipe.of_parameter(layer.tensor), None if layer.is_tied else uses
    if steps > 0:
        return window_between(own, layer.shape, uses, earlier=steps, later=own.total_steps or 0)
    bound = None if layer.is_tied else memory_window(own, layer.block_shape, uses).learned_rank_bound
    return Window(share_left(own), bound if bound is not None and bound < min(layer.shape) else None)


def start_of(
    weight: Tensor,
    initial: Tensor,
    *,
    predicted: float | None = None,
    in_metric: Callable[[Tensor], Tensor] | None = None,
) -> Start | None:
    """What a weight still has of its initial one; None where they do not correlate.

    Args:
        weight: The trained weight, of any shape.
        initial: The initial one, of the same shape.
        predicted: The share that its recipe predicts (`share_left`); None where it is not known.
        in_metric: Maps a weight linearly to where Euclidean distance is that of the loss, for the fit; None is the
            Frobenius norm.

    Returns:
        The start, where the correlation stands at least 8 standard deviations above chance. The share is the predicted
        one unless its remainder is more than 1 % larger than that of the fit, or the recipe does not tell it.
    """
    device = float64_device(weight.device)
    trained, drawn = (each.detach().to(device).to(torch.float64) for each in (weight, initial))
    correlation = correlation_of(trained, drawn)
    z = correlation * math.sqrt(trained.numel())
    if not z >= LEAST_Z:
        return None
    mapped = (trained, drawn) if in_metric is None else (in_metric(trained), in_metric(drawn))
    fitted = fitted_share(*mapped)
    share = fitted
    if predicted is not None and _remainder(mapped, predicted) <= (1 + _CLEARLY_WORSE) * _remainder(mapped, fitted):
        share = predicted
    norm = float(trained.norm())
    return Start(correlation, z, predicted, fitted, share, written=_remainder((trained, drawn), share) / norm)


def correlation_of(first: Tensor, second: Tensor) -> float:
    """The correlation of two tensors' numbers, their means subtracted; 0 where one of them is constant."""
    one, two = first - first.mean(), second - second.mean()
    norms = float(one.norm()) * float(two.norm())
    product = float(torch.dot(one.flatten(), two.flatten()))
    return product / norms if norms > 0 and math.isfinite(norms) else 0.0


def fitted_share(weight: Tensor, initial: Tensor) -> float:
    """The share a that makes `||W - a W_0||` least: `<W, W_0> / ||W_0||^2`; of tensors in any metric."""
    one, two = weight.flatten(), initial.flatten()
    return float(torch.dot(one, two) / torch.dot(two, two))


def _remainder(pair: tuple[Tensor, Tensor], share: float) -> float:
    """The norm of `W - share * W_0`."""
    weight, initial = pair
    return float(torch.sub(weight, initial, alpha=share).norm())


@lru_cache(maxsize=64)
def share_left(recipe: TrainingRecipe) -> float | None:
    """How much of the start is left in a matrix, `p_T`; None where the recipe does not tell."""
    if recipe.weight_decay == 0:
        return 1.0
    with suppress(BadInput):
        return retention(recipe, recipe.total_steps or 1).weights
    return None
