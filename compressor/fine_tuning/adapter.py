"""A difference as a LoRA adapter folder that PEFT loads as it is, and vLLM where its narrower rules hold.

A pair becomes `lora_A` (`down`) and `lora_B` (`up`) with alpha equal to the rank, so that the scale is one. What is
not a matrix of a linear or convolutional layer is saved whole with the module that holds it (`modules_to_save`);
changed biases of paired layers are `lora_B.bias`, which adds to them (`lora_bias`); PEFT runs these, but merges them
into the base only where all paired layers have a bias. The experts of a mixture have their names in the file, which
PEFT and vLLM stack, and are named to PEFT by the parameters that transformers holds them in.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import BadInput
from compressor.fine_tuning.adaptation import Adaptation, adaptation_metadata
from compressor.fine_tuning.difference import Difference
from compressor.fine_tuning.mixture import (
    ExpertBlock,
    adapted_as_parameters,
    expert_blocks,
    padded_ranks,
    require_pairs_of_experts,
)
from compressor.io import (
    ADAPTER_CONFIG,
    OPTIONS_FILE,
    PLAN_FILE,
    Artifact,
    Checkpoint,
    Document,
    Stack,
    TensorInfo,
    hub_model,
    require_in_range,
)
from compressor.lowrank import StoredErrors, join
from compressor.network import Architecture, Layer, tied_names

ADAPTER_WEIGHTS = "adapter_model.safetensors"

# Why a layer has no pair that needs none.
UNCHANGED = "as in the base"

_PREFIX = "base_model.model"
# What vLLM 0.33 accepts for --max-lora-rank, and the modules that it takes from `modules_to_save`.
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_SAVED = frozenset({"classifier", "score"})

# The modules that PEFT makes of a layer with a pair.
_PARTS_OF_PAIRS = (
    "base_layer",
    "lora_dropout",
    "lora_dropout.default",
    *(f"lora_{side}{end}" for side in "AB" for end in ("", ".default")),
)

REMEDY = "write factor pairs with -o NAME.safetensors, or compress the fine-tune itself, without `base`"


@dataclass(frozen=True)
class Saved:
    """The modules of a model that an adapter saves whole, and the file names of their tensors by module and name."""

    modules: tuple[str, ...]
    tensors: Mapping[str, str]


def adaptable_layers(
    difference: Difference, architecture: Architecture | None, layers: tuple[Layer, ...]
) -> tuple[Layer, ...]:
    """The layers with those skipped that an adapter of PEFT cannot hold as pairs.

    Raises `BadInput` for a change that an adapter cannot hold at all.
    """
    architecture = _required(architecture, difference.tuned)
    modules = dict(architecture.module.named_modules())
    for obstacle, reason in (
        (_strange_convolution, "PEFT's convolutions know no dilation and no padding mode"),
        (_read_by_parent, "its model reads more of it than PEFT's layers have"),
    ):
        layers = tuple(
            replace(layer, skip=reason)
            if layer.skip in (None, UNCHANGED) and obstacle(layer.module, modules)
            else layer
            for layer in layers
        )
    # PEFT adapts parameters without biases, and then no layer of the model can have one beside its pair.
    linear = [layer.module for layer in layers if layer.kind == "linear" and layer.tensor in difference.changed]
    if adapted_as_parameters(linear, expert_blocks(architecture.module)):
        layers = tuple(
            replace(layer, skip="its bias has changed, and PEFT has no biases beside the pairs of experts")
            if layer.skip in (None, UNCHANGED) and layer.bias in difference.changed
            else layer
            for layer in layers
        )
    whole = saved_by_peft(
        _saved_modules(difference, architecture, layers), architecture.module, where=difference.tuned.source
    )
    return tuple(
        replace(layer, skip=f"saved whole with {holder}")
        if layer.skip in (None, UNCHANGED) and (holder := _holder(layer.module, whole)) is not None
        else layer
        for layer in layers
    )


def require_no_fused_experts(difference: Difference, stacks: Sequence[Stack]) -> None:
    """Raise `BadInput` where a tensor changed that holds experts in the files: no adapter is written for these."""
    for stack in stacks:
        if not difference.changed.isdisjoint(stack.names()):
            raise BadInput(
                f"the experts in {stack.tensor} have changed, and a LoRA adapter is only written for experts that files"
                " hold one by one",
                where=difference.tuned.source,
                remedy=REMEDY,
            )


def _strange_convolution(name: str, modules: Mapping[str, nn.Module]) -> bool:
    module = modules[name]
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and (
        set(module.dilation) != {1} or module.padding_mode != "zeros" or isinstance(module.padding, str)
    )


def _read_by_parent(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the module that holds a layer does more with it than calling it, by its code: reading its stride, say.

    PEFT's layers have weight and bias, and nothing else of the layer that they stand for.
    """
    parent, _, attribute = name.rpartition(".")
    with suppress(OSError, TypeError, KeyError):  # code that is not there to be read
        code = inspect.getsource(type(modules[parent]).forward)
        return re.search(rf"\bself\.{re.escape(attribute)}\b(?!\(|\.weight\b|\.bias\b)", code) is not None
    return False


def _saved_modules(difference: Difference, architecture: Architecture, layers: tuple[Layer, ...]) -> set[str]:
    """The modules that hold a changed tensor which is neither weight nor bias of a layer that may have a pair."""
    pairs = {name for layer in layers if layer.skip in (None, UNCHANGED) for name in (layer.tensor, layer.bias)}
    whole, blocks = set(), expert_blocks(architecture.module)
    for name in sorted(difference.changed - pairs):
        in_model = architecture.module_name(name)
        if in_model is None or "." not in in_model:
            what = "the model puts together from several" if in_model is None else "is in no module of its own"
            raise BadInput(
                f"{name} has changed, and {what}, so no LoRA adapter can hold it",
                where=difference.tuned.source,
                remedy=REMEDY,
            )
        module = in_model.rpartition(".")[0]
        require_pairs_of_experts(module, name, blocks, where=difference.tuned.source, remedy=REMEDY)
        whole.add(module)
    return _outermost(whole)


def _outermost(modules: set[str]) -> set[str]:
    """The modules that lie in no other of them."""
    return {name for name in modules if _holder(name.rpartition(".")[0], modules) is None}


def _holder(module: str, whole: set[str]) -> str | None:
    """The saved module that a module is, or lies in."""
    return next((name for name in sorted(whole) if module == name or module.startswith(f"{name}.")), None)


def saved_by_peft(whole: set[str], module: nn.Module, pairs: Sequence[str] = (), *, where: Path | None) -> set[str]:
    """The modules that PEFT saves where it is told to save `whole`: all whose names end as one of those does.

    `pairs` are the layers that shall have pairs. Raises `BadInput` where PEFT would save one of them, or a part of it.
    """
    ends = tuple(whole)
    found = {name for name, _ in module.named_modules(remove_duplicate=False) if name.endswith(ends)}
    for name in sorted(found):
        if (outer := _holder(name.rpartition(".")[0], found)) is not None:
            raise BadInput(f"PEFT would save {name} twice, with {outer} too", where=where, remedy=REMEDY)
    for layer in pairs:
        parts = (f"{layer}.{part}" for part in _PARTS_OF_PAIRS)
        excluded = any(re.match(rf"(^|.*\.){name}($|\..*)", layer) for name in found)
        if excluded or _holder(layer, found) is not None or any(part.endswith(ends) for part in parts):
            taken = next((name for name in sorted(whole) if layer.endswith(name)), sorted(whole)[0])
            what = f"PEFT takes {layer}, which has a pair, for {taken}, which is to be saved whole"
            raise BadInput(what, where=where, remedy=REMEDY)
    return found


def lora_names(ranks: Mapping[str, int], module: nn.Module) -> dict[str, Any]:
    """What a configuration of PEFT says so that the layers, and no others, have pairs of these ranks and scale one.

    PEFT takes a listed name for the end of others too, and a pattern only as it is.
    """
    largest = max(ranks.values(), default=1)
    blocks = expert_blocks(module)
    as_parameters = adapted_as_parameters(list(ranks), blocks)
    experts = {name for block in blocks for name in block.modules}
    parameters = {f"{name}.weight": ranks[name] for name in as_parameters - experts}
    for block in blocks:
        if block.modules <= as_parameters:
            parameters |= block.parameter_ranks(ranks)
    modules = sorted(ranks.keys() - as_parameters)
    ends = tuple(f".{name}" for name in modules)
    others = [name for name, _ in module.named_modules(remove_duplicate=False) if name not in modules]
    ambiguous = any(name.endswith(ends) for name in others)
    named = {name: ranks[name] for name in modules} | dict(sorted(parameters.items()))
    patterns = {f"^{re.escape(name)}": rank for name, rank in named.items() if rank != largest}
    return {
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": "|".join(map(re.escape, modules)) if ambiguous else modules,
        "target_parameters": sorted(parameters) or None,
    }


def saved(adaptation: Adaptation, architecture: Architecture | None) -> Saved:
    """What the adapter saves whole once the plan is made: layers that stay dense are among it."""
    difference = adaptation.difference
    architecture = _required(architecture, difference.tuned)
    paired = {layer.name for layer, _ in adaptation.paired}
    layers = tuple(
        replace(layer, skip="stays dense") if layer.eligible and layer.name not in paired else layer
        for layer in adaptation.layers
    )
    whole = _saved_modules(difference, architecture, layers)
    tuned = difference.tuned
    file_names = {architecture.module_name(name): name for name in (*tuned.tensors, *tuned.aliases)}
    # PEFT unties what it saves, so each of two tied modules has its own copy.
    changed = {architecture.module_name(name) for name in difference.changed}
    for group in tied_names(architecture):
        if not changed.isdisjoint(group):
            whole |= {name.rpartition(".")[0] for name in group}
    whole = _outermost(whole)
    pairs = [layer.module for layer, _ in _pairs(adaptation, architecture)]
    whole = saved_by_peft(whole, architecture.module, pairs, where=tuned.source)
    tensors = {}
    for in_model in architecture.module.state_dict():
        if _holder(in_model.rpartition(".")[0], whole) is None:
            continue
        name = file_names.get(in_model)
        if name is None:
            what = f"{in_model} is to be saved with its module, and the fine-tune has no tensor for it"
            raise BadInput(what, where=tuned.source, remedy=REMEDY)
        tensors[in_model] = name
    return Saved(tuple(sorted(whole)), tensors)


@dataclass(frozen=True)
class Adapter:
    """The folder that is to be written.

    `ranks` are those of its pairs by layer; layers whose bias has changed and whose weight has not are among them, with
    a pair of zeros that carries the bias, and all experts of a block in which one has changed. `experts` are the
    blocks of the model; their layers have the names of the file in an adapter too, as PEFT and vLLM expect it.
    """

    adaptation: Adaptation
    saved: Saved
    ranks: tuple[tuple[Layer, int], ...]
    config: Mapping[str, Any]
    experts: tuple[ExpertBlock, ...] = ()

    @property
    def infos(self) -> list[TensorInfo]:
        """Name, shape and dtype of every tensor."""
        tuned = self.adaptation.difference.tuned
        infos = [
            replace(tuned.tensors[tuned.aliases.get(name, name)], name=f"{_PREFIX}.{key}")
            for key, name in self.saved.tensors.items()
        ]
        for layer, rank in self.ranks:
            dtype = tuned.tensors[layer.tensor].dtype
            infos += _lora_infos(layer, rank, dtype, place=self.place(layer), with_bias=self.with_bias)
        return infos

    def place(self, layer: Layer) -> str:
        """What the names of a layer's pair begin with."""
        expert = any(layer.module in block.modules for block in self.experts)
        return f"{_PREFIX}.{layer.name if expert else layer.module}"

    @property
    def with_bias(self) -> bool:
        """Whether the pairs have biases."""
        return bool(self.config["lora_bias"])

    @property
    def largest_rank(self) -> int:
        """The rank of the largest pair."""
        return max((rank for _, rank in self.ranks), default=1)


def adapter_of(adaptation: Adaptation, architecture: Architecture | None, base: str) -> Adapter:
    """The adapter of an adaptation; its configuration names `base`, or the repository of the hub that it came from."""
    start = adaptation.difference.base
    fetched = None if start.folder is None else hub_model(start.folder)
    architecture = _required(architecture, adaptation.difference.tuned)
    whole, changed = saved(adaptation, architecture), adaptation.difference.changed
    pairs = _pairs(adaptation, architecture)
    config = {
        "peft_type": "LORA",
        "task_type": _peft_task(adaptation.difference.tuned),
        "base_model_name_or_path": base if fetched is None else fetched.repository,
        "revision": None if fetched is None else fetched.commit,
        "inference_mode": True,
        **lora_names({layer.module: rank for layer, rank in pairs}, architecture.module),
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": any(layer.bias in changed for layer, _ in pairs),
        "modules_to_save": list(whole.modules) or None,
        "fan_in_fan_out": any(layer.kind == "transposed linear" for layer, _ in pairs),
    }
    return Adapter(adaptation, whole, pairs, config, expert_blocks(architecture.module))


def _pairs(adaptation: Adaptation, architecture: Architecture) -> tuple[tuple[Layer, int], ...]:
    """The layers that have pairs in an adapter, with their ranks.

    Those whose bias alone has changed are among them, and all experts of a block in which one has changed.
    """
    changed = adaptation.difference.changed
    layers = {layer.module: layer for layer in adaptation.layers}
    ranks = {layer.module: plan.rank or 1 for layer, plan in adaptation.paired}
    ranks |= {layer.module: 1 for layer in layers.values() if layer.skip == UNCHANGED and layer.bias in changed}
    ranks = padded_ranks(ranks, expert_blocks(architecture.module))
    return tuple((layers[name], rank) for name, rank in ranks.items())


def require_pairs(adapter: Adapter) -> None:
    """Raise `BadInput` for an adapter that has no pair: PEFT does not load it."""
    if not adapter.ranks:
        tuned = adapter.adaptation.difference.tuned
        raise BadInput("no layer's difference is of low rank here", where=tuned.source, remedy=REMEDY)


def _lora_infos(layer: Layer, rank: int, dtype: torch.dtype, *, place: str, with_bias: bool) -> list[TensorInfo]:
    (d_out, d_in), kernel = layer.shape, layer.tensor_shape[2:] if layer.kind == "convolution" else ()
    down = (rank, layer.tensor_shape[1], *kernel) if layer.kind == "convolution" else (rank, d_in)
    infos = [
        TensorInfo(f"{place}.lora_A.weight", down, dtype),
        TensorInfo(f"{place}.lora_B.weight", (d_out, rank, *(1 for _ in kernel)), dtype),
    ]
    return [*infos, TensorInfo(f"{place}.lora_B.bias", (d_out,), dtype)] if with_bias else infos


def adapter_tensors(
    adapter: Adapter, device: torch.device, done: Callable[[str, float], None]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the folder, one layer at a time; `done` is told each pair's relative error."""
    adaptation = adapter.adaptation
    tuned = adaptation.difference.tuned
    for key, name in adapter.saved.tensors.items():
        yield f"{_PREFIX}.{key}", tuned.read(name)
    plans = {layer.name: plan for layer, plan in adaptation.paired}
    for layer, rank in adapter.ranks:
        if layer.name in plans:
            factors = adaptation.factors(layer, plans[layer.name], device)
            down, up = (factors.tensors[join(layer.name, f"{factor}.weight")] for factor in ("down", "up"))
            done(layer.name, factors.error)
            if missing := rank - len(down):
                down = torch.cat([down, down.new_zeros(missing, *down.shape[1:])])
                up = torch.cat([up, up.new_zeros(len(up), missing, *up.shape[2:])], dim=1)
        else:
            dtype = tuned.tensors[layer.tensor].dtype
            infos = _lora_infos(layer, rank, dtype, place=adapter.place(layer), with_bias=False)
            down, up = (torch.zeros(info.shape, dtype=info.dtype) for info in infos)
        yield from _lora_tensors(adapter, layer, down=down, up=up)


def _lora_tensors(adapter: Adapter, layer: Layer, *, down: Tensor, up: Tensor) -> Iterator[tuple[str, Tensor]]:
    difference, place = adapter.adaptation.difference, adapter.place(layer)
    yield f"{place}.lora_A.weight", down
    yield f"{place}.lora_B.weight", up
    if adapter.with_bias:
        bias = torch.zeros(layer.shape[0], dtype=torch.float64)
        if layer.bias in difference.changed and layer.bias is not None:
            bias = difference.tuned.read(layer.bias).double() - difference.base.read(layer.bias).double()
        yield f"{place}.lora_B.bias", require_in_range(f"{place}.lora_B.bias", bias.to(up.dtype))


def adapter_artifact(adapter: Adapter, device: torch.device, errors: StoredErrors) -> Artifact:
    """The folder of an adapter, computed on `device`; the errors of the pairs are noted meanwhile."""
    adaptation = adapter.adaptation
    plan = adaptation.plan.portable().to_dict() | {"recipe": adaptation.recipe.to_dict()}
    documents: dict[str, Document] = {ADAPTER_CONFIG: adapter.config, PLAN_FILE: plan}
    if adaptation.provenance is not None:
        documents[OPTIONS_FILE] = adaptation.provenance.document()
    return Artifact(
        form="folder",
        infos=adapter.infos,
        tensors=partial(adapter_tensors, adapter, device, errors),
        metadata=adaptation_metadata(adaptation, in_file=False),
        weight_file=ADAPTER_WEIGHTS,
        documents=lambda: documents,
    )


def vllm_obstacles(adapter: Adapter) -> tuple[str, ...]:
    """Why vLLM would refuse the adapter, by the rules of its 0.33; empty where it would not."""
    obstacles = []
    if strange := [name for name in adapter.saved.modules if name not in _VLLM_SAVED]:
        obstacles.append(f"modules_to_save ({len(strange)} of them)")
    if adapter.with_bias:
        obstacles.append("lora_bias")
    if adapter.largest_rank > _VLLM_RANKS[-1]:
        obstacles.append(f"rank {adapter.largest_rank}, above {_VLLM_RANKS[-1]}")
    if any(layer.kind == "convolution" for layer, _ in adapter.ranks):
        obstacles.append("convolutions")
    return tuple(obstacles)


def llama_cpp_obstacles(adapter: Adapter) -> tuple[str, ...]:
    """Why llama.cpp's `convert_lora_to_gguf.py` would refuse the adapter; empty where it would not.

    It takes tensors that are called an A or a B of a linear layer, and no others; norms that are saved whole it leaves
    out without refusing.
    """
    obstacles = []
    if adapter.saved.modules:
        obstacles.append(f"modules_to_save ({len(adapter.saved.modules)} of them)")
    if adapter.with_bias:
        obstacles.append("lora_bias")
    if any(layer.kind == "convolution" for layer, _ in adapter.ranks):
        obstacles.append("convolutions")
    if adapter.config["target_parameters"]:
        obstacles.append("pairs of experts")
    return tuple(obstacles)


def vllm_rank(adapter: Adapter) -> int:
    """The smallest --max-lora-rank that vLLM knows and that the adapter fits into."""
    return next((rank for rank in _VLLM_RANKS if rank >= adapter.largest_rank), adapter.largest_rank)


def _peft_task(checkpoint: Checkpoint) -> str | None:
    """PEFT's name for the task of an architecture; None for those whose head PEFT would treat in its own way."""
    architectures = (checkpoint.config or {}).get("architectures") or [""]
    return "CAUSAL_LM" if str(architectures[0]).endswith(("ForCausalLM", "LMHeadModel")) else None


def _required(architecture: Architecture | None, tuned: Checkpoint) -> Architecture:
    if architecture is None:
        raise BadInput("its modules are not known, and an adapter names them", where=tuned.source, remedy=REMEDY)
    return architecture
