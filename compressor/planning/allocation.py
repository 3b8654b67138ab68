"""One budget shared by many layers: ranks that lose the least for the numbers they store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
    """Index of each layer's choice, with the least total loss at a total cost of at most `budget`.

    A Lagrange multiplier prices the cost, and every layer minimizes `loss + multiplier * cost`: as the price falls it
    goes from its smallest choice along the lower convex hull of its choices. What is then left of the budget goes to
    the single steps that save most loss for their cost. So no layer can take a better choice within the budget. None
    when even the smallest choices exceed it.
    """
    hulls = [lower_hull(layer) for layer in layers]
    left = budget - sum(int(layer.cost[hull[0]]) for layer, hull in zip(layers, hulls, strict=True))
    if left < 0:
        return None
    extra = [np.diff(layer.cost[hull]) for layer, hull in zip(layers, hulls, strict=True)]
    saved = [-np.diff(layer.loss[hull]) for layer, hull in zip(layers, hulls, strict=True)]
    prices = np.concatenate([gain / cost for gain, cost in zip(saved, extra, strict=True)])
    order = np.argsort(-prices, kind="stable")
    spent = np.cumsum(np.concatenate(extra)[order])
    taken = int(np.searchsorted(spent, left, side="right"))
    if taken < len(order):
        # At one price every layer takes its smallest choice, so steps of one price are taken together.
        taken = int(np.searchsorted(-prices[order], -prices[order[taken]]))
    left -= int(spent[taken - 1]) if taken else 0
    counts = np.bincount(_owners(extra)[order[:taken]], minlength=len(layers))
    return spend(layers, [int(hull[count]) for hull, count in zip(hulls, counts, strict=True)], left)


def lower_hull(choices: Choices) -> npt.NDArray[np.int64]:
    """Indices of the choices that are cheapest at some price, from the lowest cost to the lowest loss."""
    hull = _frontier(choices)
    while True:
        slopes = np.diff(choices.loss[hull]) / np.diff(choices.cost[hull])
        # A choice on or above the line between its neighbors is on no hull.
        below = np.append(np.append(True, slopes[:-1] < slopes[1:]), True) if len(hull) > 1 else np.ones(1, dtype=bool)
        if below.all():
            return hull
        hull = hull[below]


def even_shares(layers: Sequence[Choices], budget: int) -> list[int]:
    """Index of each layer's choice that loses the least within one common share of the layer's largest cost.

    The share is the largest at which all of them cost at most `budget`. A layer that has no choice within the share
    takes its smallest.
    """
    # What a layer takes at a share: the last choice on its frontier that costs no more.
    frontiers = [_frontier(layer) for layer in layers]
    costs = [layer.cost[frontier] for layer, frontier in zip(layers, frontiers, strict=True)]
    shares = np.concatenate([cost[1:] / layer.cost.max() for layer, cost in zip(layers, costs, strict=True)])
    extra = [np.diff(cost) for cost in costs]
    order = np.argsort(shares, kind="stable")
    spent = np.cumsum(np.concatenate(extra)[order])
    taken = int(np.searchsorted(spent, budget - sum(int(cost[0]) for cost in costs), side="right"))
    counts = np.bincount(_owners(extra)[order[:taken]], minlength=len(layers))
    return [int(frontier[count]) for frontier, count in zip(frontiers, counts, strict=True)]


def _frontier(choices: Choices) -> npt.NDArray[np.int64]:
    """Indices of the choices that lose less than every cheaper one, in the order of cost."""
    order = np.lexsort((choices.loss, choices.cost))
    least = np.minimum.accumulate(choices.loss[order])
    frontier: npt.NDArray[np.int64] = order[np.append(True, least[1:] < least[:-1])]
    return frontier


def _owners(parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.int64]:
    """For each entry of the concatenated arrays, the index of its array."""
    return np.repeat(np.arange(len(parts)), [len(part) for part in parts])


def spend(layers: Sequence[Choices], chosen: list[int], left: int) -> list[int]:
    """Spend the rest of the budget on the steps that save the most loss per cost, until none fits."""
    cost, loss = (np.concatenate(each) for each in zip(*((layer.cost, layer.loss) for layer in layers), strict=True))
    owner = _owners([layer.cost for layer in layers])
    first = np.cumsum([0, *(len(layer.cost) for layer in layers)])
    current = first[:-1] + np.array(chosen, dtype=np.int64)
    while True:
        extra, saved = cost - cost[current][owner], loss[current][owner] - loss
        # The least numbers divided give 0, and are saved all the same.
        gain = np.where((extra <= left) & (saved > 0), saved / np.maximum(extra, 1), -1.0)
        best = int(gain.argmax())
        if gain[best] < 0:
            return [int(index) for index in current - first[:-1]]
        left -= int(extra[best])
        current[owner[best]] = best
