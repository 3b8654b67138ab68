"""Stationary points and norm balance against optimizer runs in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from compressor.measure import TrainedNorm, norm_balance, scaling_degree, stationarity, stationary_penalty
from compressor.recipe import TrainingRecipe

DECAY = 0.05


def regression(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(20, 4, dtype=torch.float64, generator=generator)
    return inputs, inputs @ torch.randn(4, 3, dtype=torch.float64, generator=generator)


def loss_of(weights: Sequence[Tensor]) -> Tensor:
    inputs, targets = regression()
    hidden = inputs
    for weight in weights:
        hidden = hidden @ weight.T
    return (hidden - targets).square().mean()


def gradients(weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss_of(weights), list(weights))


def starts(*shapes: tuple[int, int], scale: float = 1.0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(scale * torch.randn(*shape, dtype=torch.float64, generator=generator)) for shape in shapes]


OPTIMIZERS = {
    "plain": TrainingRecipe(optimizer="sgd", momentum=0.0, weight_decay=DECAY),
    "momentum": TrainingRecipe(optimizer="sgd", momentum=0.8, weight_decay=DECAY),
    "dampened": TrainingRecipe(optimizer="sgd", momentum=0.8, dampening=0.5, weight_decay=DECAY),
    "nesterov": TrainingRecipe(optimizer="nesterov", momentum=0.8, weight_decay=DECAY),
    "decoupled": TrainingRecipe(optimizer="sgdw", momentum=0.0, weight_decay=DECAY),
    "decoupled momentum": TrainingRecipe(optimizer="sgdw", momentum=0.8, weight_decay=DECAY),
    "decoupled dampened": TrainingRecipe(optimizer="sgdw", momentum=0.8, dampening=0.5, weight_decay=DECAY),
    "decoupled nesterov": TrainingRecipe(optimizer="sgdw", nesterov=True, momentum=0.8, weight_decay=DECAY),
    "adam": TrainingRecipe(optimizer="adam", decoupled_weight_decay=False, weight_decay=DECAY),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_to_the_end_has_cosine_one_and_ratio_one(name: str) -> None:
    recipe = OPTIMIZERS[name]
    [weight] = starts((3, 4))
    by_hand = DECAY if recipe.decoupled_weight_decay else 0.0
    if name == "adam":
        optimizer: torch.optim.Optimizer = torch.optim.Adam([weight], lr=0.02, weight_decay=DECAY)
    else:
        optimizer = torch.optim.SGD(
            [weight],
            lr=0.2,
            weight_decay=DECAY - by_hand,
            momentum=recipe.momentum or 0.0,
            dampening=recipe.dampening or 0.0,
            nesterov=bool(recipe.nesterov),
        )
    begun = stationarity(weight, gradients([weight])[0], recipe, scale_invariant=False)
    for _ in range(1500):
        (weight.grad,) = gradients([weight])
        with torch.no_grad():
            weight.mul_(1 - 0.2 * by_hand)
        optimizer.step()
    ended = stationarity(weight, gradients([weight])[0], recipe, scale_invariant=False)
    assert ended.cosine == pytest.approx(1, abs=1e-9)
    assert ended.ratio == pytest.approx(1, abs=1e-6)
    assert begun.cosine is not None
    assert begun.cosine < 0.9


def test_adamw_stands_still_elsewhere_and_is_not_judged() -> None:
    recipe = TrainingRecipe(optimizer="adamw", weight_decay=DECAY)
    [weight] = starts((3, 4))
    optimizer = torch.optim.AdamW([weight], lr=0.01, weight_decay=DECAY)
    for _ in range(1500):
        (weight.grad,) = gradients([weight])
        optimizer.step()
    found = stationarity(weight, gradients([weight])[0], recipe, scale_invariant=False)
    assert found.ratio is None
    assert "adamw" in found.reason
    # The claim behind it: as if the decay were in the gradient, this is no stationary point.
    judged = stationarity(weight, gradients([weight])[0], OPTIMIZERS["adam"], scale_invariant=False)
    assert judged.ratio is not None
    assert not 0.5 < judged.ratio < 2


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (TrainingRecipe(), "unknown"),
        (TrainingRecipe(optimizer="sgd"), "unknown"),
        (TrainingRecipe(optimizer="sgd", weight_decay=0.0), "without weight decay"),
        (TrainingRecipe(optimizer="sgdw", weight_decay=0.1), "momentum is unknown"),
        (TrainingRecipe(optimizer="sgdw", weight_decay=0.1, momentum=0.9, dampening=1.0), "dampening"),
    ],
)
def test_no_penalty_is_made_up(recipe: TrainingRecipe, reason: str) -> None:
    penalty, why = stationary_penalty(recipe)
    assert penalty is None
    assert reason in why


def test_cosine_and_ratio_are_what_they_are_called() -> None:
    weight, gradient = starts((3, 4), (3, 4))
    found = stationarity(weight, gradient, OPTIMIZERS["plain"], scale_invariant=False)
    cosine = nn.functional.cosine_similarity(weight.flatten(), -gradient.flatten(), dim=0)
    assert found.cosine == pytest.approx(cosine.item())
    assert found.ratio == pytest.approx((gradient.norm() / weight.norm()).item() / DECAY)
    assert found.gradient_norm == pytest.approx(float(gradient.detach().norm()))
    zero = stationarity(weight, torch.zeros(3, 4), OPTIMIZERS["plain"], scale_invariant=False)
    assert (zero.cosine, zero.ratio, zero.gradient_norm) == (None, None, 0.0)


# Degrees


def functions() -> dict[str, tuple[nn.Module, int | None]]:
    """Networks whose first layer is studied, with the degree that algebra gives."""
    torch.manual_seed(0)
    return {
        "relu chain": (nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)), 1),
        "bias of its own": (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=False)), None),
        "bias after it": (nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3)), None),
        "batch norm": (nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)), 0),
        "layer norm": (nn.Sequential(nn.Linear(4, 6, bias=False), nn.LayerNorm(6), nn.Linear(6, 3)), 0),
        "layer norm after a bias": (nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)), None),
        "tanh": (nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3)), None),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", functions())
def test_degree_is_that_of_the_algebra(name: str, dtype: torch.dtype) -> None:
    network, degree = functions()[name]
    network.to(dtype)
    inputs = regression()[0].to(dtype)
    weight = network.get_parameter("0.weight")
    before = weight.detach().clone()
    assert scaling_degree(weight, lambda: network(inputs)) == degree
    assert torch.equal(weight, before)


def test_degree_zero_means_an_orthogonal_gradient() -> None:
    network = functions()["batch norm"][0].double()
    inputs, targets = regression()
    weight = network.get_parameter("0.weight")
    (gradient,) = torch.autograd.grad((network(inputs) - targets).square().mean(), weight)
    cosine = nn.functional.cosine_similarity(weight.flatten(), gradient.flatten(), dim=0)
    assert abs(cosine.item()) < 1e-4
    found = stationarity(weight, gradient, OPTIMIZERS["plain"], scale_invariant=True)
    assert (found.cosine, found.ratio) == (None, None)
    assert "scale-invariant" in found.reason


def test_a_layer_without_effect_has_no_degree() -> None:
    """Nothing changes, so that being unchanged by a scale says nothing."""
    weight = nn.Parameter(torch.ones(2, 2))
    assert scaling_degree(weight, lambda: torch.ones(3)) is None


def test_weights_are_put_back_when_the_model_fails() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    calls: list[int] = []

    def outputs() -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("out of memory")
        return weight.sum()[None]

    with pytest.raises(RuntimeError):
        scaling_degree(weight, outputs)
    assert torch.equal(weight, torch.ones(2, 2))


# Balance


def descend(weights: list[nn.Parameter], rate: float, steps: int) -> None:
    for _ in range(steps):
        with torch.no_grad():
            for weight, gradient in zip(weights, _with_grad(lambda: gradients(weights)), strict=True):
                weight.sub_(rate * (gradient + DECAY * weight))


def _with_grad(compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        return compute()


def balance_after(rate: float, time: float) -> tuple[float, float]:
    """Gap of squared norms of a deep linear net, measured and predicted, after gradient descent for some time."""
    weights = starts((5, 4), (6, 5), (3, 6), scale=0.4)
    with torch.no_grad():
        weights[0].mul_(3)
    initial = [float(weight.detach().norm()) for weight in weights]
    steps = round(time / rate)
    descend(weights, rate, steps)
    exponent = -steps * float(torch.log1p(torch.tensor(-rate * DECAY, dtype=torch.float64)))
    found = norm_balance(
        {
            str(index): TrainedNorm(float(weight.detach().norm()), start, DECAY, exponent)
            for index, (weight, start) in enumerate(zip(weights, initial, strict=True))
        }
    )
    assert found is not None
    assert found.predicted_gap is not None
    return found.gap, found.predicted_gap


def test_gap_is_that_of_gradient_flow_as_steps_shrink() -> None:
    """The error of descent against flow is of first order: it halves with the step."""
    errors = []
    for rate in (0.001, 0.0005):
        measured, predicted = balance_after(rate, time=1)
        errors.append(abs(measured - predicted))
        assert errors[-1] < 0.05 * predicted
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.1)


@pytest.mark.slow
def test_norms_are_equal_at_a_stationary_point() -> None:
    weights = starts((5, 4), (6, 5), (3, 6), scale=0.4)
    descend(weights, 0.1, 4000)
    for weight, gradient in zip(weights, gradients(weights), strict=True):
        assert stationarity(weight, gradient, OPTIMIZERS["plain"], scale_invariant=False).ratio == pytest.approx(1)
    norms = [float(weight.detach().norm()) for weight in weights]
    found = norm_balance({str(i): TrainedNorm(norm, None, DECAY, None) for i, norm in enumerate(norms)})
    assert found is not None
    assert found.spread == pytest.approx(1, abs=1e-6)
    assert found.predicted_gap is None
    assert found.reason


def test_balance_weighs_norms_by_their_penalties() -> None:
    """At a stationary point lambda_l ||W_l||^2 is the same for all."""
    found = norm_balance({"a": TrainedNorm(2.0, 1.0, 0.1, 3.0), "b": TrainedNorm(1.0, 1.0, 0.4, 12.0)})
    assert found is not None
    assert found.spread == pytest.approx(1)
    assert found.predicted_gap is None
    assert "differ" in found.reason
    assert norm_balance({"a": TrainedNorm(2.0, 1.0, 0.1, 3.0)}) is None
