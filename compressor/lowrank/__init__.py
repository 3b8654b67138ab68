"""The low-rank format: pairs in files, in torch modules, and in transformers configurations, and back to dense."""

from __future__ import annotations

from compressor.lowrank.artifacts import StoredErrors, compressed_artifact, restored_artifact
from compressor.lowrank.decompositions import KeptDecompositions
from compressor.lowrank.effective_weights import let_script, with_effective_weights
from compressor.lowrank.factored_parameter import FactoredWeight, can_be_pair, factored_parameters, put_factors
from compressor.lowrank.modules import (
    TiedHead,
    carry_over,
    low_rank_layer,
    put_layer,
    put_pair,
    remove_call_hooks,
)
from compressor.lowrank.rewriting import (
    Rewriting,
    filled_layer,
    layer_spec,
    rewritten_infos,
    rewritten_module,
    rewritten_tensors,
)
from compressor.lowrank.spec import CODE_CLASS_PREFIX, CODE_CONFIG_KEY, METADATA_KEY, LayerSpec, LowRankSpec
from compressor.lowrank.tensor_format import (
    DenseWeights,
    Factors,
    StoredPair,
    approximate,
    as_matrix,
    dense_aliases,
    dense_infos,
    dense_tensors,
    dense_weight,
    file_record,
    join,
    multiplied,
    require_usable,
    role_of,
    spec_of,
    stored_error,
    stored_matrix,
    stored_pairs,
    stored_tensors,
)
from compressor.lowrank.widening import MERGE_KEY, merge_record, widened

__all__ = [
    "CODE_CLASS_PREFIX",
    "CODE_CONFIG_KEY",
    "MERGE_KEY",
    "METADATA_KEY",
    "DenseWeights",
    "FactoredWeight",
    "Factors",
    "KeptDecompositions",
    "LayerSpec",
    "LowRankSpec",
    "Rewriting",
    "StoredErrors",
    "StoredPair",
    "TiedHead",
    "approximate",
    "as_matrix",
    "can_be_pair",
    "carry_over",
    "compressed_artifact",
    "dense_aliases",
    "dense_infos",
    "dense_tensors",
    "dense_weight",
    "factored_parameters",
    "file_record",
    "filled_layer",
    "join",
    "layer_spec",
    "let_script",
    "low_rank_layer",
    "merge_record",
    "multiplied",
    "put_factors",
    "put_layer",
    "put_pair",
    "remove_call_hooks",
    "require_usable",
    "restored_artifact",
    "rewritten_infos",
    "rewritten_module",
    "rewritten_tensors",
    "role_of",
    "spec_of",
    "stored_error",
    "stored_matrix",
    "stored_pairs",
    "stored_tensors",
    "widened",
    "with_effective_weights",
]
