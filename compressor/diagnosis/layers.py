"""Diagnoses of layers: their measurements and their gradients combined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from compressor.diagnosis.gradients import SeenLayer
from compressor.diagnosis.series import RankSeries
from compressor.diagnosis.types import DiagnosedLayer
from compressor.measure import (
    NormBalance,
    TrainedNorm,
    equilibrium_norm,
    memory_window,
    norm_balance,
    stationarity,
    stationary_penalty,
)
from compressor.model import InspectedLayer
from compressor.recipe import TrainingRecipe


def diagnosed_layer(
    inspected: InspectedLayer, recipe: TrainingRecipe, seen: SeenLayer | None, *, series: RankSeries | None
) -> DiagnosedLayer:
    layer, start = inspected.layer, inspected.initialization
    assert inspected.singular_values is not None
    assert start is not None
    own = recipe.of_parameter(layer.tensor)
    norm = math.hypot(*inspected.singular_values)
    random_start = start.init_std is not None and recipe.base_model is None
    initial = start.init_std * math.sqrt(math.prod(layer.shape)) if random_start and start.init_std else None
    energy = (start.share * initial / norm) ** 2 if start.share is not None and initial and norm > 0 else None
    uses = inspected.uses
    if seen is not None and seen.uses is not None:
        # An expert is applied only to the tokens that are routed to it.
        uses = seen.uses if uses is None else min(uses, seen.uses)
    classes = seen.classes if seen is not None else None
    span = classes - 1 if classes is not None else None
    window = memory_window(own, layer.block_shape, uses, gradient_span=span)
    if series is not None and window.steps is not None and recipe.total_steps is not None and norm > 0:
        length = recipe.total_steps / recipe.total_epochs if recipe.total_epochs else None
        before = series.norm_before(layer.name, recipe.total_steps - window.steps, steps_per_epoch=length)
        if before:
            window = memory_window(own, layer.block_shape, uses, gradient_span=span, norm_ratio=before / norm)
    diagnosed = DiagnosedLayer(replace(inspected, uses=uses, window=window), norm, initial, energy)
    if seen is None:
        return diagnosed
    invariant = seen.scaling_degree == 0
    found = None
    if seen.gradient is not None:
        found = stationarity(seen.weight, seen.gradient, own, scale_invariant=invariant)
    held = equilibrium_norm(own, norm, seen.gradient_square) if invariant else None
    return replace(diagnosed, scaling_degree=seen.scaling_degree, stationarity=found, equilibrium=held)


def balance_of(layers: Sequence[DiagnosedLayer], recipe: TrainingRecipe) -> NormBalance | None:
    """The balance of the norms of the layers that the outputs are proportional to, under an optimizer that preserves
    it.
    """
    if recipe.family == "adaptive":
        return None
    norms = {}
    for each in layers:
        if each.scaling_degree == 1:
            start = each.inspected.initialization
            penalty, _ = stationary_penalty(recipe.of_parameter(each.inspected.layer.tensor))
            exponent = start.forgetting_exponent if start else None
            norms[each.name] = TrainedNorm(each.norm, each.initial_norm, penalty, exponent)
    return norm_balance(norms)
