"""The factors of one segment after another fitted to the outputs of the dense segment, by gradient descent.

Compensation solves for one layer at a time, and for what is linear in it; the refinement moves all factors of a segment
together, through its nonlinearities, on the inputs that it gets in the compressed model. It overfits a little data
within a few passes, so a pass that does not lower the holdout error is undone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compressor.calibration.activation_cache import CachedFactors
from compressor.calibration.calibration import Calibration, dense_outputs, frozen, rows_of
from compressor.calibration.criterion import hidden_rows
from compressor.calibration.examples import Chunk
from compressor.calibration.fitted_weights import FittedWeight, fitted_weights
from compressor.calibration.holdout import cost_of_predictions
from compressor.calibration.replacements import Compensated
from compressor.calibration.segments import State
from compressor.calibration.settings import RefinementSettings
from compressor.calibration.walk import Kept, Walk
from compressor.lowrank import join
from compressor.model import evaluation_mode
from compressor.system_errors import is_out_of_memory

logger = logging.getLogger(__name__)


class Fit(Protocol):
    """A way to fit modules in place; returns whether their holdout error fell."""

    def __call__(
        self,
        modules: Mapping[str, nn.Module],
        losses: Sequence[Callable[[], Tensor]],
        holdout_error: Callable[[], float],
        *,
        seed: int,
        settings: RefinementSettings,
    ) -> bool: ...


def fit_to_dense(
    modules: Mapping[str, nn.Module],
    losses: Sequence[Callable[[], Tensor]],
    holdout_error: Callable[[], float],
    *,
    seed: int,
    settings: RefinementSettings,
) -> bool:
    """Fit the modules' parameters in place, and leave them at the least holdout error; whether it fell.

    Each of `losses` is that of some fit examples, and `holdout_error` is computed after each pass over all of them;
    only their ratio to the first error counts. Adam (Kingma and Ba, ICLR 2015) in float32 or wider.
    """
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    if not parameters:  # of what training wrote nothing may be stored
        return False
    started = holdout_error()
    if not 0 < started < math.inf:
        return False
    masters = [each.detach().to(torch.promote_types(each.dtype, torch.float32), copy=True) for each in parameters]
    kept, least, rate = [master.clone() for master in masters], started, settings.learning_rate
    generator = torch.Generator().manual_seed(seed)
    scales, signed = _of_quantized(modules.values(), parameters)
    steps = settings.passes * len(losses)

    def optimized() -> torch.optim.Adam:
        return adam(masters, rate, settings, scales=scales, signed=signed, steps=steps)

    optimizer = optimized()
    with _trainable(parameters):
        try:
            for done in range(settings.passes):
                for count, index in enumerate(torch.randperm(len(losses), generator=generator).tolist()):
                    gradients = _gradients(losses[index], parameters, started)
                    for master, gradient, group in zip(masters, gradients, optimizer.param_groups, strict=True):
                        master.grad = None if gradient is None else gradient.to(master.dtype)
                        group["lr"] = group["initial_lr"] * (1 - (done + count / len(losses)) / settings.passes)
                    optimizer.step()
                    _put(parameters, masters)
                error = holdout_error()
                if error < least:
                    kept, least = [master.clone() for master in masters], error
                    continue
                rate *= settings.learning_rate_cut
                masters = [each.clone() for each in kept]
                optimizer = optimized()
                _put(parameters, masters)
        finally:
            _put(parameters, kept)
    return least < started


def refine(
    calibration: Calibration, start: Compensated, name: str = "refine", *, fit: Fit = fit_to_dense
) -> Compensated:
    """Fit the low-rank layers of `start`, a segment at a time, in the metric of the loss; `start` stays as it is.

    `name` is that of the plan in the journal.

    Embeddings, bare parameters, and layers that the first calibration batch does not reach are not fitted, nor is a
    segment whose holdout error does not fall, or that cannot be differentiated with respect to its factors.
    """
    layers = {
        calibration.layers[name].module: calibration.layers[name]
        for name in start.factors
        if calibration.layers[name].kind not in ("embedding", "parameter")
    }
    left = set(layers)
    factors = CachedFactors(calibration.run.device, calibration.run.journal.temporary(), start.factors)
    with evaluation_mode(calibration.run.device, calibration.model), frozen(calibration.model):
        walk = Walk(calibration, start.modules, name=name)

        def take_copies(places: Sequence[str]) -> None:
            own = {each: walk.placed[each] for place in places for each in (place, *layers[place].places)}
            walk.placed.update(deepcopy(own))

        for segment in range(calibration.segments.count):
            if (kept := walk.kept_before()) is not None:
                left -= set(kept.places)
                for each, tensors in kept.factors.items():
                    factors.put(each, tensors)
                    place = calibration.layers[each].module
                    take_copies([place])
                    _put_state(walk.placed[place], each, factors[each])
                walk.skip()
                continue
            places = [place for group in walk.groups(left) for place in group]
            left -= set(places)
            fitted: dict[str, Mapping[str, Tensor]] = {}
            take_copies(places)
            if _fit(walk, {place: walk.placed[place] for place in places}, fit):
                fitted = dict(_state(layers[place].name, walk.placed[place]) for place in places)
            for each, tensors in fitted.items():
                factors.put(each, tensors)
            walk.advance(partial(Kept, fitted, places=places))
            calibration.run.report("refine", segment + 1, calibration.segments.count)
    return Compensated(start.modules.with_factors(factors))


def _state(name: str, module: nn.Module) -> tuple[str, dict[str, Tensor]]:
    """The tensors of a low-rank layer by their names in a file."""
    return name, {join(name, key): each for key, each in module.state_dict().items()}


def _put_state(module: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    module.load_state_dict({key: tensors[join(name, key)] for key in module.state_dict()})


def _fit(walk: Walk, inside: Mapping[str, nn.Module], fit: Fit) -> bool:
    """Fit the modules inside the segment, in place; whether they lose less."""
    if not inside:
        return False
    costs = _SegmentCosts(walk)
    run, settings = walk.calibration.run, walk.calibration.settings.refinement
    chunks = walk.calibration.data.chunks("fit")[:: walk.calibration.settings.refit_every]
    losses = [partial(costs.mean, part) for chunk in chunks for part in costs.parts(chunk)]
    try:
        with fitted_weights(inside.values(), rounding=settings.rounding):
            return fit(inside, losses, costs.holdout_error, seed=run.seed, settings=settings)
    except RuntimeError as error:  # such as for a tensor that is changed in place after a layer took it
        if is_out_of_memory(error):
            raise
        logger.warning("the factors of segment %d are not fitted: %s", walk.segment, error)
        return False


class _SegmentCosts:
    """Costs of the compressed segment that a walk is at, against the dense one.

    Where a segment has two new outputs their costs are added, as if the gradients of one told nothing of the other's.
    """

    def __init__(self, walk: Walk) -> None:
        self._walk, self._calibration = walk, walk.calibration
        boundary = () if walk.last else walk.calibration.cache.boundary(walk.segment)
        self._metrics = [each.float().to(walk.calibration.run.device) for each in boundary]

    def mean(self, chunk: Chunk) -> Tensor:
        """Mean cost over the rows of a chunk."""
        total, count = self._sum(chunk)
        return total / max(count, 1)  # an example may be all padding

    @torch.no_grad()
    def holdout_error(self) -> float:
        """Mean cost over the holdout."""
        chunks = self._calibration.data.chunks("holdout")[:: self._calibration.settings.refit_every]
        costs = [self._sum(chunk) for chunk in chunks]
        return float(sum(each for each, _ in costs)) / sum(rows for _, rows in costs)

    @torch.no_grad()
    def parts(self, batch: Chunk) -> list[Chunk]:
        """A fit batch in parts of a few examples."""

        def alone(part: Chunk) -> State:
            return self._calibration.segments.new_outputs(self._walk.segment, self._walk.run_dense(part))

        return in_parts(self._calibration, batch, together=self._dense, alone=alone)

    def _sum(self, chunk: Chunk) -> tuple[Tensor, int]:
        """The cost summed over the rows of a chunk, and their number."""
        after = self._calibration.segments.new_outputs(self._walk.segment, self._walk.run_compressed(chunk))
        if self._walk.last:
            return cost_of_predictions(self._calibration, chunk, after[0], modules=self._walk.placed)
        masks, before = self._calibration.data.read(chunk).masks, self._dense(chunk)
        changes = [hidden_rows(b, masks) - hidden_rows(a, masks) for a, b in zip(before, after, strict=True)]
        costs = [(change @ metric * change).sum() for change, metric in zip(changes, self._metrics, strict=True)]
        return torch.stack(costs).sum(), len(changes[0])

    @torch.no_grad()
    def _dense(self, chunk: Chunk) -> State:
        """New outputs of the dense segment."""
        return dense_outputs(self._calibration, self._walk.segment, chunk)


def in_parts(
    calibration: Calibration, batch: Chunk, *, together: Callable[[Chunk], State], alone: Callable[[Chunk], State]
) -> list[Chunk]:
    """A fit batch in parts of a few examples, so that a pass over all batches has the steps that are wanted.

    The batch as a whole where the outputs of the dense model for some examples `alone` are not those of all `together`:
    rows may be something else than examples, or depend on each other.
    """
    data, steps = calibration.data, calibration.settings.refinement.steps
    examples = data.read(batch).examples
    fitted = data.examples // calibration.settings.refit_every
    count = math.ceil(examples / max(1, fitted // steps))
    edges = [examples * part // count for part in range(count + 1)]
    parts = [replace(batch, rows=slice(start, end)) for start, end in pairwise(edges)]
    if count == 1:
        return [batch]
    last, outputs = parts[-1], together(batch)
    try:
        pairs = list(zip(alone(last), rows_of(outputs, last), strict=True))
    except Exception:
        return [batch]
    return parts if all(_same_examples(*pair, edges[-1] - edges[-2]) for pair in pairs) else [batch]


def _same_examples(alone: Tensor, together: Tensor, examples: int) -> bool:
    if not alone.shape == together.shape == (examples, *together.shape[1:]):
        return False
    tolerance = math.sqrt(torch.finfo(alone.dtype).eps) * float(together.abs().max())
    return torch.allclose(alone, together, rtol=0, atol=tolerance)


@torch.enable_grad()
def _gradients(loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter], scale: float) -> Sequence[Tensor | None]:
    """Gradients of a loss in units of `scale`; None for parameters that it does not depend on."""
    value = loss() / scale
    if not value.requires_grad:
        return [None] * len(parameters)
    return torch.autograd.grad(value, parameters, allow_unused=True)


def adam(
    masters: Sequence[Tensor],
    rate: float,
    settings: RefinementSettings,
    *,
    scales: Collection[int] = (),
    signed: Collection[int] = (),
    steps: int = 1,
) -> torch.optim.Adam:
    """Adam with learning rates relative to the root mean square of each tensor.

    Those at the places of `scales` have the rate of their own in proportion. Those that are `signed`, offsets of
    roundings, are moved by the sign of the gradient, in all `steps` together by the reach that they have.
    """
    groups: list[dict[str, Any]] = []
    share = rate / settings.learning_rate
    for place, each in enumerate(masters):
        if place in signed:
            # Adam without memory.
            own, how = 2 * settings.rounding_reach / steps * share, {"betas": (0.0, 0.0)}
        else:
            relative = share * settings.scales_learning_rate if place in scales else rate
            own, how = relative * float(each.square().mean().sqrt()), {}
        groups.append({"params": [each], "lr": own, "initial_lr": own, **how})
    return torch.optim.Adam(groups, betas=settings.betas)


def _of_quantized(modules: Iterable[nn.Module], parameters: Sequence[nn.Parameter]) -> tuple[set[int], set[int]]:
    """The places of the scales, and of the offsets of roundings, among the parameters."""
    fitted = [each for module in modules for each in module.modules() if isinstance(each, FittedWeight)]
    places = {id(parameter): place for place, parameter in enumerate(parameters)}
    offsets = {places[id(each.offsets)] for each in fitted if each.offsets is not None}
    return {places[id(each.scales)] for each in fitted}, offsets


@torch.no_grad()
def _put(parameters: list[nn.Parameter], masters: list[Tensor]) -> None:
    for parameter, master in zip(parameters, masters, strict=True):
        parameter.copy_(master)


@contextmanager
def _trainable(parameters: list[nn.Parameter]) -> Iterator[None]:
    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)
