"""From one matrix and a rank to factors, in the Frobenius norm or in a metric."""

from compressor.factorize.balanced import balanced
from compressor.factorize.grouped import (
    GroupedMetric,
    GroupedPair,
    decompose_grouped,
    grouped_truncated_svd,
    grouped_values,
)
from compressor.factorize.kronecker import KroneckerProduct, KroneckerSVD
from compressor.factorize.pivoted import PivotedPair, pivoted_pair
from compressor.factorize.product import (
    Product,
    ProductSVD,
    product_bytes,
    product_difference,
    product_norm,
    product_svd,
)
from compressor.factorize.settings import FactorizationSettings
from compressor.factorize.spatial import SpatialPair, spatial_errors, spatial_matrix, spatial_pair
from compressor.factorize.tied_embedding import (
    TiedMetric,
    decompose_tied,
    embedding_metric,
    nearest_kronecker_metric,
    tied_truncated_svd,
)
from compressor.factorize.truncated_svd import FactorPair, truncated_svd, working_bytes
from compressor.factorize.weighted_svd import (
    Decomposition,
    Metric,
    coordinates,
    decompose,
    weighed,
    weighted_truncated_svd,
)

__all__ = [
    "Decomposition",
    "FactorPair",
    "FactorizationSettings",
    "GroupedMetric",
    "GroupedPair",
    "KroneckerProduct",
    "KroneckerSVD",
    "Metric",
    "PivotedPair",
    "Product",
    "ProductSVD",
    "SpatialPair",
    "TiedMetric",
    "balanced",
    "coordinates",
    "decompose",
    "decompose_grouped",
    "decompose_tied",
    "embedding_metric",
    "grouped_truncated_svd",
    "grouped_values",
    "nearest_kronecker_metric",
    "pivoted_pair",
    "product_bytes",
    "product_difference",
    "product_norm",
    "product_svd",
    "spatial_errors",
    "spatial_matrix",
    "spatial_pair",
    "tied_truncated_svd",
    "truncated_svd",
    "weighed",
    "weighted_truncated_svd",
    "working_bytes",
]
