"""Stage 5: a matrix and a rank become factors."""

from compressor.factorize.pivoted import PivotedPair, pivoted_pair
from compressor.factorize.truncated_svd import FactorPair, truncated_svd

__all__ = ["FactorPair", "PivotedPair", "pivoted_pair", "truncated_svd"]
