"""What is left of an earlier state: the shortcuts over long stretches beside the steps one by one."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import pytest

from compressor.measure import memory_window
from compressor.measure.memory_window import forgetting_exponent, retention
from compressor.measure.retention import recursion_of, state_before_the_end
from compressor.recipe import TrainingRecipe

SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {},
    "linear": {},
    "cosine": {},
    "step": {"step_milestones": (9_000, 11_000, 29_000), "step_factor": 0.2},
    "rising": {"schedule": "step", "step_milestones": (9_000, 11_000, 12_000, 29_000), "step_factor": 2.0},
    "stopped early": {"schedule": "cosine", "schedule_steps": 50_000},
}


def recipe(schedule: str, steps: int = 40_000, **changes: Any) -> TrainingRecipe:
    values = {"optimizer": "sgd", "momentum": 0.9, "learning_rate": 0.1, "weight_decay": 5e-4, "schedule": schedule}
    return TrainingRecipe(**values | {"steps": steps} | SCHEDULES[schedule] | changes)


def one_by_one(of: TrainingRecipe, epsilon: float) -> tuple[float, int | None, list[tuple[float, float]]]:
    """K, the window, and p and q after every thousandth step, by multiplying the matrices of all steps."""
    rates = of.learning_rates()
    assert rates is not None
    step, peak = recursion_of(of), of.learning_rate
    p, q, log_scale, window, states = 1.0, 0.0, 0.0, None, []
    for count, rate in enumerate(rates[::-1].tolist(), start=1):
        if count == len(rates):
            step = recursion_of(of, first=True)
        p, q = p - rate * step.decay * p + step.feed * q, step.momentum * q - rate * step.pull * p
        if not 1e-100 < abs(p) + abs(q) < 1e100:
            size = abs(p) + abs(q)
            p, q, log_scale = p / size, q / size, log_scale + math.log(size)
        left = abs(p) + (abs(q) / peak if count < len(rates) else 0.0)
        if window is None and math.log(left) + log_scale <= math.log(epsilon):
            window = count
        if count % 1000 == 0:
            states.append((p * math.exp(log_scale), q * math.exp(log_scale)))
    return -math.log(abs(p)) - log_scale, window, states


@pytest.mark.slow
@pytest.mark.parametrize("warmup", [0, 6_000])
@pytest.mark.parametrize(
    "optimizer",
    [
        {"momentum": 0.0},
        {},
        {"nesterov": True},
        {"nesterov": True, "momentum": 0.99, "weight_decay": 1e-4},
        {"dampening": 0.3},
        {"decoupled_weight_decay": True, "momentum": 0.95},
        {"optimizer": "adamw", "momentum": None},
        # Weak at the end of a schedule, and too strong for a shortcut at its peak.
        {"weight_decay": 0.04},
    ],
    ids=["plain", "momentum", "nesterov", "heavy", "dampening", "sgdw", "adamw", "strong"],
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_shortcuts_give_what_all_steps_give(schedule: str, optimizer: dict[str, Any], warmup: int) -> None:
    of = recipe(schedule, **{"warmup_steps": warmup} | optimizer)
    exponent, window, states = one_by_one(of, 0.6)
    found, _ = forgetting_exponent(of)
    # Beyond exp(-745) nothing is left in float64.
    assert found == pytest.approx(exponent, rel=1e-9) or (found == math.inf and exponent > 745)
    assert memory_window(of, (9, 9), 1, epsilon=0.6).steps == window
    for index in (0, 7, 20, 38):
        left = retention(of, 1000 * (index + 1))
        assert (left.weights, left.buffer) == pytest.approx(states[index], rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("steps", [1, 5, 10_000])
@pytest.mark.parametrize("weight_decay", [0.007, 0.5, 3.0])
def test_a_first_step_without_dampening_may_turn_the_sign(weight_decay: float, steps: int) -> None:
    """The first buffer is the gradient itself, and so are the many steps' worth of decay that it leads to."""
    of = recipe("constant", steps, learning_rate=1.67, weight_decay=weight_decay, momentum=0.999, dampening=1.0)
    exponent, window, _ = one_by_one(of, 0.6)
    found, reason = forgetting_exponent(of)
    assert found == pytest.approx(exponent, rel=1e-9) if exponent >= 0 else "does not contract" in reason
    assert memory_window(of, (9, 9), 1, epsilon=0.6).steps == window


@pytest.mark.parametrize("warmup", [0, 2000, 0.03])
@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "step"])
def test_a_hundred_million_steps_take_no_time(schedule: str, momentum: float, warmup: float) -> None:
    steps = 10**8
    milestones = {"step_milestones": (steps // 2,), "step_factor": 0.1} if schedule == "step" else {}
    of = recipe(schedule, steps, momentum=momentum, warmup_steps=warmup, weight_decay=1e-7, **milestones)
    started = time.process_time()
    exponent, _ = forgetting_exponent(of)
    window = memory_window(of, (9, 9), 1)
    assert time.process_time() - started < 1
    mean = {"constant": 1.0, "linear": 0.5, "cosine": 0.5, "step": 0.55}[schedule]
    # The warm-up takes half of the rate off its steps, and moves what comes after.
    assert exponent == pytest.approx(steps * mean * 0.1 * 1e-7 / (1 - momentum), rel=0.03)
    assert window.steps is not None or (window.exceeds_training and exponent < math.log(10))


def test_decay_that_rounding_would_swallow_is_weak_and_not_too_strong() -> None:
    weak = TrainingRecipe(optimizer="sgd", momentum=0.0, learning_rate=1e-9, weight_decay=1e-9, schedule="constant")
    for momentum in (0.0, 0.9):
        window = memory_window(replace(weak, momentum=momentum, batch_size=1), (9, 9), 1)
        # A buffer as large as a step of the weights counts 1 / (1 - momentum) times.
        assert window.steps == pytest.approx(math.log(10 / (1 - momentum)) * 1e18 * (1 - momentum), rel=1e-12)
        assert (window.vacuous, "does not contract" in window.reason) == (True, False)
        run = replace(weak, momentum=momentum, steps=1000)
        # The first steps' momentum has not built up: hence less than 1000 steps' worth.
        assert forgetting_exponent(run)[0] == pytest.approx(1e-15 / (1 - momentum), rel=0.03)


@pytest.mark.parametrize(("learning_rate", "weight_decay"), [(2.0, 1.0), (20.0, 0.1), (1.0, 0.5), (30.0, 0.1)])
def test_strong_decay_over_many_steps_ends_too(learning_rate: float, weight_decay: float) -> None:
    of = recipe("constant", 10**8, momentum=0.0, learning_rate=learning_rate, weight_decay=weight_decay)
    started = time.process_time()
    exponent, reason = forgetting_exponent(of)
    assert time.process_time() - started < 2
    product = learning_rate * weight_decay
    if product > 2:
        assert (exponent, "does not contract" in reason) == (None, True)
    elif product == 2:
        assert exponent == pytest.approx(0.0, abs=1e-6)
    else:
        assert exponent is not None
        assert exponent > 745
    assert state_before_the_end(of, 3)[0] == pytest.approx((1 - product) ** 3)
