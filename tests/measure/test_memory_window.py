"""The memory window and the forgetting exponent against actual optimizer runs in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import get_scheduler

from compressor.errors import BadInput
from compressor.measure import memory_window
from compressor.measure.memory_window import forgetting_exponent, retention
from compressor.recipe import TrainingRecipe

STEPS = 60

OPTIMIZERS = {
    "plain": TrainingRecipe(optimizer="sgd", momentum=0, learning_rate=0.5, weight_decay=0.4),
    "heavy-ball": TrainingRecipe(optimizer="sgd", momentum=0.4, learning_rate=0.5, weight_decay=0.2),
    "dampened": TrainingRecipe(optimizer="sgd", momentum=0.5, dampening=0.4, learning_rate=0.5, weight_decay=0.4),
    "oscillating": TrainingRecipe(optimizer="sgd", momentum=0.8, learning_rate=0.9, weight_decay=0.9),
    "nesterov": TrainingRecipe(optimizer="nesterov", momentum=0.4, learning_rate=0.5, weight_decay=0.2),
    "decoupled": TrainingRecipe(optimizer="sgdw", momentum=0.6, learning_rate=0.5, weight_decay=0.5),
    "decoupled-nesterov": TrainingRecipe(
        optimizer="sgdw", nesterov=True, momentum=0.6, learning_rate=0.5, weight_decay=0.5
    ),
    "adamw": TrainingRecipe(optimizer="adamw", learning_rate=0.5, weight_decay=0.4),
}
SCHEDULES = {
    "constant": {"schedule": "constant"},
    "linear": {"schedule": "linear"},
    "cosine": {"schedule": "cosine"},
    "step": {"schedule": "step", "step_milestones": (20, 45), "step_factor": 0.5},
    "warm-up": {"schedule": "cosine", "warmup_steps": 10},
}


def combine(optimizer: str, schedule: str, /, **more: object) -> TrainingRecipe:
    values = OPTIMIZERS[optimizer].to_dict() | SCHEDULES[schedule] | {"steps": STEPS, "batch_size": 1} | more
    return TrainingRecipe.from_dict(values)


class Run:
    """Training a matrix with given gradients, by torch's own optimizer and schedule, step by step."""

    def __init__(self, recipe: TrainingRecipe, weights: torch.Tensor) -> None:
        assert recipe.learning_rate is not None
        assert recipe.weight_decay is not None
        self.weights = torch.nn.Parameter(weights.clone())
        # torch has no SGDW: the decay is then done by hand, as the paper's algorithm says.
        self.decay_by_hand = recipe.weight_decay if recipe.optimizer == "sgdw" else 0.0
        common = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay - self.decay_by_hand}
        if recipe.optimizer == "adamw":
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW([self.weights], **common)
        elif recipe.optimizer == "adam":
            self.optimizer = torch.optim.Adam([self.weights], **common)
        else:
            self.optimizer = torch.optim.SGD(
                [self.weights],
                **common,
                momentum=recipe.momentum or 0.0,
                dampening=recipe.dampening or 0.0,
                nesterov=bool(recipe.nesterov),
            )
        self.scheduler = self.schedule(recipe)

    def schedule(self, recipe: TrainingRecipe) -> torch.optim.lr_scheduler.LRScheduler:
        steps = recipe.steps
        if recipe.warmup_steps:
            return get_scheduler("cosine", self.optimizer, int(recipe.warmup_steps), steps)
        if recipe.schedule == "linear":
            return torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.0, steps)
        if recipe.schedule == "cosine":
            return torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        milestones = list(recipe.step_milestones or ())
        return torch.optim.lr_scheduler.MultiStepLR(self.optimizer, milestones, recipe.step_factor or 1.0)

    def train(self, gradients: torch.Tensor) -> None:
        for gradient in gradients:
            with torch.no_grad():
                self.weights.mul_(1 - self.optimizer.param_groups[0]["lr"] * self.decay_by_hand)
            self.weights.grad = gradient.clone()
            self.optimizer.step()
            self.scheduler.step()

    @property
    def buffer(self) -> torch.Tensor:
        buffer = self.optimizer.state[self.weights].get("momentum_buffer")
        return torch.zeros_like(self.weights) if buffer is None else buffer


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained(recipe: TrainingRecipe, steps: int, gradients: torch.Tensor) -> Run:
    run = Run(recipe, random(4, 5, seed=1))
    run.train(gradients[:steps])
    return run


def responses(recipe: TrainingRecipe, last: int) -> tuple[float, float]:
    """How a disturbance of the weights, and one of the buffer, `last` steps before the end ends up."""
    gradients = random(STEPS, 4, 5)
    before = trained(recipe, STEPS - last, gradients)
    undisturbed = copy.deepcopy(before)
    undisturbed.train(gradients[STEPS - last :])
    disturbance = random(4, 5, seed=2)
    found = []
    for target in ("weights", "buffer"):
        disturbed = copy.deepcopy(before)
        with torch.no_grad():
            getattr(disturbed, target).add_(disturbance)
        disturbed.train(gradients[STEPS - last :])
        difference = (disturbed.weights - undisturbed.weights).detach()
        share = ((difference * disturbance).sum() / disturbance.square().sum()).item()
        # What is left of a matrix is a multiple of it: no entry is forgotten faster than another.
        assert torch.allclose(difference, share * disturbance, rtol=0, atol=1e-12)
        found.append(share)
    return found[0], found[1]


every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


@pytest.mark.slow
@every_schedule
@every_optimizer
@pytest.mark.parametrize("last", [1, 2, 17, STEPS - 1])
def test_retention_is_the_response_to_a_disturbance(optimizer: str, schedule: str, last: int) -> None:
    recipe = combine(optimizer, schedule)
    weights, buffer = responses(recipe, last)
    predicted = retention(recipe, last)
    assert predicted.weights == pytest.approx(weights, rel=1e-9, abs=1e-12)
    assert predicted.buffer == pytest.approx(buffer, rel=1e-9, abs=1e-12)


@every_schedule
@every_optimizer
def test_window_is_the_first_at_which_no_more_than_epsilon_is_left(optimizer: str, schedule: str) -> None:
    recipe = combine(optimizer, schedule)
    epsilon = 0.15
    window = memory_window(recipe, shape=(4, 5), uses=1, epsilon=epsilon)
    assert window.steps is not None
    assert window.steps < STEPS
    assert window.exceeds_training is False

    def left(last: int) -> float:
        weights, buffer = responses(recipe, last)
        assert recipe.learning_rate is not None
        return abs(weights) + abs(buffer) / recipe.learning_rate

    assert left(window.steps) <= epsilon + 1e-12
    assert left(window.steps - 1) > epsilon - 1e-12


@every_schedule
@every_optimizer
def test_exponent_is_what_is_left_of_the_initialization(optimizer: str, schedule: str) -> None:
    recipe = combine(optimizer, schedule)
    gradients = random(STEPS, 4, 5)
    first, second = random(4, 5, seed=3), random(4, 5, seed=4)
    ends = []
    for start in (first, second):
        run = Run(recipe, start)
        run.train(gradients)
        ends.append(run.weights.detach())
    exponent, reason = forgetting_exponent(recipe)
    assert exponent is not None
    assert not reason
    share = torch.linalg.norm(ends[0] - ends[1]) / torch.linalg.norm(first - second)
    assert math.exp(-exponent) == pytest.approx(share.item(), rel=1e-6, abs=1e-14)
    window = memory_window(recipe, shape=(4, 5), uses=1)
    assert window.forgetting_exponent == exponent


@pytest.mark.slow
@every_schedule
@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "adamw"])
def test_what_the_window_wrote_has_the_rank_of_the_bound(optimizer: str, schedule: str) -> None:
    """A linear layer trained on batches of 2 examples with 2 positions each, its gradients from autograd."""
    recipe = combine(optimizer, schedule, batch_size=2)
    window = memory_window(recipe, shape=(250, 260), uses=2, epsilon=0.5)
    assert window.steps is not None
    run = Run(recipe, 0.1 * random(250, 260, seed=5))
    for step in range(STEPS):
        if step == STEPS - window.steps:
            weights, buffer = run.weights.detach().clone(), run.buffer.clone()
        inputs, targets = random(2, 2, 260, seed=step), random(2, 2, 250, seed=1000 + step)
        outputs = inputs @ run.weights.T
        loss = torch.nn.functional.smooth_l1_loss(outputs, targets, reduction="none").sum((1, 2)).mean()
        (gradient,) = torch.autograd.grad(loss, run.weights)
        run.train(gradient[None])
    left = retention(recipe, window.steps)
    written = run.weights.detach() - left.weights * weights - left.buffer * buffer
    bound = 2 * 2 * window.steps
    assert window.rank_bound == bound
    assert window.vacuous is False
    values = torch.linalg.svdvals(written)
    # Generic batches reach the bound, unless the learning rate of the last steps was as good as 0.
    assert values[bound] < 1e-12 * values[0]
    assert values[bound // 2] > 1e-9 * values[0]
    # Relative to the weights before the window, what it did not write is at most epsilon.
    residual = torch.linalg.norm(run.weights - written)
    assert recipe.learning_rate is not None
    before = max(torch.linalg.norm(weights), recipe.learning_rate * torch.linalg.norm(buffer))
    assert residual <= 0.5 * before * (1 + 1e-9)


def test_adam_with_decay_in_the_gradient_has_no_window() -> None:
    recipe = TrainingRecipe(
        optimizer="adam",
        learning_rate=0.1,
        weight_decay=0.4,
        schedule="constant",
        steps=STEPS,
    )
    window = memory_window(recipe, shape=(4, 5), uses=1)
    assert (window.steps, window.rank_bound, window.forgetting_exponent) == (None, None, None)
    assert "own rate" in window.reason
    # The claim behind it: what is left of a disturbance is no multiple of it.
    gradients = random(STEPS, 4, 5)
    first, second = Run(recipe, random(4, 5, seed=1)), Run(recipe, random(4, 5, seed=1) + 1)
    first.train(gradients)
    second.train(gradients)
    shares = (second.weights - first.weights).detach()
    assert shares.max() - shares.min() > 0.1


def test_adamw_has_a_window_and_no_bound() -> None:
    window = memory_window(combine("adamw", "constant"), shape=(64, 64), uses=1)
    assert window.steps == math.ceil(math.log(0.1) / math.log(1 - 0.5 * 0.4))
    assert window.rank_bound is None
    assert window.vacuous is None
    assert "adamw" in window.reason
    # The claim behind it: one update from a rank-one gradient has full rank.
    run = Run(combine("adamw", "constant", weight_decay=0.0), torch.zeros(8, 8, dtype=torch.float64))
    run.train(random(2, 8, 1) @ random(2, 1, 8, seed=1))
    assert torch.linalg.matrix_rank(run.weights.detach()) > 2


learning_rates = st.floats(1e-3, 0.9)
decays = st.floats(1e-3, 0.9)
momenta = st.floats(0.0, 0.95)


@given(
    learning_rate=learning_rates,
    decay=decays,
    momentum=momenta,
    optimizer=st.sampled_from(["sgd", "nesterov", "sgdw"]),
    epsilon=st.floats(0.01, 0.9),
)
@settings(max_examples=60)
def test_unknown_length_of_a_constant_schedule_does_not_matter(
    learning_rate: float, decay: float, momentum: float, *, optimizer: str, epsilon: float
) -> None:
    recipe = TrainingRecipe(
        optimizer=optimizer,
        momentum=momentum,
        learning_rate=learning_rate,
        weight_decay=decay,
        schedule="constant",
    )
    window = memory_window(recipe, shape=(4, 4), uses=1, epsilon=epsilon)
    assert window.steps is not None
    assert window.exceeds_training is None
    values = recipe.to_dict() | {"steps": min(window.steps, 50_000) + 1}
    longer = memory_window(TrainingRecipe.from_dict(values), shape=(4, 4), uses=1, epsilon=epsilon)
    if window.steps > 50_000:
        # All of it may be the window: training starts with an empty buffer, so less is left of the start than of a
        # state as long ago in the middle.
        assert longer.exceeds_training or longer.steps == 50_001
    else:
        assert longer.steps is not None
        # Roots off the positive axis make what is left swing: an earlier step may reach epsilon for a moment.
        rate = learning_rate * decay
        swings = rate > (1 - math.sqrt(momentum)) ** 2
        assert longer.steps == window.steps or (swings and longer.steps < window.steps)


@given(learning_rate=learning_rates, decay=decays, momentum=momenta, nesterov=st.booleans(), last=st.integers(1, 40))
@settings(max_examples=100)
def test_retention_is_the_impulse_response_of_the_characteristic_roots(
    learning_rate: float, decay: float, momentum: float, *, nesterov: bool, last: int
) -> None:
    """W'' - trace W' + determinant W = 0; its impulse response h gives p = h_n - momentum * h_(n-1)."""
    rate = learning_rate * decay
    if nesterov:
        trace, determinant = (1 + momentum) * (1 - rate), momentum * (1 - rate)
    else:
        trace, determinant = 1 + momentum - rate, momentum
    response = [0.0, 1.0]
    for _ in range(last):
        response.append(trace * response[-1] - determinant * response[-2])
    recipe = TrainingRecipe(
        optimizer="sgd",
        nesterov=nesterov,
        momentum=momentum,
        learning_rate=learning_rate,
        weight_decay=decay,
        schedule="constant",
        steps=100,
    )
    pull = momentum**2 if nesterov else momentum
    found = retention(recipe, last)
    assert found.weights == pytest.approx(response[-1] - momentum * response[-2], abs=1e-10)
    assert found.buffer == pytest.approx(-learning_rate * pull * response[-2], abs=1e-10)


@given(learning_rates, decays, st.floats(0.001, 0.9))
@settings(max_examples=60)
def test_plain_sgd_has_the_closed_form(learning_rate: float, decay: float, epsilon: float) -> None:
    recipe = TrainingRecipe(
        optimizer="sgd", momentum=0, learning_rate=learning_rate, weight_decay=decay, schedule="constant"
    )
    steps = memory_window(recipe, shape=(4, 4), uses=1, epsilon=epsilon).steps
    assert steps is not None
    kept = 1 - learning_rate * decay
    assert kept**steps <= epsilon * (1 + 1e-9)
    assert kept ** (steps - 1) > epsilon * (1 - 1e-9)


def test_annealing_to_zero_stretches_the_window() -> None:
    """The asymptotic windows of linear and cosine annealing, from integrating the last steps' rates."""
    common = {"optimizer": "sgd", "momentum": 0, "learning_rate": 0.2, "weight_decay": 0.05}
    forgotten, steps = math.log(1 / 0.01), 3000
    expected = {
        "linear": math.sqrt(2 * steps * forgotten / 0.01),
        "cosine": (12 * steps**2 * forgotten / (math.pi**2 * 0.01)) ** (1 / 3),
    }
    for schedule, asymptotic in expected.items():
        recipe = TrainingRecipe.from_dict({**common, "schedule": schedule, "steps": steps})
        found = memory_window(recipe, shape=(4, 4), uses=1, epsilon=0.01).steps
        # The cosine is taken to second order, and the window reaches well into the fourth.
        assert found == pytest.approx(asymptotic, rel=0.002 if schedule == "linear" else 0.07)


def test_bound_is_vacuous_from_the_full_rank_on() -> None:
    recipe = combine("plain", "constant")
    steps = memory_window(recipe, shape=(9, 9), uses=1).steps
    assert steps is not None
    below = memory_window(recipe, shape=(9999, steps + 1), uses=1)
    assert (below.rank_bound, below.vacuous, below.reason) == (steps, False, "")
    equal = memory_window(recipe, shape=(steps, 9999), uses=1)
    assert (equal.rank_bound, equal.vacuous) == (steps, True)
    assert "vacuous" in equal.reason


def test_window_longer_than_the_training_has_no_bound() -> None:
    recipe = combine("plain", "constant", weight_decay=1e-3)
    window = memory_window(recipe, shape=(400, 400), uses=1)
    assert window.steps is None
    assert window.exceeds_training is True
    assert window.rank_bound is None
    assert window.vacuous is None
    assert "exceeds" in window.reason
    assert window.forgetting_exponent == pytest.approx(-STEPS * math.log1p(-0.5e-3))


@pytest.mark.parametrize("optimizer", ["plain", "nesterov", "adamw"])
def test_without_decay_everything_is_retained(optimizer: str) -> None:
    recipe = combine(optimizer, "cosine", weight_decay=0.0)
    window = memory_window(recipe, shape=(4, 4), uses=1)
    assert window.steps is None
    assert window.rank_bound is None
    assert window.forgetting_exponent == 0
    assert "without weight decay" in window.reason
    assert retention(recipe, 20).weights == 1
    weights, buffer = responses(recipe, 20)
    assert weights == pytest.approx(1)
    assert retention(recipe, 20).buffer == pytest.approx(buffer)


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("optimizer", "optimizer"),
        ("momentum", "momentum"),
        ("weight_decay", "weight decay"),
        ("learning_rate", "learning rate"),
        ("schedule", "schedule"),
        ("steps", "number of steps"),
    ],
)
def test_what_is_unknown_is_said(missing: str, reason: str) -> None:
    window = memory_window(combine("plain", "cosine", **{missing: None}), shape=(4, 4), uses=1)
    assert (window.steps, window.rank_bound, window.forgetting_exponent) == (None, None, None)
    assert f"{reason} is unknown" in window.reason


@pytest.mark.parametrize(("unknown", "uses"), [({"batch_size": None}, 1), ({}, None)])
def test_window_without_what_the_bound_needs(unknown: dict[str, None], uses: int | None) -> None:
    window = memory_window(combine("plain", "constant", **unknown), shape=(400, 400), uses=uses)
    assert window.steps is not None
    assert window.rank_bound is None
    assert "no rank bound" in window.reason


@pytest.mark.parametrize("steps", [None, STEPS])
def test_divergent_decay_has_no_window(steps: int | None) -> None:
    recipe = combine("plain", "constant", learning_rate=3.0, weight_decay=1.0, steps=steps)
    window = memory_window(recipe, shape=(4, 4), uses=1)
    assert window.steps is None
    assert window.forgetting_exponent is None
    assert "does not contract" in window.reason


def test_decay_in_one_step() -> None:
    recipe = combine("plain", "constant", learning_rate=1.0, weight_decay=1.0)
    window = memory_window(recipe, shape=(4, 4), uses=1)
    assert window.steps == 1
    assert window.forgetting_exponent == math.inf


def test_long_forgetting_does_not_underflow() -> None:
    recipe = combine("heavy-ball", "constant", steps=20_000)
    exponent, _ = forgetting_exponent(recipe)
    trace = 1 + 0.4 - 0.5 * 0.2
    root = (trace + math.sqrt(trace**2 - 4 * 0.4)) / 2
    assert exponent == pytest.approx(-20_000 * math.log(root), rel=1e-4)


@pytest.mark.parametrize("epsilon", [0.0, 1.0, -0.1, math.nan])
def test_epsilon_is_a_fraction(epsilon: float) -> None:
    with pytest.raises(BadInput, match="epsilon"):
        memory_window(combine("plain", "constant"), shape=(4, 4), uses=1, epsilon=epsilon)


def test_retention_needs_the_steps() -> None:
    with pytest.raises(BadInput, match="fewer than 61"):
        retention(combine("plain", "constant"), STEPS + 1)
    with pytest.raises(BadInput, match="number of steps is unknown"):
        retention(combine("plain", "constant", steps=None), 3)
    assert retention(combine("plain", "constant"), 0).weights == 1
