"""What the modules of all forms share. An exported folder brings its source along: it imports torch and nothing else.

Every low-rank layer registers a persistent zero-size buffer `weight`. A loader that expects the dense layer then meets
a shape mismatch and stops, instead of filling the layer with random numbers; and code that asks for `weight.dtype` or
`weight.device` goes on working. They take their input under the name that it has in PyTorch's own.
"""

from typing import Any

import torch
from torch import Tensor, nn

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
TransposedConvolution = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

# The shape of the zero-size `weight`, by the kind of the dense layer. Most store the matrix that they apply; of those
# that store its transpose it has to be known, because the factors of a square matrix look the same.
MARKERS: dict[str, tuple[int, ...]] = {
    "linear": (0,),
    "convolution": (0,),
    "grouped convolution": (0,),
    "parameter": (0,),
    "transposed linear": (0, 1),
    "transposed convolution": (0, 1),
    "embedding": (0, 0),
}


def unfilled(kind: type[nn.Module], *arguments: Any, device: Any, **keywords: Any) -> nn.Module:
    """A module whose parameters have memory but no values yet."""
    return kind(*arguments, device="meta", **keywords).to_empty(device=device)


# What the layers inside a pair compute, if their padding is of zeros.
_FUNCTIONS: dict[type[nn.Module], Any] = {
    nn.Linear: nn.functional.linear,
    nn.Conv1d: nn.functional.conv1d,
    nn.Conv2d: nn.functional.conv2d,
    nn.Conv3d: nn.functional.conv3d,
}


def applied(layer: nn.Module, input: Tensor) -> Tensor:
    """What a layer gives, without the cost of calling it where nothing but PyTorch's own code would run."""
    if torch.compiler.is_compiling() or is_observed(layer, input):
        return layer(input)  # type: ignore[no-any-return]
    own = layer.__dict__
    parameters, kind = own["_parameters"], type(layer)
    function, weight, bias = _FUNCTIONS[kind], parameters["weight"], parameters["bias"]
    if kind is nn.Linear:
        return function(input, weight, bias)  # type: ignore[no-any-return]
    geometry = own["stride"], own["padding"], own["dilation"], own["groups"]
    return function(input, weight, bias, *geometry)  # type: ignore[no-any-return]


class LayerPair(nn.Module):
    """Two layers, `down` and after it `up`, in the place of a dense one."""

    weight: Tensor

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            output: Tensor = self.up(self.down(input))  # type: ignore[operator]
            return output
        else:
            parts = self._modules  # looked up in half the time of `self.down`
            return applied(parts["up"], applied(parts["down"], input))  # type: ignore[arg-type]


def is_observed(layer: nn.Module, input: Tensor) -> bool:
    """Whether a call of a layer may run more than PyTorch's function of its weight and bias.

    That is what adapters, hooks, parametrizations, offloading, and tracers of modules rely on. It is asked in every
    pass, so it looks into dictionaries: attributes of a module take a third of a microsecond each.
    """
    own = layer.__dict__
    parameters = own["_parameters"]
    return (
        type(layer) not in _FUNCTIONS
        or type(input) is not Tensor
        or "forward" in own
        or own.get("_compiled_call_impl") is not None
        or bool(own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"])
        or bool(own["_backward_pre_hooks"] or nn.modules.module._has_any_global_hook())  # type: ignore[no-untyped-call]
        or parameters.get("weight") is None
        or "bias" not in parameters
        or own.get("padding_mode", "zeros") != "zeros"
    )


def in_order(input: Tensor, down: nn.Module, up: nn.Module, *, order: Tensor) -> Tensor:
    """The outputs of `down` and then those of `up`, which takes them, as columns put in an order of int32."""
    # Writing into one tensor saves an accelerator a kernel. A CPU is slower at few rows, and faster at many.
    eager = type(input) is Tensor and not torch.compiler.is_compiling() and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    many = eager and (not input.is_cpu or input.numel() >= 1024 * input.shape[-1])
    if many and may_be_written(input, down, up):
        columns = written_beside(input, down.weight, up.weight)  # type: ignore[arg-type]
    else:
        rows = applied(down, input)
        columns = torch.cat([rows, applied(up, rows)], dim=-1)
    return columns_in_order(columns, order) if eager else columns.index_select(-1, order)


def columns_in_order(columns: Tensor, order: Tensor) -> Tensor:
    """Columns put in an order, at once: by the operators that have vector instructions on a CPU.

    `index_select` has them for float32 and two dimensions alone, where it is 5 to 20 times as fast as else.
    """
    shape = columns.shape
    flat = columns.flatten(0, -2) if len(shape) > 2 else columns
    few = columns.numel() < 4096
    if columns.dtype == torch.float32 or few or not columns.is_cpu or torch.is_grad_enabled():
        ordered = flat.index_select(-1, order)
    else:
        ordered = flat.gather(-1, order.long().expand_as(flat))
    return ordered if len(shape) <= 2 else ordered.view(shape)


def may_be_written(input: Tensor, down: nn.Module, up: nn.Module) -> bool:
    """Whether the outputs of two linear layers without bias can be written into a given tensor instead."""
    device = input.device.type
    return (
        not torch.is_grad_enabled()
        and input.numel() > 0
        and not is_observed(down, input)
        and not is_observed(up, input)
        and type(down.weight) is type(up.weight) is nn.Parameter
        and not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device))
        # Neither `vmap` nor derivatives in forward mode have a rule for it.
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )


def written_beside(input: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """The products with two weights, the second of the first's, as columns of one tensor."""
    rank = len(down)
    columns = input.new_empty(*input.shape[:-1], rank + len(up))
    flat = columns.view(-1, rank + len(up))
    torch.mm(input.reshape(len(flat), -1), down.t(), out=flat[:, :rank])
    torch.mm(flat[:, :rank], up.t(), out=flat[:, rank:])
    return columns


def lookup_scale(dense: nn.Embedding) -> tuple[float, bool]:
    """The factor of an embedding that scales the rows that it looks up, and whether it is rounded to their dtype.

    It is 1 of others. Classes that scale have it as `embed_scale`, and round it where that is a buffer. This is not
    `network.embedding_scale`, because exported folders have this code where the package is not.
    """
    value = getattr(dense, "scalar_embed_scale", getattr(dense, "embed_scale", 1.0))
    return float(value), "embed_scale" in dense._buffers


def scaled(vectors: Tensor, scale: float, rounds: bool) -> Tensor:
    """Vectors that were looked up, times the scale of their embedding."""
    if scale == 1.0:
        return vectors
    return vectors * vectors.new_full((1,), scale) if rounds else vectors * scale


def is_lookup(dense: nn.Module) -> bool:
    """Whether a module looks rows of a table up, may scale them, and does nothing else that is known."""
    if not isinstance(dense, nn.Embedding) or dense.max_norm is not None:
        return False
    return type(dense) is nn.Embedding or hasattr(dense, "embed_scale")


def linear_sides(dense: nn.Module) -> tuple[str, int, int]:
    """The kind of a linear layer or a transformers `Conv1D`, and its numbers of inputs and outputs; else ValueError."""
    if isinstance(dense, nn.Linear):
        return "linear", dense.in_features, dense.out_features
    if type(dense).__name__ == "Conv1D":
        weight: Any = dense.weight
        return "transposed linear", weight.shape[0], weight.shape[1]
    raise ValueError(f"{type(dense).__name__} is not a layer that can be factorized")


def kind_name(dense: nn.Module) -> str:
    """The kind of layer that a module is, as in `MARKERS`; ValueError for one that has no pair."""
    if isinstance(dense, nn.Embedding):
        return "embedding"
    if isinstance(dense, Convolution):
        return "convolution" if dense.groups == 1 else "grouped convolution"
    if isinstance(dense, TransposedConvolution):
        return "transposed convolution"
    return linear_sides(dense)[0]


def copy_geometry(dense: Convolution | TransposedConvolution, pair: nn.Module) -> None:
    """Say of a pair what the dense convolution says of itself: models compute lengths of their outputs from it."""
    for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
        setattr(pair, name, getattr(dense, name))
