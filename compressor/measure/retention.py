"""How much training retains of an earlier state, over any number of steps.

The state n steps before the end enters the final weights as p_n W_{T-n} + q_n b_{T-n} (see `memory_window.py`). The row
(p_n, q_n) is the first one of a product of 2x2 matrices, one per step. With r = q/p, a step back multiplies p by 1 + u,
u = -lr * decay + feed * r, and r' = (momentum * r - lr * pull) / (1 + u).

If weight decay is weak, r forgets its start within a few times 1 / (1 - momentum) steps, and follows the learning rate
from then on. On a long stretch of a smooth schedule log(1 + u) is then a smooth function of the step, and its sum is an
integral with the first Euler-Maclaurin correction. Only the steps around the ends of a stretch are walked one by one;
if weight decay is strong, all of them are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from compressor.recipe import TrainingRecipe

_Array = np.ndarray[Any, np.dtype[np.float64]]

_CHUNK = 65536
_MOST_DOUBLINGS = 50
_LEAST_STRETCH = 4096
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)
# The share of an old r that is left when it is forgotten, and the smallest factor 1 + u with a smooth logarithm.
_FORGOTTEN = 1e-17
_LEAST_FACTOR = 0.1
# Below this decay of one step, products lose what the sum of logarithms keeps.
_WEAK_DECAY = 1e-4
# Corrections of r for the change of the learning rate; each makes rounding 1 / (1 - momentum) times as large.
_ROUNDS = 2
# Beyond exp of this nothing is retained, or everything has diverged, and the rest of a long stretch is not walked.
_MOST_LOG = 1e3
_MANY = 10**6


@dataclass(frozen=True)
class Recursion:
    """A step that is linear in weights, buffer and gradient of the loss:

    W' = W - lr * (decay * W + pull * b + push * g), b' = feed * W + momentum * b + fill * g.
    """

    decay: float
    pull: float
    feed: float
    momentum: float
    push: float
    fill: float

    def matrix(self, learning_rate: float) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The 2x2 map of (W, b)."""
        return np.array(
            [
                [1.0 - learning_rate * self.decay, -learning_rate * self.pull],
                [self.feed, self.momentum],
            ]
        )


def recursion_of(recipe: TrainingRecipe, *, first: bool = False) -> Recursion:
    """The recursion of a recipe that is complete; `first` gives that of the first step.

    It is `torch.optim.SGD`'s; with decoupled decay SGDW's (Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 1),
    whose part without momentum is also what AdamW and its variants do to the weights. If the recipe does not qualify a
    named optimizer, torch's defaults hold: no Nesterov momentum, no dampening, and for "sgd" weight decay in the
    gradient.
    """
    decay = recipe.weight_decay or 0.0
    momentum = (recipe.momentum or 0.0) if recipe.family == "sgd" else 0.0
    # The first buffer is the gradient itself: torch dampens from the second step on, and only with momentum.
    undampened = 1.0 if first or momentum == 0 else 1.0 - (recipe.dampening or 0.0)
    pull = momentum**2 if recipe.nesterov else momentum
    push = 1.0 + momentum * undampened if recipe.nesterov else undampened
    if recipe.decoupled_weight_decay:
        return Recursion(decay, pull, 0.0, momentum, push, undampened)
    return Recursion(push * decay, pull, undampened * decay, momentum, push, undampened)


class _State(NamedTuple):
    """p and q, both to be multiplied by exp(log_scale)."""

    p: float
    q: float
    log_scale: float

    def log_left(self, peak: float | None) -> float:
        """log(|p| + |q| / peak), or log|p| without a peak."""
        left = abs(self.p) + (abs(self.q) / peak if peak else 0.0)
        return math.log(left) + self.log_scale if left else -math.inf


# How many steps, and the state after so many of them.
_Stretch = tuple[int, Callable[[int], _State]]


def state_before_the_end(recipe: TrainingRecipe, steps: int) -> tuple[float, float, float]:
    """p_n and q_n for n = `steps`, and the logarithm of the scale of both."""
    state, done = _State(1.0, 0.0, 0.0), 0
    for length, after in _walk_back(recipe):
        if done >= steps:
            break
        state = after(min(length, steps - done))
        done += length
    return state


def first_step_below(recipe: TrainingRecipe, epsilon: float) -> int | None:
    """The smallest n with |p_n| + |q_n| / lr <= epsilon; None if the training has no such step."""
    threshold, total = math.log(epsilon), recipe.total_steps or 0
    before, done = 0.0, 0
    for length, after in _walk_back(recipe):
        # Training starts with an empty buffer.
        peak = recipe.learning_rate if done + length < total else None
        left = after(length).log_left(peak)
        if left <= threshold:
            return done + _first_below(after, length, threshold, peak=recipe.learning_rate, first=before, last=left)
        before, done = left, done + length
    return None


def _first_below(
    after: Callable[[int], _State], length: int, threshold: float, *, peak: float | None, first: float, last: float
) -> int:
    """Where a stretch falls below a threshold; the retained share rises at most once on it, and then falls."""
    low, high, halve = 0, length, False
    while high - low > 1:
        share = 0.5 if halve else (first - threshold) / max(first - last, 1e-300)
        middle = min(max(low + round(share * (high - low)), low + 1), high - 1)
        left = after(middle).log_left(peak)
        before = high - low
        if left <= threshold:
            high, last = middle, left
        else:
            low, first = middle, left
        halve = high - low > before // 2
    return high


def _walk_back(recipe: TrainingRecipe) -> Iterator[_Stretch]:
    """The steps of training from the last to the first, in stretches of one or many."""
    step, state, total = recursion_of(recipe), _State(1.0, 0.0, 0.0), recipe.total_steps or 0
    # Milestones may also raise the learning rate.
    peak = float(recipe.learning_rates_at(np.array([recipe.warmup_length, *(recipe.step_milestones or ())])).max())
    peak = max(peak, recipe.learning_rate or 0.0)
    # Logarithms can be added up where p never changes its sign.
    weak = peak * step.decay < _WEAK_DECAY and _forgetting(step, peak) is not None
    done = 0
    for start, stop in _smooth(recipe, step):
        burn = _steps_to_forget(recipe, step, start=start, stop=stop)
        exact, shortcut = _shortcut(recipe, step, start=start, stop=stop, burn=burn)
        for now in _one_by_one(recipe, step, state, start=exact, stop=stop, weak=weak):
            state = now
            yield 1, _always(now)
            done += 1
            if burn is None and abs(now.log_scale) > _MOST_LOG and total - done > _MANY:
                # The retained share is negligible from here on.
                yield total, _always(_State(0.0, 0.0, 0.0) if now.log_scale < 0 else now)
                return
        if shortcut is not None:
            # The step at the start stays outside: there the schedule may have a corner.
            after = shortcut(state)
            yield exact - start - 1, after
            state = after(exact - start - 1)
            done += exact - start
            for now in _one_by_one(recipe, step, state, start=start, stop=start + 1, weak=weak):
                state = now
                yield 1, _always(now)
    if total:
        for now in _one_by_one(recipe, recursion_of(recipe, first=True), state, start=0, stop=1, weak=weak):
            yield 1, _always(now)


def _shortcut(
    recipe: TrainingRecipe, step: Recursion, *, start: int, stop: int, burn: int | None
) -> tuple[int, Callable[[_State], Callable[[int], _State]] | None]:
    """The step down to which a stretch is walked one by one, and a function for the rest, if there is one."""
    if burn is not None and stop - start > 2 * burn + _LEAST_STRETCH:
        end = stop - burn
        return end, lambda state: _smooth_stretch(recipe, step, state, start=start, end=end, burn=burn)
    first, last = recipe.learning_rates_at(np.array([float(start), float(stop - 1)]))
    if burn is None and first == last and stop - start > 2 * _CHUNK:
        return stop - _CHUNK, lambda state: _constant_stretch(step.matrix(float(first)), state)
    return start, None


def _constant_stretch(matrix: _Array, before: _State) -> Callable[[int], _State]:
    """The states after some steps at one learning rate, by squaring."""

    def after(steps: int) -> _State:
        row, log_scale = np.array([before.p, before.q]), before.log_scale
        power, log_power = matrix, 0.0
        while steps:
            if steps % 2:
                row = row @ power
                size = float(np.abs(row).sum()) or 1.0
                row, log_scale = row / size, log_scale + log_power + math.log(size)
            power = power @ power
            size = float(np.abs(power).max()) or 1.0
            power, log_power, steps = power / size, 2 * log_power + math.log(size), steps // 2
        return _State(float(row[0]), float(row[1]), log_scale)

    return after


def _always(state: _State) -> Callable[[int], _State]:
    return lambda _: state


def _one_by_one(
    recipe: TrainingRecipe, step: Recursion, state: _State, *, start: int, stop: int, weak: bool
) -> Iterator[_State]:
    """The states after each of the steps `stop` - 1 down to `start`."""
    p, q, log_scale = state
    for end in range(stop, start, -_CHUNK):
        rates = recipe.learning_rates(max(start, end - _CHUNK), end)
        for rate in () if rates is None else rates[::-1].tolist():
            u = step.feed * q / p - rate * step.decay if weak else -1.0
            if u > -1:
                p, q, log_scale = 1.0, (step.momentum * q / p - rate * step.pull) / (1 + u), log_scale + math.log1p(u)
            else:
                # If dampening starts after the first step, the first may flip the sign of p.
                p, q = p - rate * step.decay * p + step.feed * q, step.momentum * q - rate * step.pull * p
                size = abs(p) + abs(q)
                if not 1e-100 < size < 1e100 and size > 0:
                    p, q, log_scale = p / size, q / size, log_scale + math.log(size)
            yield _State(p, q, log_scale)


def _smooth_stretch(
    recipe: TrainingRecipe, step: Recursion, state: _State, *, start: int, end: int, burn: int
) -> Callable[[int], _State]:
    """The states after some of the steps from `end` down to `start`, while r follows the learning rate."""
    log_before = math.log(abs(state.p)) + state.log_scale if state.p else -math.inf

    def after(steps: int) -> _State:
        begin = end - steps
        half = steps / 2
        nodes = begin - 0.5 + half * (1 + _NODES)
        at = np.concatenate([nodes, [end - 1.0, float(end), begin - 1.0, float(begin)]])
        logs, ratios = _following(recipe, step, at, march=march)
        # A sum is the integral around its points less the change of the slope / 24.
        slopes = (logs[-3] - logs[-4]) - (logs[-1] - logs[-2])
        total = float(half * (_WEIGHTS * logs[: len(nodes)]).sum() - slopes / 24)
        return _State(1.0, float(ratios[-1]), log_before + total)

    # The share that the corrections leave of r is the change of the rate while r forgets, once more for each of them.
    change = burn / (-math.log(_FORGOTTEN) * (end - start))
    march = max(0, math.ceil(burn * (1 - (_ROUNDS + 1) * math.log(change) / math.log(_FORGOTTEN))))
    return after


def _following(recipe: TrainingRecipe, step: Recursion, at: _Array, *, march: int) -> tuple[_Array, _Array]:
    """log(1 + u) of the steps `at`, and r after them, where r follows the learning rate.

    r at one learning rate is corrected for its change by taking the error of a step for that of all steps around it;
    what that leaves fades over `march` steps.
    """
    rates = recipe.learning_rates_at(at + march + np.arange(1.0, _ROUNDS + 2)[:, None])
    ratios = _settled_ratio(step, rates)
    slowness = 1 - (step.momentum - step.feed * ratios) / (1 + step.feed * ratios - rates * step.decay)
    for count in range(_ROUNDS, 0, -1):
        errors = _ratio_after(step, ratios[1 : count + 1], rates[:count]) - ratios[:count]
        ratios[:count] += errors / slowness[:count]
    ratio = ratios[0]
    for ahead in range(march, 0, -1):
        ratio = _ratio_after(step, ratio, recipe.learning_rates_at(at + ahead))
    rate = recipe.learning_rates_at(at)
    return np.log1p(step.feed * ratio - rate * step.decay), _ratio_after(step, ratio, rate)


def _ratio_after(step: Recursion, ratio: _Array, rate: _Array) -> _Array:
    return np.asarray(
        (step.momentum * ratio - rate * step.pull) / (1 + step.feed * ratio - rate * step.decay), dtype=np.float64
    )


def _settled_ratio(step: Recursion, rate: _Array) -> _Array:
    """The fixed point of r at a constant learning rate."""
    linear = 1 - rate * step.decay - step.momentum
    root = np.sqrt(np.maximum(linear**2 - 4 * step.feed * rate * step.pull, 0.0))
    return np.asarray(-2 * rate * step.pull / (linear + root))


def _smooth(recipe: TrainingRecipe, step: Recursion) -> Iterator[tuple[int, int]]:
    """The steps from the last to the second in stretches of a smooth schedule, weak and strong decay apart."""
    total = recipe.total_steps or 0
    corners = {1, total, recipe.warmup_length, *(recipe.step_milestones or () if recipe.schedule == "step" else ())}
    inside = sorted(corner for corner in corners if 1 <= corner <= total)
    for start, stop in reversed(list(pairwise(inside))):
        change = _change(recipe, step, start=start, stop=stop)
        yield from ((change, stop), (start, change)) if change is not None else ((start, stop),)


def _change(recipe: TrainingRecipe, step: Recursion, *, start: int, stop: int) -> int | None:
    """The step from which weight decay is no longer, or not yet, weak on a stretch on which the rate is monotone."""

    def weak(at: int) -> bool:
        return _forgetting(step, float(recipe.learning_rates_at(np.array([float(at)]))[0])) is not None

    low, high = start, stop - 1
    at_start = weak(low)
    if stop - start < _LEAST_STRETCH or at_start == weak(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if weak(middle) == at_start else (low, middle)
    return high


def _steps_to_forget(recipe: TrainingRecipe, step: Recursion, *, start: int, stop: int) -> int | None:
    """The steps after which r has forgotten its start, anywhere on a stretch; None if it does not, or too slowly."""
    rates = recipe.learning_rates_at(np.array([float(start), float(stop - 1)]))
    shares = [_forgetting(step, float(rate)) for rate in rates]
    if None in shares:
        return None
    slowest = max(share for share in shares if share is not None)
    return 8 + (math.ceil(math.log(_FORGOTTEN) / math.log(slowest)) if slowest > 0 else 0)


def _forgetting(step: Recursion, rate: float) -> float | None:
    """The share of r that survives one step, the ratio of the matrix's eigenvalues; None if decay is too strong."""
    half = (1 - rate * step.decay + step.momentum) / 2
    determinant = step.momentum * (1 - rate * step.decay) + rate * step.pull * step.feed
    root = half**2 - determinant
    # The weights must fade more slowly than the buffer.
    if root <= 0 or half + math.sqrt(root) < _LEAST_FACTOR or 1 - rate * step.decay <= step.momentum:
        return None
    large = half + math.sqrt(root)
    share = abs(determinant) / large**2
    # Near a double eigenvalue r forgets slowly.
    return share if share <= (1 + step.momentum) / 2 else None


def constant_window(step: Recursion, learning_rate: float, epsilon: float) -> int | None:
    """The window at a constant learning rate and without an end; None if there is none."""
    share = _forgetting(step, learning_rate)
    if share is None or learning_rate * step.decay >= _WEAK_DECAY:
        return _window_by_doubling(step, learning_rate, epsilon)
    threshold, ratio, log_left, count = math.log(epsilon), 0.0, 0.0, 0
    for _ in range(8 + (math.ceil(math.log(_FORGOTTEN) / math.log(share)) if share > 0 else 0)):
        u = step.feed * ratio - learning_rate * step.decay
        ratio = (step.momentum * ratio - learning_rate * step.pull) / (1 + u)
        log_left, count = log_left + math.log1p(u), count + 1
        if log_left + math.log1p(abs(ratio) / learning_rate) <= threshold:
            return count
    per_step = math.log1p(step.feed * ratio - learning_rate * step.decay)
    missing = threshold - log_left - math.log1p(abs(ratio) / learning_rate)
    return count + math.ceil(missing / per_step) if per_step < 0 and math.isfinite(missing / per_step) else None


def _window_by_doubling(recursion: Recursion, learning_rate: float, epsilon: float) -> int | None:
    """The window at a constant learning rate: double the steps until they suffice, then bisect.

    The retained share falls monotonically if the roots of the recursion are real and positive. Otherwise it oscillates,
    and the steps are walked one by one, up to the number that doubling found.
    """
    powers = [recursion.matrix(learning_rate)]
    roots = np.linalg.eigvals(powers[0])
    oscillates = np.iscomplexobj(roots) or bool((roots < 0).any())

    def left(row: _Array) -> float:
        return float(abs(row[0]) + abs(row[1]) / learning_rate)

    with np.errstate(over="ignore", invalid="ignore"):
        while not left(powers[-1][0]) <= epsilon:
            if len(powers) == _MOST_DOUBLINGS or not np.isfinite(powers[-1]).all():
                return None
            powers.append(powers[-1] @ powers[-1])
    steps, row = 0, np.array([1.0, 0.0])
    if oscillates:
        while left(row) > epsilon:
            steps, row = steps + 1, row @ powers[0]
        return steps
    for exponent in reversed(range(len(powers))):
        if left(row @ powers[exponent]) > epsilon:
            steps, row = steps + 2**exponent, row @ powers[exponent]
    return steps + 1
