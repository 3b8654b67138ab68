"""Stage 6: pairs into files, torch modules and a transformers configuration, and back to dense."""

from compressor.rewrite.modules import (
    LowRankConvolution,
    LowRankLinear,
    PivotedLinear,
    low_rank_layer,
    put_layer,
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
from compressor.rewrite.widening import MERGE_KEY, merge_record, widened

__all__ = [
    "FORMAT_VERSION",
    "MERGE_KEY",
    "METADATA_KEY",
    "PLAN_FILE",
    "LowRankConvolution",
    "LowRankLinear",
    "PivotedLinear",
    "Rewriting",
    "StoredPair",
    "as_matrix",
    "dense_infos",
    "dense_tensors",
    "describe_folder",
    "file_metadata",
    "file_record",
    "low_rank_layer",
    "merge_record",
    "put_layer",
    "rewritten_infos",
    "rewritten_module",
    "rewritten_tensors",
    "stored_pairs",
    "weight_file_bytes",
    "widened",
    "write_weights",
]
