"""What is left of the initialization, against matrices that torch initialized and trained."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from compressor.errors import BadInput
from compressor.measure import surviving_initialization
from compressor.recipe import TrainingRecipe

RECIPE = TrainingRecipe(
    optimizer="sgd", momentum=0.5, learning_rate=0.2, weight_decay=0.01, schedule="cosine", steps=200
)


def trained_without_a_signal(weights: torch.Tensor) -> torch.Tensor:
    """What `RECIPE` makes of weights whose gradients are 0, in float64."""
    parameter = torch.nn.Parameter(weights.detach().double())
    optimizer = torch.optim.SGD([parameter], lr=0.2, momentum=0.5, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    for _ in range(200):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        schedule.step()
    return parameter.detach()


def test_edge_is_the_largest_singular_value_of_what_is_left() -> None:
    torch.manual_seed(0)
    weights = trained_without_a_signal(torch.nn.Linear(400, 250).weight)
    values = torch.linalg.svdvals(weights)
    found = surviving_initialization(RECIPE, (250, 400), values.tolist(), init_std=1 / math.sqrt(3 * 400))
    assert found.edge is not None
    # Finite matrices stay below the limit by a share of the order d^(-2/3), here 1.5 % (Tracy & Widom).
    assert 0.97 * found.edge < values[0] <= found.edge
    assert found.share is not None
    assert found.forgetting_exponent is not None
    assert 0.5 < found.share < 0.9
    assert found.share == math.exp(-found.forgetting_exponent)


@pytest.mark.parametrize("rank", [1, 7])
def test_singular_values_above_the_edge_are_those_that_were_learned(rank: int) -> None:
    torch.manual_seed(1)
    left = trained_without_a_signal(torch.nn.Linear(300, 200).weight)
    u, v = torch.linalg.qr(torch.randn(200, rank)).Q, torch.linalg.qr(torch.randn(300, rank)).Q
    edge = surviving_initialization(RECIPE, (200, 300), [], init_std=1 / 30).edge
    assert edge is not None
    # A learned direction of twice the edge is far above what Weyl's inequality lets the rest reach.
    values = torch.linalg.svdvals(left + 2 * edge * (u @ v.T).double())
    assert surviving_initialization(RECIPE, (200, 300), values.tolist(), init_std=1 / 30).above_edge == rank


def test_nothing_is_said_of_a_start_that_was_not_random_or_is_unknown() -> None:
    fine_tuned = TrainingRecipe.from_dict(RECIPE.to_dict() | {"base_model": "bert-base-uncased"})
    for recipe, scale, reason in ((fine_tuned, 0.1, "bert-base-uncased"), (RECIPE, None, "unknown")):
        found = surviving_initialization(recipe, (30, 40), [1.0], init_std=scale)
        assert (found.edge, found.above_edge) == (None, None)
        assert found.share is not None
        assert reason in found.reason


def test_edge_scales_with_the_initialization() -> None:
    narrow = surviving_initialization(RECIPE, (30, 40), [1.0], init_std=0.02)
    wide = surviving_initialization(RECIPE, (30, 40), [1.0], init_std=0.04)
    assert narrow.edge is not None
    assert wide.edge == pytest.approx(2 * narrow.edge)


def test_without_decay_all_of_it_is_left() -> None:
    found = surviving_initialization(replace(RECIPE, weight_decay=0.0), (100, 25), [3.1, 2.9], init_std=0.2)
    assert found.share == 1
    assert found.edge == pytest.approx(0.2 * (10 + 5))
    assert found.above_edge == 1


def test_unknown_exponent_says_why() -> None:
    unknown = TrainingRecipe.from_dict(RECIPE.to_dict() | {"steps": None})
    found = surviving_initialization(unknown, (30, 40), [1.0], init_std=0.1)
    assert (found.share, found.edge, found.above_edge, found.forgetting_exponent) == (None, None, None, None)
    assert found.reason == "the number of steps is unknown"


@pytest.mark.parametrize("scale", [-0.1, math.nan, math.inf])
def test_scale_of_the_initialization_is_a_scale(scale: float) -> None:
    with pytest.raises(BadInput, match="standard deviation"):
        surviving_initialization(RECIPE, (3, 4), [1.0], init_std=scale)
