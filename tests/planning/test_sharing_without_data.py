"""Without data no layer is given up for others: what it loses is measured by what it loses at an even share."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compressor import compress
from compressor.data.builtin_data import digits
from compressor.network import Layer
from compressor.planning import LayerPlan, MeasuredLayer
from compressor.planning.allocation import even_shares
from compressor.planning.layer_choices import layer_choices
from compressor.planning.size import plan_by_size

Array = np.ndarray[Any, Any]

SHAPES = st.lists(st.tuples(st.integers(4, 40), st.integers(4, 40)), min_size=2, max_size=6)
KEEPS = st.sampled_from([0.3, 0.5, 0.7, 0.9])


def measured(index: int, shape: tuple[int, int], spectrum: Array) -> MeasuredLayer:
    layer = Layer(str(index), str(index), f"{index}.weight", None, "linear", shape, shape)
    return MeasuredLayer(layer, spectrum, itemsize=4, precision=2**-23)


def layers_with(shapes: list[tuple[int, int]], seed: int) -> list[MeasuredLayer]:
    """Spectra from flat to steep, in some of which one direction dominates."""
    draw = np.random.default_rng(seed)
    layers = []
    for index, shape in enumerate(shapes):
        spectrum = np.sort(draw.lognormal(0, draw.uniform(0, 2), min(shape)))[::-1].copy()
        spectrum[0] *= 10 ** draw.integers(0, 3)
        layers.append(measured(index, shape, spectrum))
    return layers


def beside_an_even_share(layers: list[MeasuredLayer], keep: float) -> tuple[tuple[LayerPlan, ...], Array, Array] | None:
    """A plan, and -log(1 - e^2) of every layer at an even share and in the plan; None where either cannot be met."""
    budget = int(keep * sum(m.layer.parameters for m in layers))
    choices = [layer_choices(m, "auto", "parameters") for m in layers]
    even = even_shares([each.choices for each in choices], budget)
    plans = plan_by_size(layers, budget, "auto", unit="parameters")
    if plans is None or sum(int(each.choices.cost[i]) for i, each in zip(even, choices, strict=True)) > budget:
        return None
    squares = [
        np.square([each.errors[i] for i, each in zip(even, choices, strict=True)]),
        np.square([plan.error for plan in plans]),
    ]
    before, after = (-np.log1p(-np.minimum(each, 1 - 2**-52)) for each in squares)
    return plans, before + 2**-46, after


@pytest.mark.slow
@given(shapes=SHAPES, seed=st.integers(0, 2**32 - 1), keep=KEEPS, random=st.randoms(use_true_random=False))
def test_the_order_of_the_layers_does_not_matter(
    shapes: list[tuple[int, int]], seed: int, keep: float, *, random: Random
) -> None:
    # Layers of one shape and spectrum tie.
    layers = layers_with(shapes, seed)
    layers += [replace(m, layer=replace(m.layer, name=f"{m.layer.name} again")) for m in layers]
    shuffled = random.sample(layers, len(layers))
    budget = int(keep * sum(m.layer.parameters for m in layers))
    plans, others = (plan_by_size(each, budget, "auto", unit="parameters") for each in (layers, shuffled))
    assert (plans is None) == (others is None)
    if plans is not None and others is not None:
        assert {plan.name: plan.rank for plan in plans} == {plan.name: plan.rank for plan in others}


@settings(max_examples=60)
@given(SHAPES, st.integers(0, 2**20), KEEPS)
def test_no_layer_is_ruined_for_others(shapes: list[tuple[int, int]], seed: int, keep: float) -> None:
    """A layer loses more than at an even share only by a bounded factor, however small its errors look.

    The bound is that of the allocation; the step is what one rank changes, by which an allocation may miss the best.
    """
    layers = layers_with(shapes, seed)
    found = beside_an_even_share(layers, keep)
    if found is None:
        return
    plans, before, after = found
    for m, plan, even, lost in zip(layers, plans, before, after, strict=True):
        larger = [each for each in layer_choices(m, "auto", "parameters").errors if each < plan.error]
        at_the_next_rank = -math.log1p(-min(max(larger, default=0.0) ** 2, 1 - 2**-52))
        assert min(lost, at_the_next_rank) <= math.sqrt(3 * len(layers)) * even


@pytest.mark.parametrize("keep", [0.5, 0.6, 0.7, 0.8])
def test_a_layer_with_a_dominating_direction_is_not_starved_by_a_flat_one(keep: float) -> None:
    """Inputs that are not centered write one large direction, beside which everything else looks like a small error.

    The spectra are like those of a voice detector: a fixed transform, convolutions behind it, and a recurrent cell.
    """
    ranks = np.arange(1, 129)
    flat, steep = np.ones(128), np.exp(-ranks / 40)
    dominated = steep[:64].copy()
    dominated[0] *= 100
    shapes = (((258, 256), np.repeat(flat, 2)), ((128, 387), steep), ((64, 192), dominated), ((128, 64), dominated))
    layers = [measured(i, *each) for i, each in enumerate(shapes)]
    found = beside_an_even_share(layers, keep)
    assert found is not None
    for plan in found[0]:
        assert plan.parameters > 0.5 * keep * plan.parameters_before, plan


@settings(max_examples=30)
@given(SHAPES, st.integers(0, 2**20), KEEPS)
def test_an_even_share_is_within_the_budget_and_even(shapes: list[tuple[int, int]], seed: int, keep: float) -> None:
    layers = layers_with(shapes, seed)
    choices = [layer_choices(m, "plain", "parameters").choices for m in layers]
    budget = int(keep * sum(m.layer.parameters for m in layers))
    even = even_shares(choices, budget)
    stored = [int(each.cost[i]) for i, each in zip(even, choices, strict=True)]
    if sum(int(each.cost.min()) for each in choices) > budget:
        return
    assert sum(stored) <= budget
    # The next larger choice of a layer is above the share that no layer exceeds, but for its smallest choice.
    share = max(
        (cost / each.cost.max() for cost, each in zip(stored, choices, strict=True) if cost > each.cost.min()),
        default=0.0,
    )
    for cost, each in zip(stored, choices, strict=True):
        assert each.cost[each.cost > cost].min(initial=10**9) / each.cost.max() >= share


def test_a_trained_network_survives_weights_that_no_input_reaches() -> None:
    """Some pixels of the digits are always zero, and what training left there hides the rest of its layer."""
    images, labels = digits("train")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(150):
        rows = torch.randint(0, len(images), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    unused = images.flatten(1).amax(0) == 0
    with torch.no_grad():
        weight = model[1].weight
        weight[:, unused] = 5 * weight.norm(dim=1, keepdim=True)
    tested, truth = digits("validation")

    def accuracy(network: nn.Module) -> float:
        return float((network(tested).argmax(1) == truth).float().mean())

    for keep in (0.7, 0.5):
        small = compress(model, keep=keep, prefer="size").model
        assert small is not None
        assert accuracy(small) > accuracy(model) - 0.1


def test_everything_is_kept_where_everything_fits() -> None:
    layers = layers_with([(20, 30), (12, 12)], 0)
    plans = plan_by_size(layers, sum(m.layer.parameters for m in layers), "auto", unit="parameters")
    assert plans is not None
    assert [plan.rank for plan in plans] == [None, None]
