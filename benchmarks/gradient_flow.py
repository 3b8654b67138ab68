"""Gradient flow of bias-free ReLU networks to a stationary point of a loss with weight decay, in float64.

The flow is `dW/dt = -(gradient of the mean loss + wd W)` on all examples. Stationary points of ReLU networks lie at
corners: inputs of neurons are held at exactly zero, where the gradient jumps and never vanishes. Corners are therefore
rounded, quadratic within `corner` of zero, which makes the slope there a number between 0 and 1: an element of the
subdifferential, and the flow that of Filippov as the corner shrinks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """A network's training loss: the mean cross-entropy, plus half of `weight_decay` times the squared norm.

    Attributes:
        inputs: `(N, d)`.
        labels: `(N,)`, the classes; 0 and 1 for a network of one output, whose loss is the logistic one.
        sizes: The widths of inputs, hidden layers, and outputs.
        weight_decay: wd.
        corner: Half of the width in which the corners of ReLUs are rounded, in units of what enters them.
    """

    inputs: Array
    labels: NDArray[np.int64]
    sizes: tuple[int, ...]
    weight_decay: float
    corner: float

    def layers(self, weights: Array) -> list[Array]:
        """The matrices, `(d_out, d_in)` each, as views of the vector of all weights."""
        shapes = [(d_out, d_in) for d_in, d_out in pairwise(self.sizes)]
        places = np.cumsum([0, *(math.prod(shape) for shape in shapes)])
        return [weights[a:b].reshape(shape) for (a, b), shape in zip(pairwise(places), shapes, strict=True)]


@dataclass(frozen=True)
class Steps:
    """How the flow is followed: steps of Runge and Kutta at first, then implicit ones that grow with the time.

    Attributes:
        explicit: The length of the first steps, of fourth order.
        explicit_until: The time up to which they are taken.
        growth: The length of an implicit Euler step, as a share of the time gone by.
        residual: The flow ends where `||gradient + wd W|| / ||wd W||` is below this,
        longest: or at this time.
    """

    explicit: float = 0.05
    explicit_until: float = 50.0
    growth: float = 0.05
    residual: float = 1e-3
    longest: float = 1e7

    def halved(self) -> Steps:
        return replace(self, explicit=self.explicit / 2, growth=self.growth / 2)


@dataclass(frozen=True)
class Flowed:
    """Where the flow has come to."""

    weights: Array
    time: float
    residual: float


def start(sizes: Sequence[int], seed: int) -> Array:
    """Normal matrices of standard deviation `1 / sqrt(d_in)`, as one vector."""
    generator = np.random.default_rng(seed)
    return np.concatenate(
        [generator.standard_normal(d_out * d_in) / math.sqrt(d_in) for d_in, d_out in pairwise(sizes)]
    )


def rounded_relu(values: Array, corner: float) -> tuple[Array, Array]:
    """A ReLU that is quadratic within `corner` of zero, and its slope."""
    if corner == 0:
        return np.maximum(values, 0), (values > 0).astype(np.float64)
    slope = np.clip((values + corner) / (2 * corner), 0, 1)
    return np.where(np.abs(values) < corner, corner * slope**2, np.maximum(values, 0)), slope


def outputs(layers: Sequence[Array], inputs: Array) -> Array:
    """What a network of plain ReLUs computes, `(N, outputs)`."""
    for layer in layers[:-1]:
        inputs = np.maximum(inputs @ layer.T, 0)
    return inputs @ layers[-1].T


def cross_entropy(logits: Array, labels: NDArray[np.int64]) -> tuple[float, Array]:
    """The mean over the examples, and its gradient at the logits."""
    if logits.shape[1] == 1:
        signed = (1 - 2 * labels) * logits[:, 0]
        slope = (1 - 2 * labels) * np.exp(-np.logaddexp(0, -signed))
        return float(np.logaddexp(0, signed).mean()), slope[:, None] / len(labels)
    logits = logits - logits.max(1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    gradient = np.exp(logs)
    examples = np.arange(len(labels))
    gradient[examples, labels] -= 1
    return float(-logs[examples, labels].mean()), gradient / len(labels)


def loss_and_gradient(weights: Array, problem: Problem) -> tuple[float, Array]:
    """The loss with weight decay, and its gradient, by backpropagation."""
    layers = problem.layers(weights)
    hidden, slopes = [problem.inputs], []
    for layer in layers[:-1]:
        value, slope = rounded_relu(hidden[-1] @ layer.T, problem.corner)
        hidden.append(value)
        slopes.append(slope)
    loss, back = cross_entropy(hidden[-1] @ layers[-1].T, problem.labels)
    gradient = problem.weight_decay * weights
    for place in reversed(range(len(layers))):
        problem.layers(gradient)[place][:] += back.T @ hidden[place]
        if place:
            back = (back @ layers[place]) * slopes[place - 1]
    return loss + problem.weight_decay / 2 * float(weights @ weights), gradient


def residual(weights: Array, problem: Problem) -> float:
    """`||gradient + wd W|| / ||wd W||`: zero at a stationary point."""
    norm = problem.weight_decay * np.linalg.norm(weights)
    return float(np.linalg.norm(loss_and_gradient(weights, problem)[1]) / norm)


def flow(problem: Problem, weights: Array, steps: Steps) -> Flowed:
    """Follow the flow from `weights` until its residual is small."""
    time = 0.0

    def velocity(at: Array) -> Array:
        return -loss_and_gradient(at, problem)[1]

    while time < steps.explicit_until:
        h = steps.explicit
        first = velocity(weights)
        second = velocity(weights + h / 2 * first)
        third = velocity(weights + h / 2 * second)
        fourth = velocity(weights + h * third)
        weights = weights + h / 6 * (first + 2 * second + 2 * third + fourth)
        time += h
    while (left := residual(weights, problem)) > steps.residual and time < steps.longest:
        h = steps.growth * time
        weights = implicit_step(problem, weights, h)
        time += h
    return Flowed(weights, time, left)


def implicit_step(problem: Problem, weights: Array, h: float, *, accuracy: float = 0.01) -> Array:
    """An implicit Euler step: the least of the loss plus `||W - weights||^2 / (2 h)`.

    Found by L-BFGS from `weights`, until the equation of the step is met to `accuracy` of the step.
    """

    def objective(at: Array) -> tuple[float, Array]:
        loss, gradient = loss_and_gradient(at, problem)
        moved = at - weights
        return loss + float(moved @ moved) / (2 * h), gradient + moved / h

    def met(intermediate_result: object) -> None:
        at = np.asarray(intermediate_result.x)  # type: ignore[attr-defined]
        if np.linalg.norm(objective(at)[1]) < accuracy * np.linalg.norm(at - weights) / h:
            raise StopIteration

    options = {"maxiter": 2000, "maxfun": 4000, "maxcor": 20, "ftol": 0, "gtol": 0}
    found = minimize(objective, weights, jac=True, method="L-BFGS-B", callback=met, options=options)
    return np.asarray(found.x, dtype=np.float64)
