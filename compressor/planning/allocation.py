"""One budget shared by many layers: ranks that lose the least for the numbers they store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Choices:
    """What one layer could become: `cost[i]` stored numbers or bytes for a loss of `loss[i]`.

    The unit of loss is the same for all layers. The order of the choices is free; dense is one of them, with loss 0.
    """

    cost: npt.NDArray[np.int64]
    loss: npt.NDArray[np.float64]


def allocate(layers: Sequence[Choices], budget: int) -> list[int] | None:
    """Index of the choice for every layer that loses the least in sum at a cost of at most `budget`.

    A Lagrange multiplier prices the cost and every layer minimises `loss + multiplier * cost`; the multiplier is
    bisected to the budget, and what is then left of it goes to the single steps that save most loss for their cost. So
    no layer can take a better choice within the budget. None when even the smallest choices exceed it.
    """
    if sum(int(layer.cost.min()) for layer in layers) > budget:
        return None

    def priced(multiplier: float) -> list[int]:
        return [cheapest(layer.loss + multiplier * layer.cost, layer.cost) for layer in layers]

    def cost(chosen: list[int]) -> int:
        return sum(int(layer.cost[i]) for layer, i in zip(layers, chosen, strict=True))

    chosen = priced(0.0)
    if cost(chosen) > budget:
        # Costs are whole numbers, so at a price above the largest loss every layer takes its smallest choice.
        low, high = 1e-300, 1.0 + max(float(layer.loss.max()) for layer in layers)
        chosen = priced(high)
        for _ in range(100):
            middle = float(np.sqrt(low) * np.sqrt(high))
            trial = priced(middle)
            if cost(trial) <= budget:
                high, chosen = middle, trial
            else:
                low = middle
    return _spend(layers, chosen, budget - cost(chosen))


def cheapest(price: npt.NDArray[np.float64], cost: npt.NDArray[np.int64]) -> int:
    """Index of the lowest price, and of equal prices the lowest cost."""
    tied = np.flatnonzero(price == price.min())
    return int(tied[np.argmin(cost[tied])])


def _spend(layers: Sequence[Choices], chosen: list[int], left: int) -> list[int]:
    """Spend what is left on the steps that save most loss for their cost, until none fits."""
    while True:
        best, best_gain = None, 0.0
        for index, (layer, current) in enumerate(zip(layers, chosen, strict=True)):
            extra = layer.cost - layer.cost[current]
            saved = layer.loss[current] - layer.loss
            fits = (extra <= left) & (saved > 0)
            if fits.any():
                gain = np.where(fits, saved / np.maximum(extra, 1), 0.0)
                step = int(gain.argmax())
                if gain[step] > best_gain:
                    best, best_gain = (index, step), float(gain[step])
        if best is None:
            return chosen
        index, step = best
        left -= int(layers[index].cost[step] - layers[index].cost[chosen[index]])
        chosen[index] = step
