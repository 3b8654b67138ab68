"""Where theory promises nothing for a merge, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

from compressor.measure.memory_window import forgetting_exponent
from compressor.merging.overlap import LayerOverlap
from compressor.recipe import TrainingRecipe

# What the others add to a layer's outputs, or leave of the random start, counts as little up to a tenth.
LITTLE = 0.1
# Weights of independently trained networks are nearly orthogonal; those of fine-tunes of one base nearly parallel.
SHARED_START = 0.5


def sum_warnings(
    *,
    depth: int,
    linear: bool | None,
    recipes: Sequence[tuple[str, TrainingRecipe]],
    cosine: float,
) -> list[str]:
    """Why the sum of networks that were trained from nothing may fail.

    The sum is proven for shallow ReLU networks trained by gradient descent and for deep linear ones, with weight decay
    and on orthogonal inputs (Kuzborskij and Abbasi-Yadkori, arXiv 2502.17340, version 2); not for deep ReLU networks,
    whose hidden activations are non-negative, so never orthogonal.

    Args:
        depth: Number of layers with a weight matrix.
        linear: Whether there is nothing but linear maps in the network, None if that is not known.
        recipes: Name and training recipe of each network.
        cosine: Largest cosine between the weights of two of them.
    """
    found = []
    if depth > 2 and not linear:
        networks = "deep ReLU networks" if linear is False else "deep networks that are not linear"
        found.append(
            f"theory gives no guarantee for the sum of {networks}, and these have {depth} layers: measure it with "
            "`data`, or merge with `mode='concat'`"
        )
    unknown = [name for name, recipe in recipes if recipe.weight_decay is None]
    if unknown:
        found.append(
            f"nothing says that {' and '.join(unknown)} had weight decay: without it the random start stays in the "
            "weights, and the sum adds it too"
        )
    for name, recipe in recipes:
        if recipe.weight_decay == 0:
            found.append(f"{name} had no weight decay: its random start is still in the weights, and is added too")
        elif recipe.weight_decay is not None:
            exponent, _ = forgetting_exponent(recipe)
            if exponent is not None and math.exp(-exponent) > LITTLE:
                found.append(f"{math.exp(-exponent):.0%} of the random start of {name} is still in its weights")
    if cosine > SHARED_START:
        found.append(
            f"the weights resemble each other (cosine {cosine:.2f}), as those of fine-tunes of one model do: the sum "
            "counts that model twice, unless it is given as `base`"
        )
    return found


def interference_warning(layers: Sequence[LayerOverlap]) -> list[str]:
    """Which layer the others disturb most, if they do so by more than a tenth of its own outputs."""
    known = [(max(layer.interference), layer.name) for layer in layers if layer.interference]
    if not known or (worst := max(known))[0] <= LITTLE:
        return []
    return [f"the networks interfere: at layer {worst[1]} the others add {worst[0]:.0%} of its own outputs"]
