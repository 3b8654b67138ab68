"""When the iterative factorizations stop, and how exact the others are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FactorizationSettings:
    """When the factorizations that have no closed form stop, and what rounding may cost the others.

    Spatial pairs and tied embeddings in a metric have none. The defaults were chosen on the reference models: more
    sweeps and steps take longer, and lower their loss by less than its standard error.
    """

    spatial_sweeps: int = 10
    """Most sweeps of alternating least squares for a spatial pair."""

    spatial_gain: float = 0.05
    """Share of its cost that a sweep for a spatial pair must remove for another sweep to follow."""

    spatial_steps: int = 20
    """Most steps of conjugate gradients for the vertical kernels in a sweep; each step lowers the cost."""

    spatial_residual: float = 0.2
    """Relative residual at which these conjugate gradients stop: the next sweep changes the equations anyway."""

    spatial_ranks: int = 12
    """Ranks at which the error of a spatial pair is computed for the allocation; in between it is interpolated."""

    tied_sweeps: int = 30
    """Most sweeps of alternating least squares for an embedding that an output head is tied to."""

    tied_gain: float = 1e-3
    """Share of its cost that a sweep for a tied embedding must remove for another sweep to follow."""

    quantized_ranks: int = 3
    """Ranks at which the error of a quantized pair is computed for the allocation; in between it is interpolated."""

    quantization_rounds: int = 4
    """Most rounds in which scales and integers of a quantized matrix are fitted to each other in the metric, after the
    first pass; candidates that are only compared have none."""

    simulated_bits: int = 4
    """Fewest bits at which the errors that quantizing would make are simulated for the allocation: fewer leave errors
    that are carried no room."""

    corrected_bits: int = 4
    """Most bits of a quantized matrix for which a low-rank correction is considered."""

    float32_loss: float = 1e-6
    """Share of the energy captured by a pair of any rank that float32 in place of float64 may cost: by a bound where a
    basis is kept in float32, by an estimate where it is computed there."""


DEFAULTS = FactorizationSettings()
