"""A network as structure: its architecture, its layers, the forms that they can be written in."""

from __future__ import annotations

from compressor.network.architecture import Skeleton, module_skeleton, transformers_module, transformers_skeleton
from compressor.network.experts import SeparateExperts, fuse_experts, with_separate_experts
from compressor.network.forms import pair_forms
from compressor.network.layers import (
    CONVOLUTIONS,
    TRANSPOSED_CONVOLUTIONS,
    Kind,
    Layer,
    directly_read_by,
    find_layers,
    in_natural_order,
    is_weight,
    layer_name,
    own_state,
    skeleton_mismatch,
)
from compressor.network.ties import tied_names, with_ties

__all__ = [
    "CONVOLUTIONS",
    "TRANSPOSED_CONVOLUTIONS",
    "Kind",
    "Layer",
    "SeparateExperts",
    "Skeleton",
    "directly_read_by",
    "find_layers",
    "fuse_experts",
    "in_natural_order",
    "is_weight",
    "layer_name",
    "module_skeleton",
    "own_state",
    "pair_forms",
    "skeleton_mismatch",
    "tied_names",
    "transformers_module",
    "transformers_skeleton",
    "with_separate_experts",
    "with_ties",
]
