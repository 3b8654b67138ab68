"""Which tensors of a checkpoint are matrices that can be factorized, and why the others are not."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from compressor.checkpoint.reader import Checkpoint
from compressor.checkpoint.skeleton import Skeleton
from compressor.errors import BadInput

Kind = Literal["linear", "transposed linear", "convolution", "embedding", "other"]

# Names that embeddings go by where there is no module to ask.
_EMBEDDING = re.compile(r"(^|[._])(wte|wpe|shared|\w*embed(ding|dings|_tokens|_positions)?)$")


@dataclass(frozen=True)
class Layer:
    """A tensor of two or more dimensions as the matrix `d_out x d_in` that it applies to its inputs.

    `name` is the layer's name in the checkpoint and `module` its name in the model (for some architectures another);
    `skip` says why it cannot or should not be factorized, and is None for the eligible ones.
    """

    name: str
    module: str
    tensor: str
    bias: str | None
    kind: Kind
    tensor_shape: tuple[int, ...]
    shape: tuple[int, int]
    skip: str | None = None

    @property
    def parameters(self) -> int:
        return math.prod(self.tensor_shape)

    @property
    def eligible(self) -> bool:
        return self.skip is None


def find_layers(
    checkpoint: Checkpoint,
    skeleton: Skeleton | None = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> tuple[Layer, ...]:
    """Every matrix of the checkpoint in the order of the file, eligible or with the reason why it is not.

    With a skeleton its modules decide; without one the shapes and names do. `include` and `exclude` are globs on layer
    names, or regular expressions after `re:`; a pattern that matches no layer is a BadInput.
    """
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    matrices = [name for name, shape in shapes.items() if len(shape) >= 2 and min(shape) > 0]
    modules = dict(skeleton.module.named_modules()) if skeleton else {}
    shared = _shared_weights(modules)
    conv1d_file = any(_looks_transposed(name, shapes) for name in matrices)
    layers = []
    for name in matrices:
        if skeleton is None:
            layers.append(_from_names(name, shapes, conv1d_file))
            continue
        in_model = skeleton.module_name(name)
        owner = modules.get(layer_name(in_model)) if in_model else None
        if in_model is None or owner is None or not is_weight(in_model):
            layers.append(_other(name, shapes[name], "no single layer of the model holds it as its weight"))
        else:
            module = layer_name(in_model)
            layer = replace(_from_module(name, shapes, owner), module=module)
            if layer.eligible and len(shared.get(module, ())) > 1:
                others = ", ".join(other for other in shared[module] if other != module)
                layer = replace(layer, skip=f"shares its weight with {others}")
            layers.append(layer)
    aliases: dict[str, list[str]] = {}
    for alias, canonical in checkpoint.aliases.items():
        aliases.setdefault(canonical, []).append(alias)
    layers = [
        replace(layer, skip=f"shares its weight with {', '.join(aliases[layer.tensor])}")
        if layer.eligible and layer.tensor in aliases
        else layer
        for layer in layers
    ]
    layers = [
        replace(layer, skip=f"its numbers are {str(dtype).removeprefix('torch.')}")
        if layer.eligible and not (dtype := checkpoint.tensors[layer.tensor].dtype).is_floating_point
        else layer
        for layer in layers
    ]
    layers = [
        replace(layer, skip="already a factor of a low-rank pair") if _is_factor(layer.name, shapes) else layer
        for layer in layers
    ]
    return _select(layers, include, exclude)


def is_weight(tensor: str) -> bool:
    """Whether a tensor is called the weight of a layer."""
    return tensor == "weight" or tensor.endswith(".weight")


def layer_name(tensor: str) -> str:
    """The name of the layer that a tensor is the weight of; the tensor's own name when it is called otherwise.

    A model that is a single layer has the empty name.
    """
    return tensor.removesuffix("weight").removesuffix(".") if is_weight(tensor) else tensor


def _other(tensor: str, shape: tuple[int, ...], skip: str) -> Layer:
    name = layer_name(tensor)
    return Layer(name, name, tensor, None, "other", shape, (shape[0], math.prod(shape[1:])), skip)


def _bias(tensor: str, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    bias = tensor.removesuffix("weight") + "bias"
    return bias if is_weight(tensor) and len(shapes.get(bias, ())) == 1 else None


def _from_module(tensor: str, shapes: Mapping[str, tuple[int, ...]], owner: nn.Module) -> Layer:
    """The layer whose module is known: its class decides."""
    shape, name = shapes[tensor], layer_name(tensor)
    layer = Layer(name, name, tensor, _bias(tensor, shapes), "other", shape, (shape[0], math.prod(shape[1:])))
    if isinstance(owner, nn.Embedding):
        return replace(layer, kind="embedding", skip="an embedding")
    if isinstance(owner, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return replace(layer, kind="linear", skip="its weight is read directly by nn.MultiheadAttention")
    if type(owner) is nn.Linear:
        return replace(layer, kind="linear")
    if type(owner).__name__ == "Conv1D" and hasattr(owner, "nf"):
        return replace(layer, kind="transposed linear", shape=(shape[1], shape[0]))
    if type(owner) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        if owner.groups == 1:
            return replace(layer, kind="convolution")
        depthwise = owner.groups == owner.in_channels
        return replace(layer, kind="convolution", skip="depthwise" if depthwise else f"{owner.groups} groups")
    return replace(layer, skip=f"{type(owner).__name__} is not a layer that can be factorized")


def _from_names(tensor: str, shapes: Mapping[str, tuple[int, ...]], conv1d_file: bool) -> Layer:
    """The layer of which only names and shapes are known: what a stranger's file allows to say."""
    shape, name = shapes[tensor], layer_name(tensor)
    layer = Layer(name, name, tensor, _bias(tensor, shapes), "other", shape, (shape[0], math.prod(shape[1:])))
    outputs = shapes[layer.bias][0] if layer.bias else None
    if not is_weight(tensor):
        return replace(layer, skip="not the weight of a layer of its own")
    if len(shape) == 2:
        if _EMBEDDING.search(name):
            return replace(layer, kind="embedding", skip="an embedding")
        square_among_transposed = conv1d_file and re.search(r"\bc_(attn|proj|fc)$", name)
        if _looks_transposed(tensor, shapes) or square_among_transposed:
            return replace(layer, kind="transposed linear", shape=(shape[1], shape[0]))
        if outputs not in (None, shape[0]):
            return replace(layer, skip="its bias fits neither of its sides")
        return replace(layer, kind="linear")
    if len(shape) > 5:
        return replace(layer, skip=f"{len(shape)} dimensions")
    if outputs not in (None, shape[0]):
        return replace(layer, kind="convolution", skip="a transposed convolution")
    if shape[1] == 1 and shape[0] > 1 and math.prod(shape[2:]) > 1:
        return replace(layer, kind="convolution", skip="depthwise, or a single input channel")
    return replace(layer, kind="convolution")


def _looks_transposed(tensor: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """GPT-2's Conv1D stores `d_in x d_out`: its bias has the length of the second side and not of the first."""
    shape, bias = shapes[tensor], _bias(tensor, shapes)
    return len(shape) == 2 and bias is not None and shape[0] != shapes[bias][0] == shape[1]


def _shared_weights(modules: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """For every module the modules that hold the same weight, itself included."""
    holders: dict[int, list[str]] = {}
    for name, module in modules.items():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            holders.setdefault(id(weight), []).append(name)
    return {name: names for names in holders.values() for name in names}


def _is_factor(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    parent, _, role = name.rpartition(".")
    return role in ("down", "up") and shapes.get(f"{parent}.weight") == (0,)


def _select(layers: Sequence[Layer], include: Sequence[str], exclude: Sequence[str]) -> tuple[Layer, ...]:
    """Mark as skipped what the patterns leave out."""
    included, excluded = (
        {layer.name for layer in layers for pattern in patterns if _matches(pattern, layer.name)}
        for patterns in (include, exclude)
    )
    for option, patterns in (("--include", include), ("--exclude", exclude)):
        for pattern in patterns:
            if not any(_matches(pattern, layer.name) for layer in layers):
                raise BadInput(
                    f"{option} {pattern} matches no layer",
                    remedy="list the layers with 'compress inspect MODEL'; '*.mlp.*' is a glob, 're:...' an expression",
                )
    selected = []
    for layer in layers:
        if layer.eligible and include and layer.name not in included:
            layer = replace(layer, skip="not among --include")  # noqa: PLW2901
        if layer.eligible and layer.name in excluded:
            layer = replace(layer, skip="left out by --exclude")  # noqa: PLW2901
        selected.append(layer)
    return tuple(selected)


def _matches(pattern: str, name: str) -> bool:
    if not pattern.startswith("re:"):
        return fnmatchcase(name, pattern)
    try:
        return re.search(pattern[3:], name) is not None
    except re.error as error:
        raise BadInput(
            f"'{pattern}' is not a regular expression ({error})",
            remedy="correct it, or use a glob without 're:'",
        ) from error
