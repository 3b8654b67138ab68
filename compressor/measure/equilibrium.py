"""The norm at which weight decay and gradient noise balance for a scale-invariant matrix.

Outputs that do not depend on the scale of W have <W, g> = 0, and gradients that are inversely proportional to ||W||.
So plain SGD has ||W_t+1||^2 = (1 - lr wd)^2 ||W_t||^2 + lr^2 ||g||^2, which is stationary at

    ||W||^4 = lr E||g_1||^2 / (wd (2 - lr wd)),     g_1 the gradient of a mini-batch at ||W|| = 1

(van Laarhoven 2017, arXiv:1706.05350; with momentum Wan et al. 2021, arXiv:2006.08419).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from compressor.measure.memory_window import forgetting_exponent
from compressor.measure.retention import recursion_of
from compressor.recipe import TrainingRecipe

# The fourth power of the norm approaches its equilibrium as exp(-4 K) times its distance at the start: at this K a
# norm that started five times too large is within 5 per cent.
ARRIVED = 2.0


@dataclass(frozen=True)
class EquilibriumNorm:
    """The Frobenius norm of a scale-invariant matrix, and the equilibrium predicted by its recipe and gradients.

    `predicted` is None if it is unknown, for `reason`.
    """

    norm: float
    predicted: float | None
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, in the types of JSON."""
        return asdict(self)


def equilibrium_norm(recipe: TrainingRecipe, norm: float, gradient_square: float | None) -> EquilibriumNorm:
    """The equilibrium norm of a scale-invariant matrix under SGD, of any momentum and kind of decay.

    `gradient_square` is E||g||^2 of the mini-batches of the training, at the matrix as it is, of Frobenius norm `norm`;
    None if it was not measured. `recipe` is the matrix's own (`TrainingRecipe.of_parameter`). Without momentum this is
    exact in expectation; with momentum the gradients of different steps are assumed to be uncorrelated. The norm at the
    end stands for a mean over the last 1 / (4 lr wd) steps, so that deviations of up to 30 % are not significant.
    """
    reason = _unknown(recipe, norm, gradient_square)
    if reason:
        return EquilibriumNorm(norm, None, reason)
    assert recipe.learning_rate is not None
    assert gradient_square is not None
    step = recursion_of(recipe)
    matrix = step.matrix(recipe.learning_rate)
    noise = np.array([-recipe.learning_rate * step.push, step.fill])
    # Second moments of (W, b) under gradients of E||g||^2 = 1: S = M S M^T + v v^T.
    moments = np.linalg.solve(np.eye(4) - np.kron(matrix, matrix), np.outer(noise, noise).flatten())
    return EquilibriumNorm(norm, float(moments[0] * gradient_square * norm**2) ** 0.25, "")


def _unknown(recipe: TrainingRecipe, norm: float, gradient_square: float | None) -> str:
    """Why there is no prediction; empty if there is one."""
    if recipe.family != "sgd":
        return "the equilibrium is known for the SGD family only"
    exponent, unknown = forgetting_exponent(recipe)
    if exponent is None:
        return unknown
    if exponent == 0:
        return "without weight decay the norm grows forever"
    if recipe.schedule != "constant" or recipe.warmup_steps:
        return "the learning rate was not constant, and the norm lags behind it"
    if exponent < ARRIVED:
        return f"the training was too short to arrive at it (K = {exponent:.2g})"
    if norm == 0 or not math.isfinite(norm):
        return "the matrix is zero"
    return "" if gradient_square is not None else "mini-batches as in the training could not be drawn from the data"
