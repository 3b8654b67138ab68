"""The memory window: what the training hyperparameters say about the rank of a matrix.

Notation: W is d_out x d_in, B the batch size, R how often W is used per example, lr and wd the numbers of
`torch.optim`, T the steps of the training, G_t the gradient of the mean loss at step t, of rank at most B*R.

As far as an update is linear in the weights W and the momentum buffer b, the state n steps before the end
enters the final weights through a product of 2x2 matrices,

    W_T = p_n W_{T-n} + q_n b_{T-n} + (a combination of the last n gradients),

exactly, at any learning-rate schedule. Without momentum p_n = prod(1 - lr_t wd) and q_n = 0, which is Galanti
et al. (2022, arXiv:2206.05794, Lemma 3.2) with their mu*lambda = lr*wd/2.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from compressor.errors import BadInput
from compressor.measure.retention import constant_window, first_step_below, recursion_of, state_before_the_end
from compressor.recipe import TrainingRecipe

EPSILON = 0.1
"""The default share of a matrix that is older than its memory window."""

_NORM_RATIO_ALLOWED = 2.0
_PRECONDITIONERS = frozenset({"adafactor", "shampoo"})
_NO_CONTRACTION = "weight decay this strong does not contract the weights"


@dataclass(frozen=True)
class MemoryWindow:
    """The window after which training has forgotten a matrix, and the bound on the matrix's rank that follows.

    Attributes:
        steps: n, the steps after which at most `epsilon` of the weights is left; None if there is no such n.
        exceeds_training: Whether n is more than the steps taken; None if those, or the window, are unknown.
        forgetting_exponent: K, where exp(-K) of the initialization is still in the weights; None if unknown.
        rank_bound: B*R*n, which bounds the rank of all of W but `epsilon`; None if no bound holds.
        vacuous: Whether the bound says no more than the shape does; None without a bound.
        reason: Why something is None, or why the bound is vacuous; empty if there is nothing to explain.
        epsilon: The share of the matrix that the window leaves out.
        learned_rank_bound: B*R*T, which bounds the rank of what the whole training added, W_T - p_T W_0; None if
            unknown.
        norm_ratio: ||W_{T-n}|| / ||W_T||, if it was given.
        residual: What the bound leaves out relative to the final weights, `epsilon` times the ratio; None without it.
        collapsing: Whether the ratio is above 2, which the factor 2 in the bound of Galanti et al. (Theorem 3.3) allows
            for: the weights then shrink faster than gradients refill them, and the bound says little about what is
            left. None without the ratio.
    """

    steps: int | None
    exceeds_training: bool | None
    forgetting_exponent: float | None
    rank_bound: int | None
    vacuous: bool | None
    reason: str
    epsilon: float
    learned_rank_bound: int | None = None
    norm_ratio: float | None = None
    residual: float | None = None
    collapsing: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields, in the types of JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Retention:
    """How much of an earlier state is retained: W_T = weights * W_{T-n} + buffer * b_{T-n} + gradients since.

    b is the optimizer's momentum buffer; `buffer` has the unit of a learning rate.
    """

    weights: float
    buffer: float


def memory_window(
    recipe: TrainingRecipe,
    shape: tuple[int, int],
    uses: int | None,
    *,
    epsilon: float = EPSILON,
    gradient_span: int | None = None,
    norm_ratio: float | None = None,
) -> MemoryWindow:
    """Return the number of steps in which all but `epsilon` of a weight matrix was written, and the bound on its rank.

    n is the smallest n with |p_n| + |q_n| / lr <= epsilon (notation: the module's docstring; lr is the peak). What is
    left of the state n steps before the end is then at most epsilon times the larger of ||W|| and lr * ||b|| there, so
    the unknown momentum buffer is allowed one step as large as the weights. Without momentum q_n = 0 and the residual
    is p_n * W_{T-n} (Galanti et al. 2022, arXiv:2206.05794, Lemma 3.2).

    The last n steps of SGD wrote a matrix of rank at most B*R*n, with momentum too, since the gradients from before the
    window are in b. Adaptive optimizers with decoupled weight decay have the window (p_n as without momentum), but
    their updates are not of low rank; with weight decay in the gradient they have none, since each entry forgets at its
    own rate. If n exceeds T, only W_T - p_T W_0 has rank at most B*R*T.

    Args:
        recipe: How the matrix was trained; its weight decay is 0 if it gets none (`TrainingRecipe.of_parameter`). With
            gradient accumulation and several processes B is the examples of all of them together.
        shape: `(d_out, d_in)` of the matrix.
        uses: R, how often one example uses the matrix; None if unknown. It is 1 for a dense layer on vectors, the
            output positions of a convolution, the patches or tokens (without padding) of a transformer's projection,
            and for an expert the tokens routed to it.
        epsilon: The share of the matrix that may be older than the window, between 0 and 1.
        gradient_span: The dimension of a space that contains the rows, or the columns, of all gradients, if one is
            known; it caps both bounds. For the last layer of a classifier of C classes under softmax cross-entropy it
            is C - 1 (the gradients at its outputs sum to zero); for the first layer, if the same N training inputs are
            seen without augmentation, N * R (its gradients are combinations of them). For hidden layers there is none,
            since their inputs change at every visit.
        norm_ratio: ||W_{T-n}|| / ||W_T||, from an earlier checkpoint.

    Returns:
        The window and the bound, with the reason for whatever is unknown.

    Raises:
        BadInput: epsilon is outside (0, 1), or a size or the ratio is not positive.

    Example:
        >>> recipe = compressor.TrainingRecipe(
        ...     optimizer="sgd", momentum=0.0, learning_rate=0.1, weight_decay=0.05, batch_size=4, schedule="constant"
        ... )
        >>> compressor.memory_window(recipe, (512, 512), 1).steps
        460
    """
    if not 0 < epsilon < 1:
        raise BadInput(f"epsilon = {epsilon!r} is not between 0 and 1", remedy="pass a number such as 0.1")
    if min(shape) < 1 or (uses is not None and uses < 1) or (gradient_span is not None and gradient_span < 0):
        sizes = f"shape {shape}, uses {uses}, gradient_span {gradient_span}"
        raise BadInput(f"no matrix has {sizes}", remedy="pass positive numbers, or None for what is unknown")
    if norm_ratio is not None and not 0 < norm_ratio < math.inf:
        raise BadInput(f"norm_ratio = {norm_ratio!r} is no ratio of norms", remedy="pass a positive number, or None")
    exponent, _ = forgetting_exponent(recipe)
    if _forgets(recipe):
        steps, exceeds, reason = _window(recipe, epsilon)
    else:
        steps, exceeds, reason = (
            None,
            None,
            "no window: without weight decay, or at a learning rate of 0, nothing is forgotten",
        )
    bound, vacuous = None, None
    learned = _rank_written(recipe, uses, recipe.total_steps, span=gradient_span)
    if steps is not None and not reason:
        bound = _rank_written(recipe, uses, steps, span=gradient_span)
        if bound is not None:
            vacuous = bound >= min(shape)
            if vacuous:
                reason = f"the bound is vacuous: {bound} is not below the full rank, {min(shape)}"
        else:
            reason = f"no rank bound: {_why_unbounded(recipe)}"
    elif exceeds and exponent is not None and learned is not None and learned < min(shape):
        left = f"{math.exp(-exponent):.3g}"
        reason += f", and only what training added, the weights less {left} of the start, has rank at most {learned}"
    known = steps is not None and norm_ratio is not None
    return MemoryWindow(
        steps,
        exceeds,
        exponent,
        bound,
        vacuous,
        reason,
        epsilon,
        learned_rank_bound=learned,
        norm_ratio=norm_ratio if known else None,
        residual=epsilon * norm_ratio if known and norm_ratio is not None else None,
        collapsing=norm_ratio > _NORM_RATIO_ALLOWED if known and norm_ratio is not None else None,
    )


def _why_unbounded(recipe: TrainingRecipe) -> str:
    if recipe.optimizer in _PRECONDITIONERS:
        # Scaling a matrix from the left and the right keeps its rank; averages of such updates do not.
        return f"{recipe.optimizer} keeps a gradient's rank only without momentum, and not for every layer"
    if recipe.family != "sgd":
        return f"updates of {recipe.optimizer} are not of low rank"
    if recipe.batch_size is None:
        return "the batch size is unknown"
    return "uses per example are unknown (`sequence_length` of the recipe; 1 for vectors)"


def _rank_written(recipe: TrainingRecipe, uses: int | None, steps: int | None, *, span: int | None) -> int | None:
    """The largest rank that this many steps can have written; None if no bound is known."""
    if recipe.family != "sgd":
        return None
    factors = (recipe.batch_size, uses, steps)
    bounds = [span] if span is not None else []
    if None not in factors:
        bounds.append(math.prod(factor for factor in factors if factor is not None))
    return min(bounds, default=None)


def forgetting_exponent(recipe: TrainingRecipe) -> tuple[float | None, str]:
    """K, where exp(-K) of the initialization is still in the trained weights; else None, and why.

    Exactly -log|p_T| (module docstring): -sum_t log|1 - lr_t wd| without momentum or with decoupled decay,
    nearly -sum_t log|1 - lr_t wd / (1 - momentum)| with momentum. Infinite if nothing is left.
    """
    if not _forgets(recipe):
        return 0.0, ""
    unknown = _unknown_in_update(recipe) or recipe.unknown_in_schedule
    if unknown:
        return None, unknown
    exponent = _exponent(recipe)
    return (exponent, "") if exponent >= 0 else (None, _NO_CONTRACTION)


def retention(recipe: TrainingRecipe, steps: int) -> Retention:
    """How much of the weights and of the momentum buffer `steps` before the end is in the final weights.

    Raises `BadInput` if the recipe does not determine it, or has fewer steps.
    """
    unknown = _unknown_in_update(recipe) or recipe.unknown_in_schedule
    if unknown:
        raise BadInput(f"what training retains is unknown: {unknown}", remedy="complete the training recipe")
    if steps > (recipe.total_steps or 0):
        raise BadInput(f"the training has fewer than {steps} steps", remedy="ask for fewer")
    p, q, log_scale = state_before_the_end(recipe, steps)
    return Retention(p * math.exp(log_scale), q * math.exp(log_scale))


def _forgets(recipe: TrainingRecipe) -> bool:
    """False if the optimizer only adds to the weights."""
    return recipe.weight_decay != 0 and recipe.learning_rate != 0


def _unknown_in_update(recipe: TrainingRecipe) -> str:
    """Why a step of this optimizer is not a known linear map of the weights; empty if it is one."""
    unknown = ""
    if recipe.weight_decay is None:
        unknown = "the weight decay is unknown"
    elif recipe.optimizer is None:
        unknown = "the optimizer is unknown"
    elif recipe.family is None:
        unknown = f"nothing is known about what the optimizer {recipe.optimizer!r} forgets"
    elif recipe.family == "sgd" and recipe.momentum is None:
        unknown = "the momentum is unknown"
    elif recipe.family == "adaptive" and recipe.weight_decay != 0 and not recipe.decoupled_weight_decay:
        unknown = f"under {recipe.optimizer} with weight decay in the gradient each entry forgets at its own rate"
    return unknown


@lru_cache(maxsize=64)
def _exponent(recipe: TrainingRecipe) -> float:
    p, _, log_scale = state_before_the_end(recipe, recipe.total_steps or 0)
    return -(math.log(abs(p)) + log_scale) if p else math.inf


@lru_cache(maxsize=64)
def _window(recipe: TrainingRecipe, epsilon: float) -> tuple[int | None, bool | None, str]:
    """n, whether it exceeds the training, and why there is no n; for a recipe that forgets."""
    peak, total = recipe.learning_rate, recipe.total_steps
    unknown = _unknown_in_update(recipe)
    if not unknown and peak is not None and recipe.schedule == "constant" and total is None:
        # The end of a constant schedule is the same after any number of steps.
        steps = constant_window(recursion_of(recipe), peak, epsilon)
        return steps, None, "" if steps else f"no window: {_NO_CONTRACTION}"
    unknown = unknown or recipe.unknown_in_schedule
    if unknown or peak is None or total is None:
        return None, None, f"no window: {unknown}"
    steps = first_step_below(recipe, epsilon)
    if steps is not None:
        return steps, False, ""
    exponent = _exponent(recipe)
    if exponent < 0:
        return None, None, f"no window: {_NO_CONTRACTION}"
    left_of_start = f"{math.exp(-exponent):.3g} of the start is left"
    return None, True, f"the window exceeds the training's {total} steps: {left_of_start}"
