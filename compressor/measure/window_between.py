"""What the memory window says of a change between two steps of a training: its share, and its rank."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache

from compressor.errors import BadInput
from compressor.measure.memory_window import memory_window, retention
from compressor.recipe import TrainingRecipe


@dataclass(frozen=True)
class Window:
    """`W_t = share * W_s + (what was written since)`, the second of rank at most `rank_bound`.

    Attributes:
        share: What weight decay left of the earlier matrix, a^n; None where the recipe does not tell.
        rank_bound: B R n; None where no bound below the full rank holds.
    """

    share: float | None = None
    rank_bound: int | None = None


@lru_cache(maxsize=4096)
def window_between(
    recipe: TrainingRecipe, shape: tuple[int, int], uses: int | None, *, earlier: int, later: int
) -> Window:
    """The window from one step of a training to a later one, for a matrix.

    The bound holds for optimizers whose updates are linear in the gradients, and where no momentum from before the
    earlier step is at work: without momentum, or from the initial weights on.

    Args:
        recipe: How the matrix was trained over the whole run (`TrainingRecipe.of_parameter`).
        shape: `(d_out, d_in)`.
        uses: How often one example uses it; None if unknown.
        earlier: The steps taken before the earlier state; 0 for the initial weights.
        later: The steps taken before the later one.
    """
    steps, planned = later - earlier, recipe.schedule_steps or recipe.total_steps
    if steps < 1 or planned is None or later > planned:
        return Window()
    if recipe.weight_decay == 0:
        share, buffer = 1.0, earlier > 0 and bool(recipe.momentum)
    else:
        try:
            kept = retention(replace(recipe, steps=later, schedule_steps=planned), steps)
        except BadInput:
            return Window()
        share, buffer = kept.weights, earlier > 0 and kept.buffer != 0
    bound = None
    if not buffer and recipe.momentum is not None:
        with suppress(BadInput):
            since = replace(recipe, steps=steps, schedule_steps=planned)
            bound = memory_window(since, shape, uses).learned_rank_bound
    return Window(share, bound if bound is not None and bound < min(shape) else None)
