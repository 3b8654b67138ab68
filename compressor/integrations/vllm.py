"""vLLM runs compressed folders: a quantization method `compressor` for its linear layers.

vLLM calls `register` through the entry point `vllm.general_plugins` in each of its processes. Names on disk stay as
they are: vLLM maps `q_proj.down.weight` to shard "q" of `qkv_proj.down.weight`. A layer gathers the tensors of all its
parts as they come, and makes its shard of them as soon as they are complete.

Only this module imports vllm, and only when `register` is called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from compressor.forms import DENSE, PIVOTED, PLAIN
from compressor.integrations.sharding import (
    ShardedPart,
    column_shard,
    fused_product,
    row_shard,
    shard_rows,
    stacked_down,
)
from compressor.lowrank import METADATA_KEY, LowRankSpec, role_of

# Where vLLM's fused layers put the shards that it names.
_SHARDS = {"q": 0, "k": 1, "v": 2}
_ROLES = {form.name: tuple(map(role_of, form.names)) for form in (PLAIN, PIVOTED)} | {DENSE: ("weight",)}


def register() -> None:
    """Add the method to vLLM's; calling it again does nothing new."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    register_quantization_config(METADATA_KEY)(_config_class())


def runnable_spec(config: Mapping[str, Any]) -> LowRankSpec:
    """The low-rank layers of a `quantization_config`.

    Folders of quantized layers alone do not come here: vLLM loads them by its own code for compressed-tensors. Raises
    ValueError for layers that it does not run.
    """
    spec = LowRankSpec.from_dict(config)
    if any(layer.quantization is not None for layer in spec.layers.values()):
        raise ValueError(
            "vLLM runs no quantized pairs: compress with --bits 16, or to linear layers in bits alone without zero "
            "points, which it loads as compressed-tensors"
        )
    if any(layer.form not in _ROLES for layer in spec.layers.values()):
        raise ValueError("vLLM runs no low-rank convolutions")
    return spec


def part_names(prefix: str, packed: Mapping[str, Sequence[str]]) -> list[str]:
    """The names in the checkpoint of what a layer of vLLM is made of: itself, or the layers fused in it."""
    parent, _, own = prefix.rpartition(".")
    return [f"{parent}.{part}" if parent else part for part in packed.get(own, [own])]


def forms_of(names: Sequence[str], prefix: str, spec: LowRankSpec) -> list[str] | None:
    """The form of each part of a layer, of one where the checkpoint has it fused; None where nothing is low-rank."""
    layers = spec.layers
    present = [prefix] if prefix in layers else list(names)
    if not any(name in layers for name in present):
        return None
    return [layers[name].form if name in layers else DENSE for name in present]


class Gathered:
    """The stored tensors of a layer's parts, as they come in."""

    def __init__(self, forms: Sequence[str]) -> None:
        self.forms = list(forms)
        self.parts: list[dict[str, Tensor]] = [{} for _ in forms]

    def put(self, role: str, tensor: Tensor, shard: str | int | None) -> None:
        """Keep a tensor; ValueError for a part or a role that the layer does not have."""
        index = 0 if shard is None else _SHARDS[shard] if isinstance(shard, str) else shard
        if not 0 <= index < len(self.parts) or role not in _ROLES[self.forms[index]]:
            raise ValueError(f"the low-rank layer has no {role} in part {shard}")
        self.parts[index][role] = tensor.clone()

    @property
    def complete(self) -> bool:
        """Whether every tensor of every part is there."""
        return all(set(part) == set(_ROLES[form]) for part, form in zip(self.parts, self.forms, strict=True))


def shards_of(
    gathered: Gathered,
    output_sizes: Sequence[int],
    *,
    tp_rank: int,
    tp_size: int,
    row_parallel: bool,
    kv_replicas: int = 1,
) -> list[ShardedPart]:
    """A rank's share of each part; `output_sizes` are the rows that a rank has of each of the layer's outputs.

    A pair of the whole fused layer gives one part, whose rows are taken from each output in turn. `kv_replicas` ranks
    share a key and value head; it is one for layers that have none.
    """
    if row_parallel:
        return [row_shard(part, tp_rank, tp_size) for part in gathered.parts]
    replicas = [1] + [kv_replicas] * (len(output_sizes) - 1)
    if len(gathered.parts) == len(output_sizes):
        return [
            column_shard(part, [shard_rows(_rows(part), size, tp_rank, replicas=share)])
            for part, size, share in zip(gathered.parts, output_sizes, replicas, strict=True)
        ]
    [part] = gathered.parts
    rows, offset = [], 0
    for size, share in zip(output_sizes, replicas, strict=True):
        whole = size * tp_size // share
        start, stop = shard_rows(whole, size, tp_rank, replicas=share)
        rows.append((offset + start, offset + stop))
        offset += whole
    return [column_shard(part, rows)]


def _rows(part: Mapping[str, Tensor]) -> int:
    if "order" in part:
        return part["order"].shape[0]
    return part["up" if "up" in part else "weight"].shape[0]


def _placeholder(gather: Any, role: str, dtype: torch.dtype) -> nn.Parameter:
    """An empty parameter by whose loader vLLM hands a stored tensor over."""
    parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)

    def load(_: nn.Parameter, loaded: Tensor, shard: str | int | None = None) -> None:
        gather(role, loaded, shard)

    parameter.weight_loader = load  # type: ignore[attr-defined]
    return parameter


def _config_class() -> type:
    from vllm.model_executor.layers.linear import (
        LinearBase,
        LinearMethodBase,
        RowParallelLinear,
        UnquantizedLinearMethod,
    )
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    class LowRankLinearMethod(LinearMethodBase):  # type: ignore[misc]
        """Loads and applies the pairs of one layer."""

        def __init__(self, forms: Sequence[str]) -> None:
            self.forms = forms

        @override
        def create_weights(
            self,
            layer: Any,
            input_size_per_partition: int,
            output_partition_sizes: list[int],
            input_size: int,
            output_size: int,
            params_dtype: torch.dtype,
            **_: Any,
        ) -> None:
            """Register empty parameters under the names on disk."""
            gathered, device = Gathered(self.forms), torch.empty(0).device

            def gather(role: str, loaded: Tensor, shard: str | int | None) -> None:
                if role == "bias":
                    own: Any = layer.bias
                    own.weight_loader(own, loaded, *(() if shard is None else (shard,)))
                    return
                if role == "weight" and loaded.numel() == 0:
                    return  # what a low-rank layer leaves in the place of its weight
                gathered.put(role, loaded if role == "order" else loaded.to(params_dtype), shard)
                if gathered.complete:
                    place(
                        shards_of(
                            gathered,
                            output_partition_sizes,
                            tp_rank=layer.tp_rank,
                            tp_size=layer.tp_size,
                            row_parallel=isinstance(layer, RowParallelLinear),
                            kv_replicas=getattr(layer, "num_kv_head_replicas", 1),
                        )
                    )
                    gathered.parts = [{} for _ in self.forms]

            def place(parts: list[ShardedPart]) -> None:
                down = stacked_down(parts)
                layer.low_rank_ranks = [None if part.down is None else part.down.shape[0] for part in parts]
                layer.low_rank_down = None if down is None else _parameter(down.to(device))
                layer.low_rank_ups = nn.ParameterList([_parameter(part.up.to(device)) for part in parts])

            layer.low_rank_ranks = None
            layer.register_parameter("weight", _placeholder(gather, "weight", params_dtype))
            layer.register_parameter("order", _placeholder(gather, "order", torch.int32))
            layer.down, layer.up = nn.Module(), nn.Module()
            layer.down.register_parameter("weight", _placeholder(gather, "down", params_dtype))
            layer.up.register_parameter("weight", _placeholder(gather, "up", params_dtype))
            layer.up.register_parameter("bias", _placeholder(gather, "bias", params_dtype))

        def process_weights_after_loading(self, layer: nn.Module) -> None:
            """Refuse a layer of which the checkpoint had only a part."""
            if layer.low_rank_ranks is None:
                raise ValueError(f"{getattr(layer, 'prefix', 'a layer')}: tensors of its low-rank pair are missing")

        def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
            """The layer's output on this rank."""
            down: Any = layer.low_rank_down
            ups: Any = layer.low_rank_ups
            ranks: Any = layer.low_rank_ranks
            y = fused_product(x, down, ups=list(ups), ranks=ranks)
            return y if bias is None else y + bias

    class LowRankVllmConfig(QuantizationConfig):  # type: ignore[misc]
        """What `config.json` says of the low-rank layers."""

        def __init__(self, spec: LowRankSpec) -> None:
            super().__init__()
            self.spec = spec

        def get_name(self) -> str:
            return METADATA_KEY

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            return [torch.float32, torch.float16, torch.bfloat16]

        @classmethod
        def get_min_capability(cls) -> int:
            return 0

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> LowRankVllmConfig:
            return cls(runnable_spec(config))

        def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
            forms = forms_of(part_names(prefix, self.packed_modules_mapping), prefix, self.spec)
            if isinstance(layer, LinearBase):
                return UnquantizedLinearMethod() if forms is None else LowRankLinearMethod(forms)
            if forms is not None or any(name.startswith(f"{prefix}.") for name in self.spec.layers):
                raise ValueError(
                    f"{prefix} is low-rank, and vLLM runs only linear layers so: compress with --exclude '{prefix}*'"
                )
            return None

    return LowRankVllmConfig


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)
