"""Stage 6: pairs into files, torch modules and a transformers configuration, and back to dense."""

from compressor.rewrite.modules import (
    LowRankConvolution,
    LowRankEmbedding,
    LowRankLinear,
    PivotedLinear,
    TiedHead,
    low_rank_layer,
    put_pair,
)
from compressor.rewrite.rewriting import (
    PLAN_FILE,
    Rewriting,
    describe_folder,
    file_metadata,
    rewritten_infos,
    rewritten_module,
    rewritten_tensors,
    weight_file_bytes,
    write_weights,
)
from compressor.rewrite.tensor_format import (
    FORMAT_VERSION,
    METADATA_KEY,
    StoredPair,
    as_matrix,
    dense_infos,
    dense_tensors,
    file_record,
    stored_pairs,
)

__all__ = [
    "FORMAT_VERSION",
    "METADATA_KEY",
    "PLAN_FILE",
    "LowRankConvolution",
    "LowRankEmbedding",
    "LowRankLinear",
    "PivotedLinear",
    "Rewriting",
    "StoredPair",
    "TiedHead",
    "as_matrix",
    "dense_infos",
    "dense_tensors",
    "describe_folder",
    "file_metadata",
    "file_record",
    "low_rank_layer",
    "put_pair",
    "rewritten_infos",
    "rewritten_module",
    "rewritten_tensors",
    "stored_pairs",
    "weight_file_bytes",
    "write_weights",
]
