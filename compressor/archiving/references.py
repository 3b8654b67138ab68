"""What a tensor may be stored as a change from, and the share of it that is taken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.archiving.change import Change, Reference, Source, change_from
from compressor.archiving.run import TrainingRun
from compressor.initial import fitted_share, start_of
from compressor.measure.window_between import Window

# The remainder after the predicted share may be larger than after the fit by this share of it.
_CLEARLY_WORSE = 0.01


@dataclass(frozen=True)
class Stored:
    """A tensor as it is stored: the change, what it is a change from, and what is restored."""

    change: Change
    reference: Reference
    restored: Tensor

    def relative_error(self, tensor: Tensor) -> float:
        """The norm of what is restored less the tensor, beside the tensor's; 0 where both are 0."""
        wide = tensor.to(torch.float64)
        error, norm = float((self.restored.to(torch.float64) - wide).norm()), float(wide.norm())
        return error / norm if norm else error


def smallest_change(tensor: Tensor, references: Iterator[Reference], tolerance: float) -> Stored:
    """The change that takes the fewest bytes at the same error; of equal ones the first."""
    found = [(change_from(tensor, each, tolerance), each) for each in references]
    change, reference = min(found, key=lambda pair: len(pair[0].payload))
    return Stored(change, reference, change.restored(tensor, reference.tensor))


def references_of(
    run: TrainingRun, name: str, index: int, *, tensor: Tensor, previous: Tensor | None, initial: Tensor | None
) -> Iterator[Reference]:
    """What a tensor of a checkpoint may be stored as a change from.

    The initial weights count where the tensor correlates with them, the checkpoint before is as it is restored, and
    nothing stands for neither.
    """
    found, finite = False, _is_finite(tensor)
    if initial is not None and finite and start_of(tensor, initial) is not None:
        found = True
        yield from _references("initial", tensor, initial, window=run.window(name, index, None))
    # What is finite is no change from what is not.
    if previous is not None and (_is_finite(previous) or not finite):
        found = True
        yield from _references("previous", tensor, previous, window=run.window(name, index, index - 1))
    if not found:
        yield Reference()


def _references(source: Source, tensor: Tensor, earlier: Tensor, *, window: Window) -> Iterator[Reference]:
    """A reference for each share that is worth trying: the predicted one unless the fit leaves clearly less.

    Where the bound on the rank binds, it does for the predicted share alone, so that is tried too.
    """
    share = 1.0
    if tensor.is_floating_point() and _is_finite(tensor) and bool(earlier.any()):
        now, before = tensor.to(torch.float64), earlier.to(torch.float64)
        share = fitted_share(now, before)
        if window.share is not None:
            predicted, fitted = (float((now - each * before).norm()) for each in (window.share, share))
            share = window.share if predicted <= (1 + _CLEARLY_WORSE) * fitted else share
    if window.rank_bound is not None and window.share is not None:
        yield Reference(source, earlier, window.share, window.rank_bound)
        if share == window.share:
            return
    yield Reference(source, earlier, share)


def _is_finite(tensor: Tensor) -> bool:
    # torch has no isfinite for eight-bit floats.
    return bool(torch.isfinite(tensor if tensor.dtype.itemsize > 1 else tensor.float()).all())
