"""A network as structure: its architecture and its layers."""

from __future__ import annotations

from compressor.network.architecture import (
    Architecture,
    module_architecture,
    transformers_architecture,
    transformers_module,
    transformers_without_weights,
)
from compressor.network.embeddings import embedding_scale, join_embeddings, only_scales, same_table
from compressor.network.experts import (
    SeparateExperts,
    fuse_experts,
    roles_of_experts,
    separable_experts,
    with_separate_experts,
)
from compressor.network.layers import (
    CONVOLUTIONS,
    TRANSPOSED_CONVOLUTIONS,
    Kind,
    Layer,
    StoredAs,
    architecture_mismatch,
    directly_read_by,
    find_layers,
    in_natural_order,
    is_weight,
    layer_name,
    matches_any,
    own_state,
)
from compressor.network.ties import tied_names, with_ties

__all__ = [
    "CONVOLUTIONS",
    "TRANSPOSED_CONVOLUTIONS",
    "Architecture",
    "Kind",
    "Layer",
    "SeparateExperts",
    "StoredAs",
    "architecture_mismatch",
    "directly_read_by",
    "embedding_scale",
    "find_layers",
    "fuse_experts",
    "in_natural_order",
    "is_weight",
    "join_embeddings",
    "layer_name",
    "matches_any",
    "module_architecture",
    "only_scales",
    "own_state",
    "roles_of_experts",
    "same_table",
    "separable_experts",
    "tied_names",
    "transformers_architecture",
    "transformers_module",
    "transformers_without_weights",
    "with_separate_experts",
    "with_ties",
]
