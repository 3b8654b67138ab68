"""The factors of one segment fitted to what the dense segment puts out, by gradient descent.

Compensation solves for one layer at a time and for what is linear in it; the fit moves all factors of a segment
together, through its nonlinearities, on the inputs that the compressed model gives it. It overfits a little data within
a few passes, so it stops, and returns to the best factors so far, when the examples held back say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Adam's step, relative to the root mean square of each tensor; it is cut where a pass does not help.
STEP = 1e-2
CUT = 0.3
CUTS = 3
MOST_PASSES = 30


def fit_to_dense(
    modules: Mapping[str, nn.Module],
    passes: Callable[[], Iterator[Callable[[], Tensor]]],
    held_back_error: Callable[[], float],
    seed: int,
) -> bool:
    """Fit the modules' parameters in place, and leave them at the least error on held-back data; whether that fell.

    `passes` gives one loss for every fitted batch, and `held_back_error` the error to stop by. Adam (Kingma and Ba,
    ICLR 2015) in float32 whatever the parameters' dtype.
    """
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    masters = [parameter.detach().float().clone() for parameter in parameters]
    sizes = [float(master.square().mean().sqrt()) for master in masters]
    kept, least = [master.clone() for master in masters], held_back_error()
    started, step, cuts = least, STEP, 0
    generator = torch.Generator().manual_seed(seed)
    optimizer = _adam(masters, sizes, step)
    with _trainable(parameters):
        for _ in range(MOST_PASSES):
            losses = list(passes())
            for index in torch.randperm(len(losses), generator=generator).tolist():
                with torch.enable_grad():
                    losses[index]().backward()
                for parameter, master in zip(parameters, masters, strict=True):
                    master.grad = None if parameter.grad is None else parameter.grad.float()
                    parameter.grad = None
                optimizer.step()
                _put(parameters, masters)
            error = held_back_error()
            if error < least:
                kept, least = [master.clone() for master in masters], error
                continue
            cuts += 1
            if cuts > CUTS:
                break
            step *= CUT
            masters = [each.clone() for each in kept]
            optimizer = _adam(masters, sizes, step)
            _put(parameters, masters)
    _put(parameters, kept)
    return least < started


def _adam(masters: list[Tensor], sizes: list[float], step: float) -> torch.optim.Adam:
    groups = [{"params": [master], "lr": step * size} for master, size in zip(masters, sizes, strict=True)]
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
