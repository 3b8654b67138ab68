"""The equilibrium norm of scale-invariant matrices against optimizer runs in float64."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import nn

from compressor.measure import equilibrium_norm
from compressor.measure.equilibrium import ARRIVED
from compressor.recipe import TrainingRecipe

RATE, DECAY, STEPS = 0.1, 0.05, 1500
RECIPES = {
    "plain": TrainingRecipe(optimizer="sgd", momentum=0.0),
    "heavy-ball": TrainingRecipe(optimizer="sgd", momentum=0.8),
    "dampened": TrainingRecipe(optimizer="sgd", momentum=0.6, dampening=0.5),
    "nesterov": TrainingRecipe(optimizer="nesterov", momentum=0.8),
    "decoupled": TrainingRecipe(optimizer="sgdw", momentum=0.0),
    "decoupled heavy-ball": TrainingRecipe(optimizer="sgdw", momentum=0.8),
}


def recipe_of(name: str, **more: object) -> TrainingRecipe:
    common = {"learning_rate": RATE, "weight_decay": DECAY, "schedule": "constant", "steps": STEPS}
    return TrainingRecipe.from_dict(RECIPES[name].to_dict() | common | more)


def settled(recipe: TrainingRecipe, start: float, steps: int = STEPS, *, last: int = STEPS // 2) -> tuple[float, float]:
    """The root mean square of the norm over the last steps of a run, and the mean of E||g||^2 ||W||^2 there.

    The loss is of the direction of the matrix alone, and every step sees other data.
    """
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(start * torch.randn(8, 8, dtype=torch.float64, generator=generator))
    by_hand = DECAY if recipe.optimizer == "sgdw" else 0.0
    optimizer = torch.optim.SGD(
        [weight],
        lr=RATE,
        weight_decay=DECAY - by_hand,
        momentum=recipe.momentum or 0.0,
        dampening=recipe.dampening or 0.0,
        nesterov=bool(recipe.nesterov),
    )
    noise = torch.randn(steps, 8, 8, dtype=torch.float64, generator=generator)
    norms, strengths = [], []
    for step in range(steps):
        optimizer.zero_grad()
        (noise[step] * weight / weight.norm()).sum().backward()
        assert weight.grad is not None
        if step >= steps - last:
            norms.append(float(weight.detach().square().sum()))
            strengths.append(float(weight.grad.square().sum()) * norms[-1])
        with torch.no_grad():
            weight.mul_(1 - RATE * by_hand)
        optimizer.step()
    return statistics.mean(norms) ** 0.5, statistics.mean(strengths)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "start"), [("plain", 0.05), ("heavy-ball", 0.05), *((name, 3.0) for name in RECIPES)])
def test_a_run_comes_to_the_norm_that_is_predicted_wherever_it_starts(name: str, start: float) -> None:
    recipe = recipe_of(name)
    norm, strength = settled(recipe, start)
    found = equilibrium_norm(recipe, norm, strength / norm**2)
    assert found.reason == ""
    assert found.predicted == pytest.approx(norm, rel=0.02)
    # The prediction is of the data and the recipe: it is the same from a matrix at any other norm.
    elsewhere = equilibrium_norm(recipe, 7 * norm, strength / (7 * norm) ** 2)
    assert elsewhere.predicted == pytest.approx(found.predicted)


def test_a_norm_that_started_far_too_large_has_arrived_once_one_is_predicted() -> None:
    norm, strength = settled(recipe_of("plain"), 3.0)
    steps = math.ceil(ARRIVED / (RATE * DECAY)) + 1
    assert equilibrium_norm(recipe_of("plain", steps=steps), norm, strength / norm**2).reason == ""
    by_then, _ = settled(recipe_of("plain"), 5 * norm / 8, steps, last=10)  # a matrix of 8 x 8 has the norm 8 * start
    assert by_then == pytest.approx(norm, rel=0.1)


def test_plain_and_heavy_ball_have_the_published_closed_forms() -> None:
    for momentum in (0.0, 0.5, 0.9):
        recipe = TrainingRecipe.from_dict(recipe_of("plain").to_dict() | {"momentum": momentum})
        published = RATE * 3.0 * 4.0 / (DECAY * (1 - momentum) * (2 - RATE * DECAY / (1 + momentum)))
        assert equilibrium_norm(recipe, 2.0, 3.0).predicted == pytest.approx(published**0.25)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"optimizer": "adamw", "momentum": None}, "SGD family"),
        ({"weight_decay": 0.0}, "grows forever"),
        ({"schedule": "cosine"}, "not constant"),
        ({"steps": 50}, "too short"),
        ({"learning_rate": None}, "unknown"),
    ],
)
def test_no_norm_is_predicted_where_the_premise_fails(change: dict[str, object], reason: str) -> None:
    found = equilibrium_norm(recipe_of("plain", **change), 1.0, 1.0)
    assert found.predicted is None
    assert reason in found.reason
    unmeasured = equilibrium_norm(recipe_of("plain"), 1.0, None)
    assert (unmeasured.predicted, unmeasured.norm) == (None, 1.0)
    assert "mini-batches" in unmeasured.reason
