"""Which tensors of a checkpoint are matrices that can be factorized, and why the others are not."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from types import CodeType, MethodType
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList

from compressor.arguments import as_patterns
from compressor.errors import BadInput
from compressor.formatting import format_shape
from compressor.io import Checkpoint
from compressor.io.adapters import is_adapter_factor
from compressor.network.architecture import Architecture
from compressor.network.embeddings import only_scales

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

Kind = Literal[
    "linear",
    "transposed linear",
    "convolution",
    "grouped convolution",
    "transposed convolution",
    "embedding",
    "parameter",
    "other",
]

# The reasons for which the user leaves a layer out.
NOT_INCLUDED, EXCLUDED = "not among `include`", "left out by `exclude`"

# Torch has further floating-point dtypes, but few operations for them.
_FACTORIZABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# How embeddings are named, if there is no module: in the last part of the layer's name.
_EMBEDDING = re.compile(r"(^|_)emb|embed|^wte$|^wpe$|^shared$|relative_attention_bias")
# A parameter with such a name is a matrix to multiply with, not a lookup table.
_WEIGHT = re.compile(r"(^|_)weight(_|$)")
# The names of PyTorch's own weights, the only ones that are trusted without a module.
_WEIGHT_OF_PYTORCH = re.compile(r"weight(_(ih|hh|hr)(_l\d+)?(_reverse)?)?|(in|q|k|v)_proj_weight")
# Tensors that pruning and quantization store next to a weight.
_BESIDE_A_WEIGHT = re.compile(r"weight\w*_(mask|scales?|scale_inv|zeros?|zero_point|packed|shape|g_idx)$")
_PARAMETRIZED = re.compile(r"\bparametrizations\.(\w+)\.original\d*$")
# The attributes that every module has, hooks among them.
_OF_PYTORCH = frozenset(vars(nn.Module()))
_IMAGE_CHANNELS = (3, 4)
_LARGEST_KERNEL = 15


@dataclass(frozen=True)
class StoredAs:
    """How a layer is stored that is not dense: the numbers and bytes that it takes.

    `form` and `rank` are those of the pair that it is already; None where others quantized it, by the `encoding`.
    """

    form: str | None
    rank: int | None
    numbers: int
    nbytes: int
    encoding: str | None = None


@dataclass(frozen=True, repr=False)
class Layer:
    """A tensor of two or more dimensions as the matrix `d_out x d_in` that it applies to its inputs.

    The inputs of an embedding are its tokens: `d_out` is the length of its vectors and `d_in` the size of the
    vocabulary. A transposed convolution applies its matrix of `d_out = channels x kernel` at every position of its
    input, and adds the results where they overlap. A grouped convolution applies each of the `groups` parts of its rows
    to the patches of its own part of the input channels.

    Attributes:
        name: The layer's name in the checkpoint.
        module: Its name in the model, which differs from `name` in some architectures.
        tensor: The name of its weight in the checkpoint.
        bias: The name of its bias, or None.
        kind: What the layer is. A `parameter` is a matrix that a module multiplies with in code of its own; it can be
            stored as factors, and is multiplied out when the module runs.
        tensor_shape: The shape of the weight as it is stored.
        shape: `(d_out, d_in)`.
        skip: Why it cannot or should not be factorized; None if it is eligible.
        head: The output head in the model that is tied to an embedding, and changes with it.
        parameter: The name of the weight in the module.
        places: Further names in the model of the same module.
        stored: What it is in a model that is compressed already, or that others quantized; None where it is dense.
        groups: How many parts of the channels a convolution keeps apart.
    """

    name: str
    module: str
    tensor: str
    bias: str | None
    kind: Kind
    tensor_shape: tuple[int, ...]
    shape: tuple[int, int]
    skip: str | None = None
    head: str | None = None
    parameter: str = "weight"
    places: tuple[str, ...] = ()
    stored: StoredAs | None = None
    groups: int = 1

    def __repr__(self) -> str:
        skip = "" if self.skip is None else f", skipped: {self.skip}"
        return f"<Layer {self.name}: {self.kind}, {format_shape(self.shape)}{skip}>"

    @property
    def is_tied(self) -> bool:
        """Whether several modules, or one in several places, use the tensor: an example uses it more often than one."""
        return self.head is not None or bool(self.places)

    @property
    def parameters(self) -> int:
        """The numbers of its matrix."""
        return math.prod(self.tensor_shape)

    @property
    def stored_parameters(self) -> int:
        """The numbers of its dtype that it takes as it is: those of its matrix, or of what it is stored as."""
        return self.parameters if self.stored is None else self.stored.numbers

    @property
    def block_shape(self) -> tuple[int, int]:
        """The sides of the matrix of one group, of which the smaller is the largest rank; without groups its own."""
        return self.shape[0] // self.groups, self.shape[1]

    @property
    def is_pair(self) -> bool:
        """Whether it is a pair already."""
        return self.stored is not None and self.stored.form is not None

    @property
    def encoding(self) -> str | None:
        """How others quantized it, in words; None where they did not."""
        return None if self.stored is None else self.stored.encoding

    @property
    def eligible(self) -> bool:
        return self.skip is None


def find_layers(
    checkpoint: Checkpoint,
    architecture: Architecture | None = None,
    *,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    embeddings: bool = False,
) -> tuple[Layer, ...]:
    """List every matrix of the checkpoint, eligible or with the reason why it is not.

    The order is that of the file, but numbers in names count as numbers: 2 comes before 10. With an architecture the
    modules decide what a tensor is; without one, shapes and names do. With `embeddings`, embeddings whose modules are
    known are eligible, each together with an output head that is tied to it. `include` and `exclude` are globs on layer
    names, or regular expressions after `re:`; a pattern that matches no layer is a `BadInput`.
    """
    known = checkpoint.tensors
    shapes = {name: info.shape for name, info in known.items()}
    shapes |= {alias: shapes[name] for alias, name in checkpoint.aliases.items()}
    matrices = [name for name, info in known.items() if len(info.shape) >= 2 and min(info.shape) > 0]
    layers = (
        _from_file(matrices, shapes) if architecture is None else _from_architecture(matrices, shapes, architecture)
    )
    # A head that is tied to an embedding changes with it, and one module under several names is one layer.
    together = {f"{layer.head}.weight" for layer in layers}
    together |= {f"{place}.{layer.parameter}" for layer in layers for place in layer.places}
    shared = {
        name: alias
        for alias, name in checkpoint.aliases.items()
        if architecture is None or architecture.module_name(alias) not in together
    }
    for index, layer in enumerate(layers):
        skip = layer.skip
        if layer.kind == "embedding" and not embeddings:
            skip = skip or "an embedding; `embeddings=True` includes it"
        if layer.tensor in shared:
            skip = skip or f"shares its weight with {layer_name(shared[layer.tensor])}"
        if known[layer.tensor].dtype not in _FACTORIZABLE:
            skip = skip or f"its numbers are {str(known[layer.tensor].dtype).removeprefix('torch.')}"
        if is_adapter_factor(layer.tensor):
            skip = skip or "part of an adapter, which has low rank already"
        if any(f"{layer.name}.{factor}" in shapes for factor in ("down.weight", "up.weight", "order")):
            skip = skip or "the names of its factors are taken"
        layers[index] = replace(layer, skip=skip)
    selected = _select(layers, as_patterns(include, "include"), as_patterns(exclude, "exclude"))
    by_tensor = {layer.tensor: layer for layer in selected}
    return tuple(by_tensor[tensor] for tensor in in_natural_order(by_tensor))


def architecture_mismatch(checkpoint: Checkpoint, architecture: Architecture) -> str | None:
    """Say how the tensors of a checkpoint do not fit a model, in a few words; None if they fit.

    They fit if some of them are in the model, and these have the shapes that they have there.
    """
    state = architecture.module.state_dict()
    fitting = 0
    for name, info in checkpoint.tensors.items():
        in_model = architecture.module_name(name)
        if in_model is None or in_model not in state:
            continue
        shape = tuple(state[in_model].shape)
        if info.shape != shape and min(math.prod(info.shape), math.prod(shape)) > 0:
            return f"{name} is {_sides(info.shape)} in the file and {_sides(shape)} in the model"
        fitting += 1
    return None if fitting else "none of the tensors is in the model"


def _sides(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single number"


def in_natural_order(names: Iterable[str]) -> list[str]:
    """Sort names so that, where they first differ in a number, the numbers decide: 0, 1, 2, 10."""
    split = {name: re.split(r"(\d+)", name) for name in names}
    places: dict[tuple[str, ...], int] = {}

    def key(name: str) -> tuple[int, ...]:
        """Numbers, at the odd places, count themselves; words in which order they came after the same beginning."""
        parts = split[name]
        beginnings = (tuple(parts[: end + 1]) for end in range(len(parts)))
        return tuple(
            int(parts[place]) if place % 2 else places.setdefault(beginning, len(places))
            for place, beginning in enumerate(beginnings)
        )

    keys = {name: key(name) for name in split}
    return sorted(split, key=keys.__getitem__)


def is_weight(tensor: str) -> bool:
    """Whether a tensor is named as the weight of a layer."""
    return tensor == "weight" or tensor.endswith(".weight")


def layer_name(tensor: str) -> str:
    """The name of the layer that a tensor is the weight of; for any other tensor its own name.

    A model that is a single layer has the empty name.
    """
    return tensor.removesuffix("weight").removesuffix(".") if is_weight(tensor) else tensor


def _from_architecture(
    matrices: Sequence[str], shapes: Mapping[str, tuple[int, ...]], architecture: Architecture
) -> list[Layer]:
    """The layers of a model whose modules are known."""
    modules = dict(architecture.module.named_modules(remove_duplicate=False))
    names: dict[int, list[str]] = {}
    holders: dict[int, list[str]] = {}
    for name, module in modules.items():
        names.setdefault(id(module), []).append(name)
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter) and names[id(module)] == [name]:
            holders.setdefault(id(weight), []).append(name)
    stored = {architecture.module_name(tensor) for tensor in matrices}
    called_apart = _called_apart(modules)
    layers = []
    for tensor in matrices:
        in_model = architecture.module_name(tensor)
        place, _, parameter = (in_model or "").rpartition(".")
        owner = modules.get(place)
        if in_model is None or owner is None or owner._parameters.get(parameter) is None:
            shape, name = shapes[tensor], layer_name(tensor)
            what = "a buffer" if owner is not None and parameter in owner._buffers else None
            reason = what or "no single layer of the model holds it as its weight"
            layers.append(Layer(name, name, tensor, None, "other", shape, _flattened(shape), reason))
            continue
        reader = directly_read_by(owner, modules.get(place.rpartition(".")[0]))
        layer = _from_module(tensor, shapes, owner, parameter=parameter, reader=reader)
        places = tuple(name for name in names[id(owner)] if name != place)
        layer = replace(layer, module=place, parameter=parameter, places=places)
        if again := [name for name in places if f"{name}.{parameter}" in stored]:
            layer = replace(layer, skip=layer.skip or f"the same module as {again[0]}, but stored separately")
        if layer.kind == "parameter" and _of_transformers(architecture.module):
            layer = replace(layer, skip=layer.skip or f"transformers has no low-rank form of {_owner(owner, reader)}")
        layer = replace(layer, skip=layer.skip or _own_code(modules, place, layer.kind))
        if (holder := called_apart.get(id(owner))) is not None:
            layer = replace(layer, skip=layer.skip or f"{holder} refers to it too, and cannot be updated")
        others = holders.get(id(owner._parameters[parameter]), []) if parameter == "weight" else []
        others = [name for name in others if name not in names[id(owner)]]
        if layer.kind == "embedding" and [type(modules[other]) for other in others] == [nn.Linear]:
            [head] = others
            apart = f"{head} shares its weight, but is stored separately" if f"{head}.weight" in stored else None
            own = _own_code(modules, head, "linear")
            layer = replace(layer, head=head, skip=layer.skip or apart or (own and f"{head}, tied to it: {own}"))
        elif others:
            layer = replace(layer, skip=layer.skip or f"shares its weight with {', '.join(others)}")
        layers.append(layer)
    return layers


def _own_code(modules: Mapping[str, nn.Module], place: str, kind: Kind) -> str | None:
    """Why a module cannot run with factors because its computation was modified by hand; None if it can."""
    if kind != "parameter" and (own := own_state(modules[place])) is not None:
        return own
    if "forward" in vars(modules[place]):
        return "its forward was replaced"
    parts = place.split(".") if place else []
    for above in (".".join(parts[:depth]) for depth in range(len(parts))):
        # In a copy of the model a plain function would still call the original; bound methods are copied along.
        replaced = vars(modules[above]).get("forward")
        if replaced is not None and not isinstance(replaced, MethodType | partial):
            return f"the forward of {above or 'the model'} was replaced"
    return None


def _called_apart(modules: Mapping[str, nn.Module]) -> dict[int, str]:
    """Modules held by attributes that PyTorch does not track, such as a list, by id -> the attribute's name."""
    found: dict[int, str] = {}
    for name, module in modules.items():
        for attribute, value in vars(module).items():
            if attribute not in _OF_PYTORCH:
                held = value.values() if isinstance(value, dict) else value
                for each in held if isinstance(value, dict | list | tuple) else (value,):
                    target = each.__self__ if isinstance(each, MethodType) else each
                    if isinstance(target, nn.Module):
                        found.setdefault(id(target), f"{name}.{attribute}" if name else attribute)
    return found


def own_state(layer: nn.Module) -> str | None:
    """Why a layer does more than its class, so that no other layer can replace it; None for most."""
    if "forward" in vars(layer):
        return "its forward was replaced"
    names = [*layer._parameters, *layer._buffers, *layer._modules]
    own = ("weight", "bias", *layer._buffers) if isinstance(layer, nn.Embedding) and only_scales(layer) else ()
    further = [name for name in names if name not in (own or ("weight", "bias"))]
    if further:
        return f"it has {', '.join(further)} besides its weight"
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return (
        "a hook reads its weight"
        if any(map(_reads_weight, (hook for each in hooks for hook in each.values())))
        else None
    )


def _reads_weight(hook: Any) -> bool:
    """Whether the code of a hook, or of a function inside it, reads `weight`, which a pair of factors does not have.

    Hooks that compute the weight itself are PyTorch's own, and are removed earlier.
    """
    if type(hook).__module__.startswith("torch."):
        return False
    called = hook.func if isinstance(hook, partial) else hook
    called = called if hasattr(called, "__code__") or isinstance(called, MethodType) else type(called).__call__
    waiting: list[CodeType] = [called.__code__] if hasattr(called, "__code__") else []
    while waiting:
        code = waiting.pop()
        if "weight" in code.co_names or "weight" in code.co_consts:
            return True
        waiting.extend(inner for inner in code.co_consts if isinstance(inner, CodeType))
    return False


def directly_read_by(owner: nn.Module, parent: nn.Module | None) -> nn.Module | None:
    """The PyTorch module that reads the weight of a layer instead of calling the layer, if there is one."""
    if isinstance(owner, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return parent or owner
    return parent if isinstance(parent, nn.TransformerEncoderLayer) else None


def _owner(owner: nn.Module, reader: nn.Module | None) -> str:
    return type(reader or owner).__name__


def _of_transformers(module: nn.Module) -> bool:
    return any(base.__module__.startswith("transformers.") for base in type(module).__mro__)


def _flattened(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], math.prod(shape[1:]))


def _bias(tensor: str, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    bias = tensor.removesuffix("weight") + "bias"
    return bias if is_weight(tensor) and len(shapes.get(bias, ())) == 1 else None


def _from_module(
    tensor: str, shapes: Mapping[str, tuple[int, ...]], owner: nn.Module, *, parameter: str, reader: nn.Module | None
) -> Layer:
    """The layer of a known module: its class decides."""
    shape, name = shapes[tensor], layer_name(tensor)
    layer = Layer(name, name, tensor, _bias(tensor, shapes), "other", shape, _flattened(shape))
    if parameter != "weight" or (reader is not None and type(owner).__name__.endswith("Linear")):
        return _as_parameter(layer, shapes, owner, parameter=parameter)
    if isinstance(owner, nn.Embedding):
        layer = replace(layer, kind="embedding", bias=None, shape=(shape[1], shape[0]))
        if type(owner) is not nn.Embedding and not only_scales(owner):
            what = f"an embedding, but {type(owner).__name__} does more than look rows up and scale them"
            return replace(layer, skip=what)
        return replace(layer, skip="an embedding whose rows max_norm rescales" if owner.max_norm is not None else None)
    if type(owner) is nn.Linear:
        return replace(layer, kind="linear")
    if type(owner).__name__ == "Conv1D" and hasattr(owner, "nf"):
        return replace(layer, kind="transposed linear", shape=(shape[1], shape[0]))
    if type(owner) in (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS):
        assert isinstance(owner, _ConvNd)
        layer = replace(layer, kind="convolution")
        if type(owner) in TRANSPOSED_CONVOLUTIONS:
            layer = replace(layer, kind="transposed convolution", shape=_flattened(shape)[::-1])
        return layer if owner.groups == 1 else _grouped(layer, owner)
    return _as_parameter(layer, shapes, owner, parameter=parameter)


def _grouped(layer: Layer, owner: _ConvNd) -> Layer:
    """A convolution with groups: one without a transposed kernel is a matrix a group."""
    if owner.groups == owner.in_channels:
        return replace(layer, skip="depthwise")
    if layer.kind == "transposed convolution":
        return replace(layer, skip=f"a transposed convolution with {owner.groups} groups")
    if owner.groups == owner.out_channels:
        return replace(
            layer, skip=f"its {owner.groups} groups have one output channel each, which no pair makes smaller"
        )
    return replace(layer, kind="grouped convolution", groups=owner.groups)


def _as_parameter(layer: Layer, shapes: Mapping[str, tuple[int, ...]], owner: nn.Module, *, parameter: str) -> Layer:
    """A matrix that the module uses in code of its own, if its module or name says that it is one."""
    layer, matrix = replace(layer, bias=None), len(layer.tensor_shape) == 2
    if isinstance(owner, nn.LayerNorm | nn.RMSNorm | nn.EmbeddingBag):
        return replace(layer, skip=f"{type(owner).__name__} is not a layer that can be factorized")
    if isinstance(owner, ParametrizationList):
        computing = ", ".join(type(each).__name__ for each in owner)
        if [type(each) for each in owner] not in ([_WeightNorm], [_SpectralNorm]):
            return replace(layer, skip=f"it is parametrized by {computing}, which is not known")
        if _is_called_embedding(layer.tensor, layer.tensor_shape):
            return replace(layer, skip="an embedding, by its name")
        return _checked_parameter(layer, known=True)
    if isinstance(owner, nn.MultiheadAttention | nn.RNNBase | nn.RNNCellBase) and matrix:
        known = parameter not in ("bias_k", "bias_v") and _BESIDE_A_WEIGHT.search(parameter) is None
    else:
        named = _is_called_embedding(layer.tensor, layer.tensor_shape) or any(
            _EMBEDDING.search(name) for name in (parameter, type(owner).__name__.lower())
        )
        if named and not isinstance(owner, nn.Linear) and matrix:
            return replace(layer, skip=f"an embedding, by its name or its class's, {type(owner).__name__}")
        known = matrix and _WEIGHT.search(parameter) is not None and _BESIDE_A_WEIGHT.search(parameter) is None
        known = known or _is_normalized(layer.tensor, shapes)
    if not known and parameter == "weight":
        return replace(layer, skip=f"{type(owner).__name__} is not a layer that can be factorized")
    return _checked_parameter(layer, known)


def _is_called_embedding(tensor: str, shape: tuple[int, ...]) -> bool:
    """Whether a weight, or a tensor it is computed from, is a matrix of a module that is named as an embedding."""
    module, _, parameter = _PARAMETRIZED.sub(r"\1", tensor).rpartition(".")
    weight = parameter.removesuffix("_orig").removesuffix("_v") == "weight"
    return weight and len(shape) == 2 and _EMBEDDING.search(module.rpartition(".")[2]) is not None


def _is_normalized(tensor: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a pruned or normalized weight is computed from a tensor, by its name and by what is stored with it.

    Of parametrizations weight and spectral normalization are known by that, as are the older ways of PyTorch.
    """
    if _PARAMETRIZED.search(tensor):
        stem = tensor.rpartition(".")[0]
        if tensor.endswith(".original1"):
            return _is_norm_of(shapes.get(f"{stem}.original0"), shapes[tensor])
        vectors = [shapes.get(f"{stem}.0.{vector}", ()) for vector in ("_u", "_v")]
        return tensor.endswith(".original") and [len(vector) for vector in vectors] == [1, 1]
    weight, _, role = tensor.rpartition("_")
    if not _WEIGHT.search(weight.rpartition(".")[2]):
        return False
    if role == "v":
        return _is_norm_of(shapes.get(f"{weight}_g"), shapes[tensor])
    pruned = shapes.get(f"{weight}_mask") == shapes[tensor]
    return role == "orig" and (pruned or len(shapes.get(f"{weight}_u", ())) == 1)


def _is_norm_of(norm: tuple[int, ...] | None, weight: tuple[int, ...]) -> bool:
    """Whether a tensor has the shape of a weight's norm: over all of its dimensions but one, or over all."""
    if not norm:
        return norm == ()
    fitting = len(norm) == len(weight) and all(side in (1, whole) for side, whole in zip(norm, weight, strict=True))
    return fitting and sum(side > 1 for side in norm) <= 1


def _checked_parameter(layer: Layer, known: bool) -> Layer:
    if min(layer.shape) <= 1:
        return replace(layer, skip="a vector")
    if not known:
        return replace(layer, skip="a table or a matrix: by its name it need not be a weight")
    return replace(layer, kind="parameter")


def _from_file(matrices: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> list[Layer]:
    """The layers of a file of which only names and shapes are known."""
    transposed = any(_looks_transposed(tensor, shapes) for tensor in matrices)
    layers = [_from_name(tensor, shapes, transposed) for tensor in matrices]
    outputs = {
        layer.tensor_shape[1 if layer.kind == "transposed convolution" else 0]
        for layer in layers
        if layer.kind != "embedding"
    } | {layer.shape[0] for layer in layers}
    for index, layer in enumerate(layers):
        channels = layer.tensor_shape[1]
        first = all(earlier.kind != "convolution" for earlier in layers[:index])
        # The shape does not tell that a convolution is grouped, but then its channels are rarely the outputs of another
        # layer.
        if layer.kind == "convolution" and not first and channels not in {*outputs, *_IMAGE_CHANNELS}:
            reason = f"no layer outputs its {channels} channels, so it may be grouped; `factory` would tell"
            layers[index] = replace(layer, skip=layer.skip or reason)
    return layers


def _from_name(tensor: str, shapes: Mapping[str, tuple[int, ...]], conv1d_file: bool) -> Layer:
    shape, name = shapes[tensor], layer_name(tensor)
    layer = Layer(name, name, tensor, _bias(tensor, shapes), "other", shape, _flattened(shape))
    outputs = shapes[layer.bias][0] if layer.bias else None
    if not is_weight(tensor):
        return _parameter_by_name(layer, shapes)
    if len(shape) == 2:
        if _EMBEDDING.search(name.rpartition(".")[2]):
            reason = "an embedding, by its name; `factory` would tell which head is tied to it"
            return replace(layer, kind="embedding", bias=None, shape=(shape[1], shape[0]), skip=reason)
        square_among_transposed = conv1d_file and re.search(r"\bc_(attn|proj|fc)$", name)
        if _looks_transposed(tensor, shapes) or square_among_transposed:
            return replace(layer, kind="transposed linear", shape=(shape[1], shape[0]))
        if outputs not in (None, shape[0]):
            return replace(layer, skip="its bias fits neither dimension")
        return replace(layer, kind="linear")
    if not _looks_like_convolution(shape, outputs):
        return replace(layer, skip="neither a matrix nor, by its shape, a convolution; `factory` would tell")
    layer = replace(layer, kind="convolution")
    if outputs not in (None, shape[0]):
        transposed = replace(layer, kind="transposed convolution", shape=_flattened(shape)[::-1])
        grouped = f"its bias has neither {shape[0]} nor {shape[1]} numbers: a transposed convolution with groups"
        return replace(transposed, skip=None if outputs == shape[1] else grouped)
    if shape[1] == 1 and shape[0] > 1 and math.prod(shape[2:]) > 1:
        return replace(layer, skip="depthwise, or a single input channel")
    return layer


def _looks_like_convolution(shape: tuple[int, ...], outputs: int | None) -> bool:
    """Whether a weight of three or more dimensions is a kernel, and not a stack of matrices, such as those of experts.

    A kernel is small, or a line (`k x 1`), or has one bias per output.
    """
    kernel = shape[2:]
    line = len(kernel) > 1 and sum(side > 1 for side in kernel) <= 1
    return len(shape) <= 5 and (max(kernel) <= _LARGEST_KERNEL or line or outputs in shape[:2])


def _parameter_by_name(layer: Layer, shapes: Mapping[str, tuple[int, ...]]) -> Layer:
    """What a tensor is that is not named as the weight of a layer."""
    last, matrix = layer.tensor.rpartition(".")[2], len(layer.tensor_shape) == 2
    if _is_normalized(layer.tensor, shapes) and len(layer.tensor_shape) <= 5:
        if _is_called_embedding(layer.tensor, layer.tensor_shape):
            return replace(layer, skip="an embedding, by its name")
        return _checked_parameter(layer, known=True)
    if _PARAMETRIZED.search(layer.tensor):
        return replace(layer, skip="its parametrization is unknown; `factory` would tell")
    if _BESIDE_A_WEIGHT.search(last):
        return replace(layer, skip="by its name it belongs to a weight, but is not one")
    known = _WEIGHT_OF_PYTORCH.fullmatch(last) is not None
    if _WEIGHT.search(last) and not known:
        return replace(layer, skip="not a name of PyTorch's own weights; `factory` would tell")
    return _checked_parameter(layer, known and matrix)


def _looks_transposed(tensor: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """GPT-2's Conv1D stores `d_in x d_out`: its bias has the length of the second dimension, not of the first."""
    shape, bias = shapes[tensor], _bias(tensor, shapes)
    return len(shape) == 2 and bias is not None and shape[0] != shapes[bias][0] == shape[1]


def _select(layers: Sequence[Layer], include: Sequence[str], exclude: Sequence[str]) -> tuple[Layer, ...]:
    """Mark the layers that the patterns leave out as skipped."""
    included, excluded = (
        {layer.name for layer in layers for pattern in patterns if _matches(pattern, layer.name)}
        for patterns in (include, exclude)
    )
    for option, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(_matches(pattern, layer.name) for layer in layers):
                raise BadInput(
                    f"`{option}` {pattern} matches no layer",
                    option=option,
                    remedy="list the layers with 'compress inspect MODEL'; '*.mlp.*' is a glob, 're:...' an expression",
                )
    selected = []
    for layer in layers:
        if layer.eligible and include and layer.name not in included:
            layer = replace(layer, skip=NOT_INCLUDED)  # noqa: PLW2901
        if layer.eligible and layer.name in excluded:
            layer = replace(layer, skip=EXCLUDED)  # noqa: PLW2901
        selected.append(layer)
    return tuple(selected)


def matches_any(patterns: Iterable[str], name: str) -> bool:
    """Whether the name of a layer matches one of the patterns: globs, or regular expressions after `re:`."""
    return any(_matches(pattern, name) for pattern in patterns)


def _matches(pattern: str, name: str) -> bool:
    if not pattern.startswith("re:"):
        return fnmatchcase(name, pattern)
    return re.search(pattern[3:], name) is not None
