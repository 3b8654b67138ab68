"""How close training came to a stationary point of the regularized loss, and what that point says about norms.

With the penalty lambda/2 ||W||^2 on every matrix a stationary point has grad_l = -lambda_l W_l, where grad is the
gradient of the mean training loss without the penalty: the matrix and the negative gradient are parallel, and
||grad_l|| = lambda_l ||W_l||. Kuzborskij and Abbasi-Yadkori (arXiv:2502.17340) analyze such points.

Where the outputs f are homogeneous of degree one in each of several matrices, <W_l, grad_l> = E<dloss/df, f> is the
same number for all of them (Euler), so at a stationary point lambda_l ||W_l||^2 is too. Under gradient flow with one
lambda d/dt ||W_l||^2 = -2 <W_l, grad_l> - 2 lambda ||W_l||^2, so that the difference of two squared norms decays as
exp(-2 lambda t), which is exp(-2 K) with the forgetting exponent K.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from compressor.measure.scale import power_of_two
from compressor.recipe import TrainingRecipe
from compressor.torch_state import in_float64

# A normalization's epsilon keeps it from undoing a scale exactly; this share of the effect of another change is
# tolerated.
_INVARIANT = 0.1


@dataclass(frozen=True)
class Stationarity:
    """One matrix compared with the gradient of the mean training loss.

    `cosine`: of W and -grad, 1 at a stationary point; `ratio`: ||grad|| / (lambda ||W||), 1 there too;
    `gradient_norm`: ||grad||, in units of loss per weight. `reason`: why one is None or says nothing.
    """

    cosine: float | None
    ratio: float | None
    gradient_norm: float
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, in the types of JSON."""
        return asdict(self)


@dataclass(frozen=True)
class NormBalance:
    """The Frobenius norms of the matrices in which the outputs are homogeneous of degree one.

    `layers`: their names. `spread`: the largest over the smallest sqrt(lambda_l) ||W_l||, 1 at a stationary point
    (all lambda_l are taken as equal if one is unknown or zero). `gap`: the largest less the smallest ||W_l||^2;
    `predicted_gap`: the part of their initial difference that gradient flow leaves; None if unknown, for `reason`.
    """

    layers: tuple[str, ...]
    spread: float
    gap: float
    predicted_gap: float | None
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, in the types of JSON."""
        return asdict(self)


@dataclass(frozen=True)
class TrainedNorm:
    """One matrix in the balance of norms: its norm, the expected initial norm, its lambda and its K."""

    norm: float
    initial_norm: float | None
    penalty: float | None
    forgetting_exponent: float | None


def stationary_penalty(recipe: TrainingRecipe) -> tuple[float | None, str]:
    """lambda, if the optimizer is stationary at grad = -lambda W; else None, and why.

    It is the weight decay if that is part of the gradient. Decoupled from a momentum buffer, which at rest holds
    grad (1 - dampening) / (1 - momentum), it is wd (1 - momentum) / (1 - dampening). An optimizer that divides the
    gradient, but not the decay, by a running scale has no such lambda.
    """
    if recipe.weight_decay is None or recipe.family is None:
        return None, "the weight decay or the optimizer is unknown"
    if recipe.weight_decay == 0:
        return None, "without weight decay there is no penalty"
    if not recipe.decoupled_weight_decay:
        return recipe.weight_decay, ""
    if recipe.family == "adaptive":
        return None, f"{recipe.optimizer} scales the gradient but not the decay, and so minimizes no penalized loss"
    if recipe.momentum is None:
        return None, "the momentum is unknown"
    if recipe.momentum == 0:
        return recipe.weight_decay, ""
    dampening = recipe.dampening or 0.0
    if dampening == 1:
        return None, "with a dampening of 1 no gradient reaches the weights"
    return recipe.weight_decay * (1 - recipe.momentum) / (1 - dampening), ""


def stationarity(weight: Tensor, gradient: Tensor, recipe: TrainingRecipe, *, scale_invariant: bool) -> Stationarity:
    """How far a matrix is from a stationary point; `gradient` is that of the mean loss alone, of the same shape.

    `recipe` is the matrix's own (`TrainingRecipe.of_parameter`). If the outputs do not depend on the matrix's scale,
    <W, grad> = 0 wherever training ends, and nothing is measured.
    """
    w, g = weight.detach().cpu().double().flatten(), gradient.detach().cpu().double().flatten()
    scale, gradient_scale = power_of_two(w), power_of_two(g)
    w, g = w / scale, g / gradient_scale
    norm, gradient_norm = scale * float(w.norm()), gradient_scale * float(g.norm())
    if scale_invariant:
        reason = "scale-invariant: the gradient is orthogonal to the matrix by design"
        return Stationarity(None, None, gradient_norm, reason)
    if norm == 0 or gradient_norm == 0:
        return Stationarity(None, None, gradient_norm, f"the {'matrix' if norm == 0 else 'gradient'} is zero")
    penalty, reason = stationary_penalty(recipe)
    ratio = None if penalty is None else gradient_norm / (penalty * norm)
    return Stationarity(-float(w @ g) / float(w.norm() * g.norm()), ratio, gradient_norm, reason)


def scaling_degree(weight: Tensor, outputs: Callable[[], Tensor], *, seed: int = 0) -> Literal[0, 1] | None:
    """The degree in which the outputs are homogeneous in a matrix: 0 (scale-invariant), 1, or None for neither.

    The matrix is doubled. Outputs that double are of degree 1. Outputs are of degree 0 if they change by less than a
    tenth of their change when a random matrix of the same size (its own entries, permuted) is added. `outputs` runs the
    model; `weight` is changed in place for that and then restored, bit for bit.
    """
    original = weight.detach().clone()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(original.numel(), generator=generator).to(original.device)
    other = original.flatten()[order].reshape(original.shape)
    with torch.no_grad():
        before = in_float64(outputs())
        try:
            weight.copy_(2 * original)
            doubled = in_float64(outputs())
            weight.copy_(original + other)
            moved = in_float64(outputs())
        finally:
            weight.copy_(original)
    size, effect = float(before.norm()), float((moved - before).norm())
    rounding = math.sqrt(torch.finfo(weight.dtype).eps)
    if size > 0 and float((doubled - 2 * before).norm()) <= rounding * size:
        return 1
    if effect > rounding * size and float((doubled - before).norm()) <= _INVARIANT * effect:
        return 0
    return None


def norm_balance(matrices: Mapping[str, TrainedNorm]) -> NormBalance | None:
    """The balance of the norms of matrices of degree one, by layer name; None for fewer than two.

    The prediction is that of gradient flow with one lambda, and so one K, for all; gradient noise adds to it.
    """
    if len(matrices) < 2 or min(each.norm for each in matrices.values()) == 0:
        return None
    penalties = [each.penalty for each in matrices.values()]
    known = all(penalty for penalty in penalties)
    weighted = [each.norm * math.sqrt(each.penalty if known and each.penalty else 1) for each in matrices.values()]
    largest = max(matrices.values(), key=lambda each: each.norm)
    smallest = min(matrices.values(), key=lambda each: each.norm)
    exponent = largest.forgetting_exponent
    predicted, reason = None, ""
    if len({each.forgetting_exponent for each in matrices.values()}) > 1:
        reason = "the matrices differ in their weight decay"
    elif exponent is None:
        reason = "how much was forgotten is unknown"
    elif largest.initial_norm is None or smallest.initial_norm is None:
        reason = "how the matrices started is unknown"
    else:
        predicted = math.exp(-2 * exponent) * abs(largest.initial_norm**2 - smallest.initial_norm**2)
    gap = largest.norm**2 - smallest.norm**2
    return NormBalance(tuple(matrices), max(weighted) / min(weighted), gap, predicted, reason)
