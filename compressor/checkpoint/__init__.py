"""Files <-> named tensors: lazy and safe reading, writing that is complete or absent."""

from __future__ import annotations

from compressor.checkpoint.companions import CODE_FILE, PLAN_FILE, NotCopied, companions, copy_companions, write_config
from compressor.checkpoint.experts import SeparateExperts, fuse_experts, with_separate_experts
from compressor.checkpoint.hub import check_push, hub_model, local_model, push_folder
from compressor.checkpoint.layers import (
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
from compressor.checkpoint.output import check_output, parse_size
from compressor.checkpoint.reader import (
    ADAPTER_CONFIG,
    Checkpoint,
    open_checkpoint,
    portable_name,
    refuse_adapter,
    refuse_fp8,
    require_finite,
    require_in_range,
)
from compressor.checkpoint.skeleton import Skeleton, module_skeleton, transformers_module, transformers_skeleton
from compressor.checkpoint.staging import note_file, staged_file, staged_folder
from compressor.checkpoint.tensors import TensorInfo
from compressor.checkpoint.ties import tied_names, with_ties
from compressor.checkpoint.workspace import Workspace, temporary_workspace
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
    "CODE_FILE",
    "CONVOLUTIONS",
    "PLAN_FILE",
    "TRANSPOSED_CONVOLUTIONS",
    "Checkpoint",
    "Kind",
    "Layer",
    "NotCopied",
    "SafetensorsWriter",
    "SeparateExperts",
    "Shard",
    "ShardedWriter",
    "Skeleton",
    "TensorInfo",
    "Workspace",
    "check_output",
    "check_push",
    "companions",
    "copy_companions",
    "directly_read_by",
    "find_layers",
    "fuse_experts",
    "hub_model",
    "in_natural_order",
    "is_weight",
    "layer_name",
    "local_model",
    "module_skeleton",
    "note_file",
    "open_checkpoint",
    "own_state",
    "parse_size",
    "plan_shards",
    "portable_name",
    "push_folder",
    "refuse_adapter",
    "refuse_fp8",
    "require_finite",
    "require_in_range",
    "safetensors_size",
    "shard_index",
    "skeleton_mismatch",
    "staged_file",
    "staged_folder",
    "temporary_workspace",
    "tied_names",
    "transformers_module",
    "transformers_skeleton",
    "with_separate_experts",
    "with_ties",
    "write_config",
    "write_json",
    "write_state_dict_file",
]
