"""Between two checkpoints plain SGD writes at most B R n ranks on top of a^n of the earlier matrix: in actual runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor.measure.window_between import Window, window_between
from compressor.recipe import TrainingRecipe

SGD = TrainingRecipe(
    optimizer="sgd",
    momentum=0.0,
    learning_rate=0.1,
    weight_decay=0.02,
    batch_size=2,
    schedule="constant",
    steps=12,
    sequence_length=1,
)


def trained(recipe: TrainingRecipe) -> Iterator[Tensor]:
    """The hidden matrix, 40 x 40 in float64, before the first and after each step of a perceptron's training."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 3)).double()
    weight = model[2].weight
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: float(recipe.learning_rates_at(np.array([float(step)]))[0]) / recipe.learning_rate
    )
    yield weight.detach().clone()
    for _ in range(recipe.steps):
        inputs, labels = torch.randn(recipe.batch_size, 10, dtype=torch.float64), torch.randint(3, (recipe.batch_size,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        schedule.step()
        yield weight.detach().clone()


def rank_of(matrix: Tensor) -> int:
    """The rank up to the rounding of float64."""
    values = torch.linalg.svdvals(matrix)
    return int((values > 1e-12 * values[0]).sum())


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_change_has_exactly_the_rank_of_the_bound(batch: int, schedule: str) -> None:
    recipe = replace(SGD, batch_size=batch, schedule=schedule)
    states = list(trained(recipe))
    for earlier, later in ((0, 3), (2, 5), (4, 12), (11, 12)):
        window = window_between(recipe, (40, 40), 1, earlier=earlier, later=later)
        assert window.share is not None
        # The last step of the cosine schedule is small, and not 0.
        assert window.rank_bound == batch * (later - earlier)
        assert rank_of(states[later] - window.share * states[earlier]) == window.rank_bound
        # With another share the earlier matrix, which has full rank, is left in it.
        assert rank_of(states[later] - 0.9 * window.share * states[earlier]) == 40


def test_with_momentum_the_bound_holds_from_the_start_alone() -> None:
    recipe = replace(SGD, momentum=0.9)
    states = list(trained(recipe))
    from_start = window_between(recipe, (40, 40), 1, earlier=0, later=6)
    assert from_start.share is not None
    assert from_start.rank_bound == 12
    assert rank_of(states[6] - from_start.share * states[0]) == 12
    between = window_between(recipe, (40, 40), 1, earlier=6, later=9)
    assert between.rank_bound is None
    assert between.share is not None
    assert rank_of(states[9] - between.share * states[6]) > 6


def test_without_weight_decay_all_of_the_earlier_matrix_is_left() -> None:
    recipe = replace(SGD, weight_decay=0.0)
    states = list(trained(recipe))
    window = window_between(recipe, (40, 40), 1, earlier=5, later=8)
    assert window == Window(1.0, 6)
    assert rank_of(states[8] - states[5]) == 6


@pytest.mark.parametrize(
    ("changed", "uses"),
    [
        ({"optimizer": "adamw"}, 1),
        ({"batch_size": None}, 1),
        ({"batch_size": 16}, 1),  # 48 is above the full rank
        ({"momentum": None}, 1),
        ({}, None),
        ({}, 14),
    ],
)
def test_there_is_no_bound_where_none_below_the_full_rank_is_known(changed: dict[str, object], uses: int) -> None:
    recipe = replace(SGD, **changed)
    assert window_between(recipe, (40, 40), uses, earlier=2, later=5).rank_bound is None


@pytest.mark.parametrize(
    "changed", [{"learning_rate": None}, {"weight_decay": None}, {"optimizer": None}, {"steps": None}, {"steps": 4}]
)
def test_nothing_is_said_of_what_the_recipe_does_not_tell(changed: dict[str, object]) -> None:
    assert window_between(replace(SGD, **changed), (40, 40), 1, earlier=2, later=5) == Window()
