"""The numbers that the theory's sources print, computed again: where they hold, and where they need a correction.

Galanti, Siegel, Gupte and Poggio (arXiv 2206.05794) write the step as `W' = (1 - 2 mu lambda) W - mu G`, so their
lambda is half of PyTorch's weight decay.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from compressor import TrainingRecipe, memory_window
from compressor.measure import singular_values, stable_rank


def plain(learning_rate: float, weight_decay: float, batch_size: int) -> TrainingRecipe:
    return TrainingRecipe(
        optimizer="sgd",
        momentum=0.0,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        schedule="constant",
        batch_size=batch_size,
    )


@pytest.mark.parametrize(("epsilon", "plotted"), [(0.3, 4520), (0.5, 2600), (0.7, 1340)])
def test_bounds_of_figure_6(epsilon: float, plotted: int) -> None:
    """Width 10000, B = 6, mu = 0.1, lambda = 0.008: the plotted bounds are these, and their code's are twice as far.

    The code that comes with the paper passes lambda as PyTorch's weight decay, which forgets half as fast.
    """
    window = memory_window(plain(0.1, 2 * 0.008, 6), (10_000, 10_000), 1, epsilon=epsilon)
    assert window.rank_bound == pytest.approx(plotted, rel=0.005)
    assert window.vacuous is False
    of_code = memory_window(plain(0.1, 0.008, 6), (10_000, 10_000), 1, epsilon=epsilon)
    assert of_code.rank_bound == pytest.approx(2 * plotted, rel=0.005)


def test_at_an_error_of_a_tenth_theorem_3_3_says_nothing_of_figure_6() -> None:
    """Its log(2 / epsilon) allows for norms that fall by half within the window."""
    theorem = memory_window(plain(0.1, 2 * 0.008, 6), (10_000, 10_000), 1, epsilon=0.1 / 2)
    assert theorem.rank_bound == pytest.approx(6 * math.log(2 / 0.1) / (2 * 0.1 * 0.008), rel=0.005)
    assert theorem.vacuous is True


@pytest.mark.parametrize(("rate", "penalty", "labeled", "steps"), [(0.10, 0.10, 461, 228), (0.02, 0.01, 23026, 11511)])
def test_horizons_that_the_blog_labels_are_twice_its_own_recursions(
    rate: float, penalty: float, labeled: int, *, steps: int
) -> None:
    assert round(math.log(100) / (rate * penalty)) == labeled
    assert memory_window(plain(rate, 2 * penalty, 1), (8, 8), 1, epsilon=0.01).steps == steps
    # As PyTorch's weight decay the label would be right, to first order in the rate.
    as_decay = memory_window(plain(rate, penalty, 1), (8, 8), 1, epsilon=0.01).steps
    assert as_decay == pytest.approx(labeled, rel=0.01)


COMMON = {"momentum": 0.9, "schedule": "cosine", "nesterov": False}
MAINSTREAM = {
    "ResNet-18 on CIFAR": (
        {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 5e-4, "batch_size": 128, "steps": 78_200} | COMMON,
        (512, 4608),
        16,
    ),
    "ResNet-50 on ImageNet": (
        {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 1e-4, "batch_size": 256, "steps": 450_000} | COMMON,
        (512, 4608),
        49,
    ),
    "perceptron of width 1024": (
        {
            "optimizer": "sgd",
            "momentum": 0.0,
            "learning_rate": 0.1,
            "weight_decay": 5e-3,
            "schedule": "constant",
            "batch_size": 1,
        },
        (1024, 1024),
        1,
    ),
}


@pytest.mark.parametrize("name", MAINSTREAM)
def test_the_bound_is_vacuous_for_conventional_recipes(name: str) -> None:
    values, shape, uses = MAINSTREAM[name]
    window = memory_window(TrainingRecipe.from_dict(values), shape, uses)
    assert window.rank_bound is not None
    assert window.rank_bound > 4 * min(shape)
    assert window.vacuous is True


def test_vision_transformer_of_adamw_has_a_window_and_no_bound() -> None:
    values = {"optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.05, "batch_size": 1024}
    recipe = TrainingRecipe.from_dict(values | {"schedule": "cosine", "steps": 375_000})
    window = memory_window(recipe, (768, 768), 196)
    assert window.steps == pytest.approx(210_000, rel=0.02)
    assert window.forgetting_exponent == pytest.approx(9.4, abs=0.05)
    assert window.rank_bound is None


@pytest.mark.slow
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_stable_ranks_of_a_stationary_network_are_bounded_by_its_norms(depth: int) -> None:
    """The geometric mean of the stable ranks is at most (prod ||W||_F ||x|| / |f(x)|)^(2 / depth), at any x.

    Weight decay keeps the norms small and the loss keeps |f| large, which is what makes the ranks low.
    """
    torch.manual_seed(0)
    inputs = torch.nn.functional.normalize(torch.randn(40, 20, dtype=torch.float64))
    labels = (inputs[:, 0] > 0).double()
    sizes = [20, *[24] * (depth - 1), 1]
    weights = [torch.nn.Parameter(torch.randn(o, i).double() / i**0.5) for i, o in pairwise(sizes)]
    optimizer = torch.optim.SGD(weights, lr=0.5, weight_decay=2e-3)

    def outputs() -> torch.Tensor:
        hidden = inputs
        for weight in weights[:-1]:
            hidden = (hidden @ weight.T).relu()
        return (hidden @ weights[-1].T).squeeze(1)

    def bound_and_mean() -> tuple[float, float]:
        norms = math.prod(float(weight.detach().norm()) for weight in weights)
        largest = float(outputs().detach().abs().max())
        ranks = [stable_rank(singular_values(weight.detach())) for weight in weights]
        return (norms / largest) ** (2 / depth), math.prod(ranks) ** (1 / depth)

    before, _ = bound_and_mean()
    for _ in range(1200):
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(outputs(), labels).backward()
        optimizer.step()
    bound, mean = bound_and_mean()
    assert mean <= bound
    # It says something: less than the full rank, and less than before training.
    assert bound < min(before, 20) / 2
