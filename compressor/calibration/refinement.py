"""The factors of one segment after the other fitted to what the dense segment puts out, by gradient descent.

Compensation solves for one layer at a time and for what is linear in it; the fit moves all factors of a segment
together, through its nonlinearities, on the inputs that the compressed model gives it. It overfits a little data within
a few passes, so a pass after which the examples held back lose more is undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from compressor.calibration.calibrate import Calibration, entering, frozen
from compressor.calibration.compensation import ALL, Compensated, advance, batches_of, groups_run, run_segment
from compressor.calibration.criterion import divergence, hidden_rows
from compressor.evaluation import prepared
from compressor.inspection import Progress
from compressor.rewrite import join

# Adam's first step, relative to the root mean square of each tensor; it falls to nothing over the passes, and is cut
# where a pass does not help.
STEP = 1e-2
CUT = 0.3
PASSES = 8

# Steps in a pass over the fitted examples, where there are as many of these.
STEPS = 16


def refine(calibration: Calibration, start: Compensated, progress: Progress | None = None) -> Compensated:
    """The low-rank layers of `start` fitted, a segment at a time, in the metric of the loss; `start` stays as it is.

    Embeddings and the parameters of modules are not fitted, nor is a segment whose error held back does not fall.
    """
    names = {
        calibration.layers[name].module: name
        for name in start.factors
        if calibration.layers[name].kind not in ("embedding", "parameter")
    }
    left = set(names)
    modules = deepcopy(dict(start.modules))
    factors = dict(start.factors)
    with prepared(calibration.device, calibration.model), frozen(calibration.model):
        for segment in range(calibration.segments.count):
            places = [place for group in groups_run(calibration, segment, left) for place in group]
            left -= set(places)
            inside = {place: modules[place] for place in places}
            losses, held_back_error = _costs(calibration, segment, modules)
            if inside and fit_to_dense(inside, losses, held_back_error, calibration.seed):
                for place in places:
                    name, tensors = names[place], modules[place].state_dict()
                    fitted = {join(name, key): tensor for key, tensor in tensors.items()}
                    factors[name] = replace(factors[name], tensors=fitted)
            if segment < calibration.segments.count - 1:
                advance(calibration, segment, modules)
            if progress:
                progress("refine", segment + 1, calibration.segments.count)
    return Compensated(factors, modules)


def _costs(
    calibration: Calibration, segment: int, modules: Mapping[str, nn.Module]
) -> tuple[list[Callable[[], Tensor]], Callable[[], float]]:
    """The mean cost of a compressed segment against the dense one: on some fitted examples each, and held back."""
    last = segment == calibration.segments.count - 1
    metric = None if last else calibration.spool.get(("boundary", segment + 1), calibration.device)["gradients"].float()

    @torch.no_grad()
    def target(part: str, index: int, rows: slice) -> Tensor:
        if last:
            return run_segment(calibration, segment, part, index, {}, rows)
        return calibration.spool.get(("dense", part, segment + 1, index), calibration.device)["hidden"][rows]

    def cost(part: str, index: int, rows: slice) -> tuple[Tensor, int]:
        masks = batches_of(calibration, part)[index][rows].masks
        before = target(part, index, rows)
        after = run_segment(calibration, segment, part, index, modules, rows)
        if metric is None:
            return divergence(before, after, masks, calibration.criterion)
        change = hidden_rows(after, masks) - hidden_rows(before, masks)
        return (change @ metric * change).sum(), change.shape[0]

    def mean_cost(index: int, rows: slice) -> Tensor:
        total, count = cost("fitted", index, rows)
        return total / max(count, 1)  # an example may be all padding

    def parts(index: int) -> Sequence[slice]:
        """Some examples at a time; all where what goes into the segment or out of it has not a row for each."""
        batch = calibration.data.fitted[index]
        hidden = (entering(calibration, "fitted", segment, index), target("fitted", index, ALL))
        if any(not batch.has_row_for_each(each) for each in (*batch.inputs.values(), *hidden) if each is not None):
            return [ALL]
        size = max(1, calibration.data.examples // STEPS)
        return [slice(start, start + size) for start in range(0, batch.examples, size)]

    @torch.no_grad()
    def held_back_error() -> float:
        costs = [cost("held back", index, ALL) for index in range(len(calibration.data.held_back))]
        return float(sum(each for each, _ in costs)) / sum(rows for _, rows in costs)

    count = len(calibration.data.fitted)
    return [partial(mean_cost, index, rows) for index in range(count) for rows in parts(index)], held_back_error


def fit_to_dense(
    modules: Mapping[str, nn.Module],
    losses: Sequence[Callable[[], Tensor]],
    held_back_error: Callable[[], float],
    seed: int,
) -> bool:
    """Fit the modules' parameters in place, and leave them at the least error on held-back data; whether that fell.

    `losses` gives that of one fitted batch each, and `held_back_error` the error after each pass over these. Adam
    (Kingma and Ba, ICLR 2015) in float32 whatever the parameters' dtype.
    """
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    masters = [parameter.detach().float().clone() for parameter in parameters]
    kept, least = [master.clone() for master in masters], held_back_error()
    started, step = least, STEP
    generator = torch.Generator().manual_seed(seed)
    optimizer = _adam(masters, step)
    with _trainable(parameters):
        for done in range(PASSES):
            for count, index in enumerate(torch.randperm(len(losses), generator=generator).tolist()):
                with torch.enable_grad():
                    loss = losses[index]()
                if loss.requires_grad:  # else nothing that is fitted has an effect on it
                    loss.backward()
                for parameter, master, group in zip(parameters, masters, optimizer.param_groups, strict=True):
                    master.grad = None if parameter.grad is None else parameter.grad.float()
                    parameter.grad = None
                    group["lr"] = group["initial_lr"] * (1 - (done + count / len(losses)) / PASSES)
                optimizer.step()
                _put(parameters, masters)
            error = held_back_error()
            if error < least:
                kept, least = [master.clone() for master in masters], error
                continue
            step *= CUT
            masters = [each.clone() for each in kept]
            optimizer = _adam(masters, step)
            _put(parameters, masters)
    return least < started


def _adam(masters: list[Tensor], step: float) -> torch.optim.Adam:
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
            parameter.grad = None
