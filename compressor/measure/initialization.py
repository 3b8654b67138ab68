"""How much of the random initialization survives training, and which singular values may belong to it.

The share exp(-K) of the initialization that survives (`compressor.measure.memory_window`) is a random matrix
of known scale. The largest singular value of a d_out x d_in matrix of independent entries with standard
deviation sigma is close to sigma * (sqrt(d_out) + sqrt(d_in)) (Bai & Yin 1993; for Gaussian entries its mean
is below that, Davidson & Szarek 2001, Theorem II.13), so a trained matrix's singular values below that edge,
scaled by the share, may be initialization and not learning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from compressor.errors import BadInput
from compressor.measure.memory_window import forgetting_exponent
from compressor.recipe import TrainingRecipe


@dataclass(frozen=True)
class SurvivingInitialization:
    """The initialization that is left in a trained matrix.

    `share`: exp(-K), the factor before the initial weights; `forgetting_exponent`: K. `init_std`: sigma, the
    standard deviation of the initial entries. `edge`: the largest singular value of the part that is left.
    `above_edge`: how many singular values are larger. `reason`: why K is unknown, and share, edge and count
    with it; empty if they are known.
    """

    share: float | None
    forgetting_exponent: float | None
    init_std: float | None
    edge: float | None
    above_edge: int | None
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, in the types of JSON."""
        return asdict(self)


def surviving_initialization(
    recipe: TrainingRecipe,
    shape: tuple[int, int],
    singular_values: Sequence[float] | np.ndarray[Any, Any],
    *,
    init_std: float | None,
) -> SurvivingInitialization:
    """How much of its initialization a trained matrix keeps, and how many singular values exceed the rest of it.

    `recipe` is the matrix's own, its weight decay 0 if it gets none. `shape` is (d_out, d_in), a convolution's d_in
    being channels x kernel positions; `singular_values` are the trained matrix's, in its unit. `init_std` is the
    standard deviation of the initial entries, None if unknown: `initializer_range` in most transformers
    configurations, 1/sqrt(3 d_in) for `torch.nn.Linear` and `torch.nn.Conv2d` (uniform in +-1/sqrt(d_in)).

    For a model that was trained from another one nothing is known, since it did not start from random weights. Raises
    `BadInput` for a negative or infinite `init_std`.
    """
    d_out, d_in = shape
    sigma = None if init_std is None else float(init_std)
    if sigma is not None and not 0 <= sigma < math.inf:
        raise BadInput(
            f"the standard deviation of the initialization is {sigma}",
            remedy="pass a number from 0 on, or None if it is unknown",
        )
    exponent, reason = forgetting_exponent(recipe)
    if exponent is None:
        return SurvivingInitialization(None, None, sigma, None, None, reason)
    share = math.exp(-exponent)
    if recipe.base_model is not None:
        reason = f"training started from {recipe.base_model}, not from random weights"
    elif sigma is None:
        reason = "how the layer is initialized is unknown"
    if recipe.base_model is not None or sigma is None:
        return SurvivingInitialization(share, exponent, sigma, None, None, reason)
    edge = share * sigma * (math.sqrt(d_out) + math.sqrt(d_in))
    above = int(np.count_nonzero(np.asarray(singular_values) > edge))
    return SurvivingInitialization(share, exponent, sigma, edge, above, reason)
