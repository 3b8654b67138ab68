"""A model's module tree without its weights, which says which tensor is a linear layer and which a convolution."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from compressor.io import Stack
from compressor.network.conversions import (
    initialize_buffers,
    loaded_in_several_dtypes,
    name_conversions,
    name_in_model,
    without_merges,
)
from compressor.network.embeddings import join_embeddings
from compressor.network.experts import ExpertLayout, separable_experts, separate_experts
from compressor.torch_state import in_float64

# Far more modules than any published model has.
MOST_MODULES = 200_000


@dataclass(frozen=True)
class Architecture:
    """A module tree, and the name in it of every tensor of a checkpoint.

    `module_name` maps a tensor's name in the file to its name in the tree; None where the tree assembles the tensor
    from several or does not have it. `initial_sizes` is known of a model whose weights were new when it was opened:
    the root mean square of each weight of two or more dimensions, by its name in the tree. `stack` says of a tensor
    that the tree has in several layers which these are.
    """

    module: nn.Module
    module_name: Callable[[str], str | None]
    initial_sizes: Mapping[str, float] | None = None
    stack: Callable[[str], Stack | None] = lambda _: None


def module_architecture(module: nn.Module, *, untrained: bool = False) -> Architecture:
    """The architecture of a module in memory, whose tensors have the names of its state dict."""
    return Architecture(module, lambda name: name, _sizes(module) if untrained else None)


def root_mean_square(weight: Tensor) -> float:
    """The root mean square of a tensor, in float64."""
    return float(in_float64(weight.detach()).square().mean().sqrt())


def _sizes(module: nn.Module) -> dict[str, float]:
    return {
        name: root_mean_square(weight)
        for name, weight in module.named_parameters(remove_duplicate=False)
        if weight.dim() >= 2
    }


@contextmanager
def _few_modules(most: int) -> Iterator[None]:
    """Stop building a model that has too many modules."""
    built = 0

    def count(_module: nn.Module, _name: str, _submodule: nn.Module) -> None:
        nonlocal built
        built += 1
        if built > most:
            raise ValueError(f"more than {most:,} modules")

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def transformers_architecture(
    folder: Path, *, most_modules: int = MOST_MODULES, dtype: torch.dtype | None = None
) -> Architecture | None:
    """Build the module tree of the `config.json` in `folder` on the meta device, with separate experts.

    `dtype` is that of its weights where the configuration names none. None if transformers does not know the
    architecture, or cannot build it without running the checkpoint's own code.
    """
    model = transformers_module(folder, most_modules=most_modules, dtype=dtype)
    if model is None:
        return None
    together, every = model.state_dict(), name_conversions(model)
    try:
        layouts = separable_experts(model)
        separate_experts(model)
        join_embeddings(model)
    except Exception:  # as in `transformers_module`
        return None
    known, prefix = model.state_dict(), model.base_model_prefix
    conversions = without_merges(every, known)

    def module_name(name: str) -> str | None:
        return name_in_model(name, conversions, prefix, names=known)

    def stack(tensor: str) -> Stack | None:
        own = name_in_model(tensor, every, prefix, names=together) if layouts else None
        return None if own is None else _stack(tensor, own, layouts, module_name=module_name)

    return Architecture(model, module_name, stack=stack)


def _stack(
    tensor: str, own: str, layouts: Mapping[str, ExpertLayout], *, module_name: Callable[[str], str | None]
) -> Stack | None:
    """The layers of experts that a tensor holds, which is called `own` in the model with fused experts; None if none.

    Their names in the file are such that transformers finds them.
    """
    place, _, parameter = own.rpartition(".")
    layout = layouts.get(place)
    if layout is None or parameter not in layout.parameters:
        return None
    stem = tensor.removesuffix(f".{parameter}")
    if stem == tensor:
        parent = tensor.removesuffix(".weight").removesuffix(".bias").rpartition(".")[0]
        stem = f"{parent}.{place.rpartition('.')[2]}"
    for each in (stem, place):
        found = layout.stack(parameter, tensor=tensor, stem=each)
        if module_name(found.first) == layout.stack(parameter, tensor=own, stem=place).first:
            return found
    return None


def transformers_without_weights(folder: Path, dtype: torch.dtype | None) -> Architecture | None:
    """As `transformers_architecture`, with buffers that have values, and the dtypes that transformers loads it in.

    `dtype` is that of the weights, which counts where the configuration names none. None also for a model that
    transformers loads in more than one dtype, or in one that is not known.
    """
    architecture = transformers_architecture(folder, dtype=dtype)
    if architecture is None:
        return None
    model: Any = architecture.module
    if model.config.dtype is None or loaded_in_several_dtypes(model):
        return None
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    initialize_buffers(model)
    if model.can_generate():
        with suppress(OSError):  # there need not be a file of them
            model.generation_config = type(model.generation_config).from_pretrained(folder, local_files_only=True)
    return replace(architecture, module=model.eval())


def transformers_module(
    folder: Path, *, most_modules: int = MOST_MODULES, dtype: torch.dtype | None = None
) -> Any | None:
    """The model of the `config.json` in `folder`, on the meta device; None as for `transformers_architecture`.

    `dtype` is that of its weights where the configuration names none.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        architecture = getattr(transformers, (config.architectures or ["AutoModel"])[0])
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        if config.dtype is None:
            config.dtype = dtype
        with torch.device("meta"), _few_modules(most_modules):
            build = architecture.from_config if architecture is transformers.AutoModel else architecture._from_config
            model: Any = build(config)
        model.tie_weights()
    except Exception:  # whatever a foreign configuration makes transformers raise, the file itself can still be read
        return None
    return model
