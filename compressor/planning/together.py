"""Layers that run in one batched product, such as the experts of a block, and so have one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compressor.planning.allocation import Choices
from compressor.planning.layer_choices import LayerChoices
from compressor.planning.measured import MeasuredLayer, layer_plan
from compressor.planning.plan import LayerPlan, dense_plan

_REASON = "one rank for the experts of a block, which run together"


@dataclass(frozen=True)
class JoinedChoices:
    """What layers could become together: one of them alone, or several in the same form and at the same rank.

    `places` are those of the layers, and `own[i, j]` is which of the choices of layer `places[i]` choice j is.
    """

    choices: Choices
    places: Sequence[int]
    own: npt.NDArray[np.int64]


def groups_of(measured: Sequence[MeasuredLayer]) -> list[list[int]]:
    """The places of layers that are to have one rank; a layer that shares its rank with no other is alone.

    A layer that has to stay dense shares no rank, and neither does one that could be quantized.
    """
    groups: dict[str, list[int]] = {}
    for place, m in enumerate(measured):
        free = m.together is not None and m.stays_dense is None and not m.quantized
        groups.setdefault(f"/{m.together}" if free else m.layer.name, []).append(place)
    return list(groups.values())


def joined(
    measured: Sequence[MeasuredLayer], layers: Sequence[LayerChoices], choices: Sequence[Choices]
) -> list[JoinedChoices]:
    """The choices of layers, where those of each group are one: `choices` are theirs with comparable losses."""
    found = []
    for group in groups_of(measured):
        if len(group) == 1:
            [place] = group
            found.append(JoinedChoices(choices[place], group, np.arange(len(choices[place].loss))[None]))
            continue
        keys = [list(zip(layers[place].forms, layers[place].ranks.tolist(), strict=True)) for place in group]
        by_key = [{key: index for index, key in enumerate(own)} for own in keys]
        common = [key for key in keys[0] if all(key in own for own in by_key)]
        own = np.array([[each[key] for key in common] for each in by_key], dtype=np.int64)
        cost = np.sum([choices[place].cost[row] for place, row in zip(group, own, strict=True)], axis=0)
        loss = np.sum([choices[place].loss[row] for place, row in zip(group, own, strict=True)], axis=0)
        found.append(JoinedChoices(Choices(cost, loss), group, own))
    return found


def apart(joined_choices: Sequence[JoinedChoices], chosen: Sequence[int]) -> list[int]:
    """Of what was chosen for joined layers the index of each layer's own choice."""
    by_place = {
        place: int(own)
        for each, index in zip(joined_choices, chosen, strict=True)
        for place, own in zip(each.places, each.own[:, index], strict=True)
    }
    return [by_place[place] for place in range(len(by_place))]


def with_common_ranks(measured: Sequence[MeasuredLayer], plans: Sequence[LayerPlan]) -> tuple[LayerPlan, ...]:
    """The plans with the largest rank of each group for all of it; where a layer stays dense, all do."""
    found = list(plans)
    for group in groups_of(measured):
        ranks = [plans[place].rank for place in group]
        forms = {plans[place].form for place in group}
        if len(group) == 1 or (len(set(ranks)) == 1 and len(forms) == 1):
            continue
        known = [(rank, plans[place].form) for rank, place in zip(ranks, group, strict=True) if rank is not None]
        for place in group:
            m = measured[place]
            found[place] = (
                layer_plan(m, *max(known), reason=_REASON) if len(known) == len(group) else dense_plan(m.layer, _REASON)
            )
    return tuple(found)
