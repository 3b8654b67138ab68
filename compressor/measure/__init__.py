"""One weight tensor to numbers: spectra, effective ranks, memory windows, the surviving initialization."""

from compressor.measure.effective_rank import (
    FROBENIUS_ERROR,
    EffectiveRanks,
    Spectrum,
    effective_ranks,
    energy_rank,
    entropy_rank,
    frobenius_rank,
    numerical_rank,
    participation_ratio,
    stable_rank,
    truncation_errors,
)
from compressor.measure.equilibrium import EquilibriumNorm, equilibrium_norm
from compressor.measure.fresh_weights import initial_standard_deviation
from compressor.measure.initialization import SurvivingInitialization, surviving_initialization
from compressor.measure.memory_window import EPSILON, MemoryWindow, memory_window
from compressor.measure.spectrum import Precision, SingularBasis, singular_basis, singular_values
from compressor.measure.stationarity import (
    NormBalance,
    Stationarity,
    TrainedNorm,
    norm_balance,
    scaling_degree,
    stationarity,
    stationary_penalty,
)
from compressor.measure.uses import counted_positions, image_size, uses_per_example

__all__ = [
    "EPSILON",
    "FROBENIUS_ERROR",
    "EffectiveRanks",
    "EquilibriumNorm",
    "MemoryWindow",
    "NormBalance",
    "Precision",
    "SingularBasis",
    "Spectrum",
    "Stationarity",
    "SurvivingInitialization",
    "TrainedNorm",
    "counted_positions",
    "effective_ranks",
    "energy_rank",
    "entropy_rank",
    "equilibrium_norm",
    "frobenius_rank",
    "image_size",
    "initial_standard_deviation",
    "memory_window",
    "norm_balance",
    "numerical_rank",
    "participation_ratio",
    "scaling_degree",
    "singular_basis",
    "singular_values",
    "stable_rank",
    "stationarity",
    "stationary_penalty",
    "surviving_initialization",
    "truncation_errors",
    "uses_per_example",
]
