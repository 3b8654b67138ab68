"""Files <-> named tensors: lazy and safe reading, atomic writing."""

from __future__ import annotations

from compressor.checkpoint.experts import SeparateExperts, fuse_experts, with_separate_experts
from compressor.checkpoint.files import atomic_file, hidden_sibling
from compressor.checkpoint.hub import check_push, hub_model, local_model, push_folder
from compressor.checkpoint.layers import (
    CONVOLUTIONS,
    TRANSPOSED_CONVOLUTIONS,
    Kind,
    Layer,
    directly_read_by,
    find_layers,
    is_weight,
    layer_name,
    skeleton_mismatch,
)
from compressor.checkpoint.output import check_output, output_folder, parse_size
from compressor.checkpoint.reader import (
    ADAPTER_CONFIG,
    Checkpoint,
    open_checkpoint,
    refuse_adapter,
    refuse_fp8,
    require_finite,
)
from compressor.checkpoint.skeleton import Skeleton, module_skeleton, transformers_module, transformers_skeleton
from compressor.checkpoint.tensors import TensorInfo
from compressor.checkpoint.writer import (
    SafetensorsWriter,
    Shard,
    ShardedWriter,
    plan_shards,
    safetensors_size,
    shard_index,
    write_json,
    write_state_dict_file,
)

__all__ = [
    "ADAPTER_CONFIG",
    "CONVOLUTIONS",
    "TRANSPOSED_CONVOLUTIONS",
    "Checkpoint",
    "Kind",
    "Layer",
    "SafetensorsWriter",
    "SeparateExperts",
    "Shard",
    "ShardedWriter",
    "Skeleton",
    "TensorInfo",
    "atomic_file",
    "check_output",
    "check_push",
    "directly_read_by",
    "find_layers",
    "fuse_experts",
    "hidden_sibling",
    "hub_model",
    "is_weight",
    "layer_name",
    "local_model",
    "module_skeleton",
    "open_checkpoint",
    "output_folder",
    "parse_size",
    "plan_shards",
    "push_folder",
    "refuse_adapter",
    "refuse_fp8",
    "require_finite",
    "safetensors_size",
    "shard_index",
    "skeleton_mismatch",
    "transformers_module",
    "transformers_skeleton",
    "with_separate_experts",
    "write_json",
    "write_state_dict_file",
]
