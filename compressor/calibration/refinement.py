"""The factors of one segment after the other fitted to what the dense segment puts out, by gradient descent.

Compensation solves for one layer at a time and for what is linear in it; the fit moves all factors of a segment
together, through its nonlinearities, on the inputs that the compressed model gives it. It overfits a little data within
a few passes, so a pass after which the holdout examples lose more is undone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from compressor.calibration.calibrate import Calibration, frozen, made_by
from compressor.calibration.compensation import Compensated, advance, batches_of, groups_run, run_segment
from compressor.calibration.criterion import divergence, hidden_rows
from compressor.calibration.segments import State
from compressor.lowrank import join
from compressor.model import evaluation_mode
from compressor.progress import Progress

# Adam's first step, relative to the root mean square of each tensor; it falls to nothing over the passes, and is cut
# where a pass does not help.
STEP = 1e-2
CUT = 0.3
PASSES = 8

# Steps in a pass over the fit examples, at least, where there are as many of these.
STEPS = 16

ALL = slice(None)  # the rows of a batch

logger = logging.getLogger(__name__)


def refine(calibration: Calibration, start: Compensated, progress: Progress | None = None) -> Compensated:
    """The low-rank layers of `start` fitted, a segment at a time, in the metric of the loss; `start` stays as it is.

    Embeddings, the parameters of modules, and layers that the first calibration batch does not reach are not fitted,
    nor is a segment whose holdout error does not fall, or that cannot be differentiated in its factors.
    """
    layers = {
        calibration.layers[name].module: calibration.layers[name]
        for name in start.factors
        if calibration.layers[name].kind not in ("embedding", "parameter")
    }
    left = set(layers)
    own = {place: start.modules[place] for layer in layers.values() for place in (layer.module, *layer.places)}
    modules = {**start.modules, **deepcopy(own)}
    factors = dict(start.factors)
    with evaluation_mode(calibration.device, calibration.model), frozen(calibration.model):
        for segment in range(calibration.segments.count):
            places = [place for group in groups_run(calibration, segment, left) for place in group]
            left -= set(places)
            if _fit_segment(calibration, segment, modules, {place: modules[place] for place in places}):
                for place in places:
                    name = layers[place].name
                    factors[name] = {join(name, key): each for key, each in modules[place].state_dict().items()}
            if segment < calibration.segments.count - 1:
                advance(calibration, segment, modules)
            if progress:
                progress("refine", segment + 1, calibration.segments.count)
    return Compensated(factors, modules)


def _fit_segment(
    calibration: Calibration, segment: int, modules: Mapping[str, nn.Module], inside: Mapping[str, nn.Module]
) -> bool:
    """Fit the modules inside a segment, in place; whether they lose less."""
    if not inside:
        return False
    losses, holdout_error = _costs(calibration, segment, modules)
    try:
        return fit_to_dense(inside, losses, holdout_error, calibration.seed)
    except RuntimeError as error:  # such as for what is changed in place after a layer took it
        logger.warning("the factors of segment %d are not fitted: %s", segment, error)
        return False


def _costs(
    calibration: Calibration, segment: int, modules: Mapping[str, nn.Module]
) -> tuple[list[Callable[[], Tensor]], Callable[[], float]]:
    """The mean cost of a compressed segment against the dense one: of some fit examples each, and of the holdout.

    Where a segment makes two tensors their costs are added, as if the gradients of one told nothing of the other's.
    """
    last = segment == calibration.segments.count - 1
    cache, device, segments = calibration.cache, calibration.device, calibration.segments
    metrics = [] if last else [each.float() for each in cache.row(("boundary", segment), device)]

    @torch.no_grad()
    def target(part: str, index: int, rows: slice) -> State:
        if last:
            return run_segment(calibration, segment, part, index, {}, rows)
        return tuple(each[rows] for each in made_by(calibration, part, segment, index))

    def cost(part: str, index: int, rows: slice) -> tuple[Tensor, int]:
        masks = batches_of(calibration, part)[index][rows].masks
        before = target(part, index, rows)
        after = segments.made_by(segment, run_segment(calibration, segment, part, index, modules, rows))
        if last:
            return divergence(before[0], after[0], masks, calibration.criterion)
        changes = [hidden_rows(b, masks) - hidden_rows(a, masks) for a, b in zip(before, after, strict=True)]
        costs = [(change @ metric * change).sum() for change, metric in zip(changes, metrics, strict=True)]
        return torch.stack(costs).sum(), len(changes[0])

    def mean_cost(index: int, rows: slice) -> Tensor:
        total, count = cost("fit", index, rows)
        return total / max(count, 1)  # an example may be all padding

    @torch.no_grad()
    def holdout_error() -> float:
        costs = [cost("holdout", index, ALL) for index in range(len(calibration.data.holdout))]
        return float(sum(each for each, _ in costs)) / sum(rows for _, rows in costs)

    losses: list[Callable[[], Tensor]] = [
        partial(mean_cost, index, rows)
        for index in range(len(calibration.data.fit))
        for rows in _parts(calibration, segment, index, target("fit", index, ALL))
    ]
    return losses, holdout_error


@torch.no_grad()
def _parts(calibration: Calibration, segment: int, index: int, outputs: State) -> list[slice]:
    """Some examples of a fit batch at a time, for `STEPS` steps in a pass over all.

    All at once where the dense segment does not put out the same `outputs` for some of them: rows may be something else
    than examples, or depend on each other.
    """
    batch = calibration.data.fit[index]
    count = math.ceil(batch.examples / max(1, calibration.data.examples // STEPS))
    edges = [batch.examples * part // count for part in range(count + 1)]
    slices = [slice(start, end) for start, end in pairwise(edges)]
    if count == 1:
        return slices
    rows = slices[-1]
    try:
        alone = run_segment(calibration, segment, "fit", index, {}, rows)
        pairs = list(zip(calibration.segments.made_by(segment, alone), (each[rows] for each in outputs), strict=True))
    except Exception:
        return [ALL]
    return slices if all(_same_examples(*pair, rows.stop - rows.start) for pair in pairs) else [ALL]


def _same_examples(alone: Tensor, together: Tensor, examples: int) -> bool:
    if not alone.shape == together.shape == (examples, *together.shape[1:]):
        return False
    tolerance = math.sqrt(torch.finfo(alone.dtype).eps) * float(together.abs().max())
    return torch.allclose(alone, together, rtol=0, atol=tolerance)


def fit_to_dense(
    modules: Mapping[str, nn.Module],
    losses: Sequence[Callable[[], Tensor]],
    holdout_error: Callable[[], float],
    seed: int,
) -> bool:
    """Fit the modules' parameters in place, and leave them at the least error on holdout data; whether that fell.

    `losses` gives that of some of the fit examples each, and `holdout_error` the error after each pass over these; only
    their ratio to the first error counts. Adam (Kingma and Ba, ICLR 2015) in float32 or wider.
    """
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    started = holdout_error()
    if not 0 < started < math.inf:
        return False
    masters = [each.detach().to(torch.promote_types(each.dtype, torch.float32), copy=True) for each in parameters]
    kept, least, step = [master.clone() for master in masters], started, STEP
    generator = torch.Generator().manual_seed(seed)
    optimizer = adam(masters, step)
    with _trainable(parameters):
        try:
            for done in range(PASSES):
                for count, index in enumerate(torch.randperm(len(losses), generator=generator).tolist()):
                    gradients = _gradients(losses[index], parameters, started)
                    for master, gradient, group in zip(masters, gradients, optimizer.param_groups, strict=True):
                        master.grad = None if gradient is None else gradient.to(master.dtype)
                        group["lr"] = group["initial_lr"] * (1 - (done + count / len(losses)) / PASSES)
                    optimizer.step()
                    _put(parameters, masters)
                error = holdout_error()
                if error < least:
                    kept, least = [master.clone() for master in masters], error
                    continue
                step *= CUT
                masters = [each.clone() for each in kept]
                optimizer = adam(masters, step)
                _put(parameters, masters)
        finally:
            _put(parameters, kept)
    return least < started


@torch.enable_grad()
def _gradients(loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter], scale: float) -> Sequence[Tensor | None]:
    """Those of a loss in units of `scale`; None for what has no effect on it."""
    value = loss() / scale
    if not value.requires_grad:
        return [None] * len(parameters)
    return torch.autograd.grad(value, parameters, allow_unused=True)


def adam(masters: list[Tensor], step: float) -> torch.optim.Adam:
    """Adam with steps relative to the root mean square of each tensor."""
    groups = []
    for each in masters:
        rate = step * float(each.square().mean().sqrt())
        groups.append({"params": [each], "lr": rate, "initial_lr": rate})
    return torch.optim.Adam(groups, betas=(0.9, 0.99))


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
