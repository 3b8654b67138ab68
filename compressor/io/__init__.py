"""Files <-> named tensors: lazy and safe reading, writing that is complete or absent."""

from __future__ import annotations

from compressor.io.artifact import Artifact, Document, Provenance
from compressor.io.checkpoint import (
    ADAPTER_CONFIG,
    Checkpoint,
    adapter_config,
    open_checkpoint,
    portable_name,
    refuse_adapter,
    refuse_fp8,
    require_finite,
    require_in_range,
)
from compressor.io.companions import (
    CARD_FILE,
    CODE_FILE,
    OPTIONS_FILE,
    PLAN_FILE,
    NotCopied,
    companions,
    copy_companions,
    portable_config,
)
from compressor.io.hub import RemoteModel, hub_model, local_model, remote_model
from compressor.io.output import Naming, Target, check_output, checked_target, form_of
from compressor.io.stacks import Stack, nth
from compressor.io.staging import note_file, staged_file, staged_folder
from compressor.io.tensors import StoredTensor, TensorInfo, TensorInMemory
from compressor.io.workspace import Workspace, temporary_workspace
from compressor.io.writer import (
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
    "CARD_FILE",
    "CODE_FILE",
    "OPTIONS_FILE",
    "PLAN_FILE",
    "Artifact",
    "Checkpoint",
    "Document",
    "Naming",
    "NotCopied",
    "Provenance",
    "RemoteModel",
    "SafetensorsWriter",
    "Shard",
    "ShardedWriter",
    "Stack",
    "StoredTensor",
    "Target",
    "TensorInMemory",
    "TensorInfo",
    "Workspace",
    "adapter_config",
    "check_output",
    "checked_target",
    "companions",
    "copy_companions",
    "form_of",
    "hub_model",
    "local_model",
    "note_file",
    "nth",
    "open_checkpoint",
    "plan_shards",
    "portable_config",
    "portable_name",
    "refuse_adapter",
    "refuse_fp8",
    "remote_model",
    "require_finite",
    "require_in_range",
    "safetensors_size",
    "shard_index",
    "staged_file",
    "staged_folder",
    "temporary_workspace",
    "write_json",
    "write_state_dict_file",
]
