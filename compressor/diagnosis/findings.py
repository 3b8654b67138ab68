"""The findings of a diagnosis: each a sentence, with a sentence of advice."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compressor.measure import EPSILON, FROBENIUS_ERROR, NormBalance
from compressor.planning import PLANNING
from compressor.recipe import TrainingRecipe

if TYPE_CHECKING:
    from compressor.diagnosis.types import DiagnosedLayer, Predictions

# From this cosine, and within this factor, a matrix counts as near a stationary point.
NEAR_COSINE, NEAR_RATIO = 0.9, 2.0
# Below this share of its full rank a layer counts as low-rank.
LOW_RANK = 0.5
# Norms within this factor count as balanced.
BALANCED = 1.1


@dataclass(frozen=True)
class Finding:
    """A finding about `layers`, and advice; a `warning` invalidates a conclusion."""

    subject: str
    message: str
    advice: str
    layers: tuple[str, ...] = ()
    warning: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The fields, in the types of JSON."""
        return {
            "subject": self.subject,
            "message": self.message,
            "advice": self.advice,
            "layers": list(self.layers),
            "warning": self.warning,
        }


def all_findings(
    recipe: TrainingRecipe,
    layers: Sequence[DiagnosedLayer],
    *,
    predictions: Predictions | None,
    balance: NormBalance | None,
) -> tuple[Finding, ...]:
    """All findings, warnings first."""
    found = [
        _collapse(layers, predictions),
        _fading(layers),
        _ranks(layers, predictions),
        _window(recipe, layers),
        _start(layers),
        _stationary(layers, predictions),
        _scale_invariant(layers),
        _balance(balance),
    ]
    return tuple(sorted((finding for finding in found if finding is not None), key=lambda each: not each.warning))


def _names(layers: Sequence[DiagnosedLayer]) -> tuple[str, ...]:
    return tuple(each.name for each in layers)


def _of(some: Sequence[DiagnosedLayer], layers: Sequence[DiagnosedLayer]) -> str:
    return f"{len(some)} of {len(layers)} layers"


def _rank_share(layer: DiagnosedLayer) -> float:
    ranks = layer.inspected.ranks
    return ranks.frobenius / ranks.full if ranks is not None and ranks.full else 0.0


def _collapse(layers: Sequence[DiagnosedLayer], predictions: Predictions | None) -> Finding | None:
    empty = [each for each in layers if each.norm == 0]
    at_chance = predictions is not None and predictions.at_chance
    if not at_chance:
        if not empty:
            return None
        message = f"{_of(empty, layers)} are zero."
        return Finding("collapse", message, "Find out why before you compress.", _names(empty), warning=True)
    assert predictions is not None
    low = [each for each in layers if _rank_share(each) < LOW_RANK]
    score = f"{predictions.metric} {predictions.value:.3g} is no better than chance ({predictions.chance:.3g})"
    if not low:
        advice = "Check that data and preprocessing match the training; if they do, training failed or was not done."
        return Finding("collapse", f"The {score}.", advice, warning=True)
    return Finding(
        "collapse",
        f"The {score}, and {_of(low, layers)} are low-rank: the network has collapsed.",
        "This low rank is not compressibility: train with less weight decay or a lower learning rate.",
        _names(low),
        warning=True,
    )


def _fading(layers: Sequence[DiagnosedLayer]) -> Finding | None:
    """Norms that fell faster than gradients refill them, by an earlier checkpoint or by the share of the start."""
    fading = [each for each in layers if _fades(each)]
    if not fading:
        return None
    return Finding(
        "norms",
        f"In {_of(fading, layers)} the norm has been falling faster than gradients refill it.",
        "The memory window says little about their weights; do not read them as learned structure.",
        _names(fading),
        warning=True,
    )


def _fades(layer: DiagnosedLayer) -> bool:
    window, start = layer.inspected.window, layer.inspected.initialization
    if window is not None and window.collapsing:
        return True
    forgotten = start is not None and start.share is not None and start.share < math.exp(-1)
    return forgotten and layer.start_energy is not None and layer.start_energy > 0.5


def _ranks(layers: Sequence[DiagnosedLayer], predictions: Predictions | None) -> Finding | None:
    if predictions is not None and predictions.at_chance:
        return None
    low = [each for each in layers if each.norm > 0 and _rank_share(each) < LOW_RANK]
    middle = statistics.median(map(_rank_share, layers))
    message = (
        f"At a relative error of {FROBENIUS_ERROR:g}, {_of(low, layers)} have less than half their full rank "
        f"(median share of all layers: {middle:.0%})."
    )
    if low:
        advice = "Compression pays there; give `data` to see what it costs."
    else:
        advice = "Plain truncation would cost much: give `calibration`, and measure with `data`."
    return Finding("ranks", message, advice, _names(low))


def _window(recipe: TrainingRecipe, layers: Sequence[DiagnosedLayer]) -> Finding | None:
    windows = [(each, each.inspected.window) for each in layers]
    binding = [each for each, window in windows if window is not None and window.vacuous is False]
    if binding:
        residuals = [window.residual for _, window in windows if window is not None and window.residual is not None]
        of = _of(binding, layers)
        left = f", except for up to {max(residuals):.0%} of a matrix's norm" if residuals else ""
        return Finding(
            "memory window",
            f"At epsilon {EPSILON:g} the hyperparameters bound the rank of {of} below full rank{left}.",
            "Take the bound as an upper limit; the measured ranks are usually far lower.",
            _names(binding),
        )
    exceeding = [each for each, window in windows if window is not None and window.exceeds_training]
    if exceeding:
        bounded = any(window is not None and window.learned_rank_bound is not None for _, window in windows)
        what = (
            "The rank bound then holds only for what training added to the initial weights"
            if bounded
            else "No rank is bounded then"
        )
        return Finding(
            "memory window",
            f"In {_of(exceeding, layers)} the memory window is longer than the training.",
            f"{what}: choose ranks by the spectra or by calibration.",
            _names(exceeding),
        )
    vacuous = [each for each, window in windows if window is not None and window.vacuous]
    if vacuous:
        return Finding(
            "memory window",
            f"The rank bound of the memory window is vacuous in {_of(vacuous, layers)}.",
            "Choose ranks by the spectra or by calibration, never by this bound.",
            _names(vacuous),
        )
    reason = next((window.reason for _, window in windows if window is not None and window.reason), "")
    if not reason:
        return None
    unknown = recipe.optimizer is None or "unknown" in reason
    advice = "Give the training recipe as `recipe`."
    return Finding(
        "memory window",
        f"The hyperparameters bound no rank: {reason.removeprefix('no rank bound: ').removeprefix('no window: ')}.",
        advice if unknown else "Choose ranks by the spectra or by calibration.",
    )


def _start(layers: Sequence[DiagnosedLayer]) -> Finding | None:
    shares = [(each, each.inspected.initialization) for each in layers]
    known = [(each, start.share) for each, start in shares if start is not None and start.share is not None]
    if not known:
        return None
    limit = PLANNING.largest_surviving_share
    kept = [each for each, share in known if share > limit]
    largest = max(share for _, share in known)
    if kept:
        return Finding(
            "initialization",
            f"{_of(kept, layers)} kept more than {limit:.0%} of their initial weights (up to {largest:.0%}).",
            "Their spectra contain the random start, which was never learned: choose ranks with `calibration`.",
            _names(kept),
        )
    return Finding(
        "initialization",
        f"At most {largest:.2g} of the initial weights survive in any layer.",
        "Singular values above the edge of the rest ('above edge' in 'compress inspect') were learned.",
    )


def _stationary(layers: Sequence[DiagnosedLayer], predictions: Predictions | None) -> Finding | None:
    measured = [(each, each.stationarity) for each in layers if each.stationarity is not None]
    judged = [(each, found) for each, found in measured if found.cosine is not None and found.ratio is not None]
    if predictions is None or not measured:
        return None
    if not judged:
        reason = next((found.reason for _, found in measured if found.ratio is None), "")
        message = f"The distance to a stationary point is unknown: {reason}."
        return Finding("stationary point", message, "Do not rely on theorems about stationary points.")
    cosines = [found.cosine for _, found in judged if found.cosine is not None]
    ratios = [found.ratio for _, found in judged if found.ratio is not None]
    near = [
        each
        for (each, _), cosine, ratio in zip(judged, cosines, ratios, strict=True)
        if cosine >= NEAR_COSINE and 1 / NEAR_RATIO <= ratio <= NEAR_RATIO
    ]
    message = (
        f"{len(near)} of {len(judged)} layers that could be judged are near a stationary point of the regularized loss "
        f"(cosines {min(cosines):.2f} to {max(cosines):.2f}, ratios {min(ratios):.2g} to {max(ratios):.2g})."
    )
    if len(near) == len(judged):
        advice = "Theorems about stationary points, such as those on adding networks, apply here."
    else:
        advice = "Theorems about stationary points, such as those on adding networks, do not apply: measure instead."
    return Finding("stationary point", message, advice, _names(near))


def _scale_invariant(layers: Sequence[DiagnosedLayer]) -> Finding | None:
    invariant = [each for each in layers if each.scaling_degree == 0]
    if not invariant:
        return None
    held = [each.equilibrium for each in invariant if each.equilibrium is not None]
    shares = [found.norm / found.predicted for found in held if found.predicted]
    advice = "They are not compared with the gradient, which is orthogonal to them by design"
    if shares:
        least, most = (f"{share:.2g}" for share in (min(shares), max(shares)))
        span = least if least == most else f"{least} to {most}"
        advice += f". Their norms are {span} times the equilibrium of weight decay and gradient noise."
    else:
        reason = next((found.reason for found in held if found.reason), "")
        advice += f". The equilibrium of their norms is unknown: {reason}." if reason else "."
    message = f"{_of(invariant, layers)} are followed by a normalization that removes their scale."
    return Finding("scale-invariant layers", message, advice, _names(invariant))


def _balance(balance: NormBalance | None) -> Finding | None:
    if balance is None:
        return None
    message = f"The norms of the {len(balance.layers)} layers that the outputs are proportional to differ by a factor"
    message += f" of {balance.spread:.3g}"
    if balance.predicted_gap is not None:
        left = f"{balance.predicted_gap:.2g}" if balance.predicted_gap > 0.01 * balance.gap else "almost nothing"
        message += f"; their squares by {balance.gap:.3g}, of which gradient flow leaves {left}"
    if balance.spread <= BALANCED:
        advice = "As at a stationary point: no layer dominates."
    elif balance.predicted_gap is not None and balance.gap <= 2 * balance.predicted_gap:
        advice = "The difference is left from the start: longer training or more weight decay evens it out."
    else:
        advice = "The steps were too large for gradient flow, or training ended early: rely on measurements instead."
    return Finding("norm balance", f"{message}.", advice, balance.layers)
