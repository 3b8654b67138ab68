"""One budget shared by many layers: ranks that lose the least for the numbers they store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Choices:
    """What one layer could become: `cost[i]` stored numbers or bytes, or a mixed cost, for a loss of `loss[i]`.

    The unit of loss is the same for all layers. The order of the choices is free; dense is one of them, with loss 0.
    """

    cost: npt.NDArray[np.int64] | npt.NDArray[np.float64]
    loss: npt.NDArray[np.float64]


@dataclass(frozen=True)
class LimitedChoices:
    """What one layer could become where several costs are limited: `costs[k, i]` for a loss of `loss[i]`."""

    costs: npt.NDArray[np.float64]
    loss: npt.NDArray[np.float64]

    def mixed(self, weights: npt.NDArray[np.float64]) -> Choices:
        """The same with one cost, a weighted sum."""
        return Choices(weights @ self.costs, self.loss)


@dataclass(frozen=True)
class ExchangeSettings:
    """From which gap on to a lower bound, a share of the loss, combinations of choices are compared, and how many."""

    gap: float = 1e-3
    combinations: int = 1024


EXCHANGE = ExchangeSettings()


def allocate(layers: Sequence[Choices], budget: int, *, exchange: ExchangeSettings = EXCHANGE) -> list[int] | None:
    """Index of each layer's choice, with the least total loss at a total cost of at most `budget`.

    A Lagrange multiplier prices the cost, and every layer minimizes `loss + multiplier * cost`: as the price falls it
    goes from its smallest choice along the lower convex hull of its choices. What is then left of the budget goes to
    the single steps that save most loss for their cost. So no layer can take a better choice within the budget. Several
    together may still do, where a layer takes much of the budget: these are exchanged. None when even the smallest
    choices exceed the budget.
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
    price = None if taken == len(order) else float(prices[order[taken]])
    if price is not None:
        # At one price every layer takes its smallest choice, so steps of one price are taken together.
        taken = int(np.searchsorted(-prices[order], -price))
    left -= int(spent[taken - 1]) if taken else 0
    counts = np.bincount(_owners(extra)[order[:taken]], minlength=len(layers))
    chosen = spend(layers, [int(hull[count]) for hull, count in zip(hulls, counts, strict=True)], left)
    return chosen if price is None else _exchanged(layers, chosen, budget, price=price, settings=exchange)


def _exchanged(
    layers: Sequence[Choices], chosen: list[int], budget: int, *, price: float, settings: ExchangeSettings
) -> list[int]:
    """The choices, or a combination within the budget that loses less.

    At any price, whatever is within the budget loses at least `sum(min(loss + price * cost)) - price * budget`. So a
    combination that loses less than the choices exceeds the layers' minima by less than what these lose above that
    bound. Layer by layer, the combinations are kept that do, and lose less than all that cost less (dynamic programming
    with bounds: Dyer, Kayal and Walker, 1984), or of too many those that exceed the minima least.
    """
    priced = [layer.loss + price * layer.cost for layer in layers]
    above = [each - each.min() for each in priced]
    loss = _total(layers, chosen)
    room = loss - (sum(float(each.min()) for each in priced) - price * budget)
    if room <= settings.gap * loss:
        return chosen
    least = sum(int(layer.cost.min()) for layer in layers)
    cost, excess = np.zeros(1), np.zeros(1)
    steps = []
    for layer, each in zip(layers, above, strict=True):
        least -= int(layer.cost.min())
        own = np.flatnonzero(each < room)
        costs, excesses = cost[:, None] + layer.cost[own], excess[:, None] + each[own]
        places = np.flatnonzero((costs + least <= budget) & (excesses < room))
        if not places.size:
            return chosen
        cost, excess = costs.ravel()[places], excesses.ravel()[places]
        kept = _frontier(Choices(cost, excess - price * cost))
        kept = kept[np.argsort(excess[kept], kind="stable")[: settings.combinations]]
        cost, excess, places = cost[kept], excess[kept], places[kept]
        steps.append((places // len(own), own[places % len(own)]))
    place = int((excess - price * cost).argmin())
    left = budget - int(cost[place])
    found = []
    for before, choice in reversed(steps):
        found.append(int(choice[place]))
        place = int(before[place])
    found = spend(layers, found[::-1], left)
    return found if _total(layers, found) < loss else chosen


def _total(layers: Sequence[Choices], chosen: Sequence[int]) -> float:
    return sum(float(layer.loss[index]) for layer, index in zip(layers, chosen, strict=True))


def allocate_within(
    layers: Sequence[LimitedChoices], limits: npt.NDArray[np.float64], *, rounds: int = 40
) -> list[int] | None:
    """Index of each layer's choice, with the least total loss at total costs of at most `limits`, one for each cost.

    Each cost counts in parts of its limit, and a mix of them is priced as `allocate` does. The mix is found in rounds:
    a cost that exceeds its limit gets more weight and one that is within it less, by a factor that grows while the
    direction stays the same and shrinks where it turns (Riedmiller and Braun, 1993). At the best mix the costs that are
    weighed meet their limits together, so that no other mix loses less, up to the steps at the end. None when no mix
    leads to a plan within the limits.
    """
    if (limits <= 0).any():
        return None
    parts = [LimitedChoices(layer.costs / limits[:, None], layer.loss) for layer in layers]
    found: tuple[float, list[int], npt.NDArray[np.float64]] | None = None
    logs, steps, before = np.zeros(len(limits)), np.ones(len(limits)), np.zeros(len(limits))
    for _ in range(rounds):
        weights = np.exp(logs - logs.max())
        weights /= weights.sum()
        chosen, totals = _priced(parts, weights)
        if chosen is not None:
            loss = sum(float(part.loss[index]) for part, index in zip(parts, chosen, strict=True))
            if found is None or loss < found[0]:
                found = (loss, chosen, weights)
        direction = np.sign(totals - 1)
        if (direction <= 0).all():
            break
        steps *= np.where(direction * before > 0, 1.5, np.where(direction * before < 0, 0.5, 1.0))
        logs, before = np.maximum(logs + steps * direction, logs.max() - 50), direction
    return None if found is None else _spend_within(parts, found[1], found[2])


def _priced(
    parts: Sequence[LimitedChoices], weights: npt.NDArray[np.float64]
) -> tuple[list[int] | None, npt.NDArray[np.float64]]:
    """The choices on the hulls of the mixed cost that lose least within all limits, each of 1; None where none are.

    And the totals of each cost where the mixed cost meets its own limit.
    """
    mixed = [part.mixed(weights) for part in parts]
    hulls = [lower_hull(each) for each in mixed]
    extra = [np.diff(part.costs[:, hull]) for part, hull in zip(parts, hulls, strict=True)]
    prices = np.concatenate(
        [-np.diff(each.loss[hull]) / np.diff(each.cost[hull]) for each, hull in zip(mixed, hulls, strict=True)]
    )
    order = np.argsort(-prices, kind="stable")
    first = np.sum([part.costs[:, hull[0]] for part, hull in zip(parts, hulls, strict=True)], axis=0)
    totals = first[:, None] + np.cumsum(
        np.concatenate([np.zeros((len(first), 1)), *extra], axis=1)[:, [0, *order + 1]], 1
    )
    meets = max(0, int(np.searchsorted(weights @ totals, 1.0, side="right")) - 1)
    within = np.flatnonzero((totals <= 1).all(axis=0))
    if not within.size:
        return None, totals[:, meets]
    counts = np.bincount(_owners([each.T for each in extra])[order[: within[-1]]], minlength=len(parts))
    return [int(hull[count]) for hull, count in zip(hulls, counts, strict=True)], totals[:, meets]


def _spend_within(parts: Sequence[LimitedChoices], chosen: list[int], weights: npt.NDArray[np.float64]) -> list[int]:
    """Spend the rest of all limits on the steps that save the most loss for their mixed cost, until none fits."""
    costs, loss = np.concatenate([part.costs for part in parts], axis=1), np.concatenate([part.loss for part in parts])
    owner = _owners([part.loss for part in parts])
    first = np.cumsum([0, *(len(part.loss) for part in parts)])[:-1]
    current = first + np.array(chosen, dtype=np.int64)
    while True:
        extra, saved = costs - costs[:, current][:, owner], loss[current][owner] - loss
        fits = (costs[:, current].sum(axis=1)[:, None] + extra <= 1).all(axis=0)
        gain = np.where(fits & (saved > 0), saved / np.maximum(weights @ extra, 1e-12), -1.0)
        best = int(gain.argmax())
        if gain[best] < 0:
            return [int(index) for index in current - first]
        current[owner[best]] = best


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


def undominated(rated: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Places of the choices, columns, to which no other is as good in every row and better in one; of equals the first.

    Less is better. They are in the order of the first row.
    """
    order = np.lexsort((*rated[1:], rated[0]))
    if len(rated) == 2:
        least = np.minimum.accumulate(rated[1, order])
        found: npt.NDArray[np.int64] = order[np.append(True, least[1:] < least[:-1])[: len(order)]]
        return found
    kept = rated[:, :0]
    places = [order[:0]]
    # What dominates a choice comes before it in this order.
    for part in np.array_split(order, max(1, len(order) // 256)):
        worse = (kept[:, :, None] <= rated[:, None, part]).all(axis=0).any(axis=0)
        block = part[~worse]
        own = rated[:, block]
        before = np.tri(len(block), k=-1, dtype=np.bool_).T
        best = ~((own[:, :, None] <= own[:, None]).all(axis=0) & before).any(axis=0)
        kept = np.concatenate([kept, own[:, best]], axis=1)
        places.append(block[best])
    return np.concatenate(places)


def even_shares(layers: Sequence[Choices], budget: float) -> list[int]:
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
    taken = int(np.searchsorted(spent, budget - sum(float(cost[0]) for cost in costs), side="right"))
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
