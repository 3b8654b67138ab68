"""Factors in the place of a parameter that a module multiplies with in code of its own, such as an LSTM's weights.

The module keeps its code, its fused kernels among it, and finds the product of the factors under the parameter's name:
by `torch.nn.utils.parametrize`. What is stored becomes less, what is computed does not. In a state dict
the factors are called as everywhere else in the format, `X.down.weight` and `X.up.weight` beside a zero-size `X`.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compressor.forms import FORMS, DenseWeight, QuantizedDense, QuantizedPair, StoredWeight
from compressor.io import TensorInfo
from compressor.network import (
    CONVOLUTIONS,
    TRANSPOSED_CONVOLUTIONS,
    Kind,
    directly_read_by,
    layer_name,
    only_scales,
    own_state,
)

# The products of the forward pass that is under way in this thread, with gradients and without.
_products: ContextVar[dict[tuple[FactoredWeight, bool], Tensor] | None] = ContextVar("products", default=None)


class FactoredWeight(nn.Module):
    """The map from the factors of a form to the weight that they stand for, to be registered as its parametrization.

    The factors are shaped as in the file. Those that are not of floating-point numbers are buffers, and so are all of a
    quantized form: nothing of it is trained, and its scales keep their dtype.
    """

    weight: Tensor
    last_product: Tensor | None

    def __init__(self, weight: DenseWeight, form: str, rank: int, *, like: Tensor) -> None:
        super().__init__()
        self.stands_for = StoredWeight("parameter", weight.tensor_shape)
        self.form, self.rank = form, rank
        found, infos = FORMS[form], self._infos(like.dtype)
        self.is_quantized = isinstance(found, QuantizedDense | QuantizedPair)
        # Shapes that need not be fetched from a device.
        self.shapes: dict[str, Tensor] = {}
        if isinstance(found, QuantizedDense | QuantizedPair):
            parts = found.parts(self.stands_for, rank, like.dtype)
            self.shapes = {f"{part.name}_shape": torch.tensor(part.shape) for part in parts}
            self.shapes = {name: shape for name, shape in self.shapes.items() if name in infos}
        self.trained = [name for name in infos if infos[name].dtype.is_floating_point and not self.is_quantized]
        self.fixed = [name for name in infos if name not in self.trained]
        for name in self.fixed:
            info = infos[name]
            unfilled = self.shapes.get(name, torch.zeros(info.shape, dtype=info.dtype)).to(like.device)
            self.register_buffer(_attribute(name), unfilled)
        # Its dtype is that of the product.
        self.register_buffer("weight", like.new_empty(0), persistent=False)
        # Of the last forward pass on a CPU without gradients. As buffers they are seen by who counts memory.
        for name in (*map(_attribute, self.trained), "product"):
            self.register_buffer(f"last_{name}", None, persistent=False)

    def _infos(self, dtype: torch.dtype) -> dict[str, TensorInfo]:
        return {info.name: info for info in FORMS[self.form].infos(self.stands_for, self.rank, dtype)}

    def forward(self, *factors: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._product(*factors)
        if not self.is_quantized and not torch.is_grad_enabled() and self.weight.device.type == "cpu":
            return self._last_product(*factors)
        self._forget()
        # Modules ask several times in a pass. Whether factors are what they were in the last pass cannot be told: to
        # compare them would make the device wait, and PyTorch's counters of changes miss fused optimizers and `data`.
        found, key = _products.get(), (self, torch.is_grad_enabled())
        if found is None:
            return self._product(*factors)
        if key not in found:
            found[key] = self._product(*factors)
        return found[key]

    def _last_product(self, *factors: Tensor) -> Tensor:
        """The product, which is kept: on a CPU to compare the factors costs a small part of multiplying them."""
        last: list[Tensor | None] = [getattr(self, f"last_{_attribute(name)}") for name in self.trained]
        product: Tensor | None = self.last_product
        if product is None or not all(map(_same, factors, last)):
            for name, factor in zip(self.trained, factors, strict=True):
                setattr(self, f"last_{_attribute(name)}", factor.detach().clone())
            self.last_product = product = self._product(*factors)
        return product

    def __prepare_scriptable__(self) -> FactoredWeight:
        raise RuntimeError(
            "TorchScript compiles no parametrized modules: give it the whole model, which it compiles with the product"
        )

    def _forget(self) -> None:
        for name in (*map(_attribute, self.trained), "product"):
            setattr(self, f"last_{name}", None)

    def _apply(self, fn: Any, recurse: bool = True) -> FactoredWeight:
        self._forget()
        scales = {name: getattr(self, name) for name in map(_attribute, self.fixed) if name.endswith("scale")}
        for name, scale in scales.items():  # moved as integers, not cast: rounded twice they would be other numbers
            setattr(self, name, scale.view(torch.int16))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, scale in scales.items():
            setattr(self, name, getattr(self, name).view(scale.dtype))
        return self

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Unfilled factors for a weight; their values are loaded later."""
        return tuple(weight.new_empty(self._infos(weight.dtype)[name].shape) for name in self.trained)

    def _product(self, *factors: Tensor) -> Tensor:
        device = self.weight.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            # Autocast casts a weight where it is used. The product keeps its own dtype, as the weight would.
            with torch.autocast(device, enabled=False):
                return self._multiplied(*factors)
        return self._multiplied(*factors)

    def _multiplied(self, *factors: Tensor) -> Tensor:
        tensors: dict[str, Tensor] = dict(zip(self.trained, factors, strict=True))
        tensors |= {name: getattr(self, _attribute(name)) for name in self.fixed} | self.shapes
        if self.is_quantized:
            exact = self.weight.dtype if self.weight.dtype.itemsize >= 4 else torch.float32
            tensors = {name: each.to(exact) if each.is_floating_point() else each for name, each in tensors.items()}
        product = FORMS[self.form].product(self.stands_for, tensors).reshape(self.stands_for.tensor_shape)
        return product.to(self.weight.dtype) if self.is_quantized else product

    def extra_repr(self) -> str:
        return f"shape={self.stands_for.tensor_shape}, rank={self.rank}"


def _attribute(name: str) -> str:
    """What a tensor of a form is called in a module: `down` for `down.weight`, `down_packed` for the integers of it."""
    return name.replace(".weight", "").replace(".", "_")


def _same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.dtype == b.dtype and torch.equal(a, b)


def put_factors(module: nn.Module, parameter: str, form: str, *, rank: int, like: Tensor, weight: DenseWeight) -> None:
    """Put unfilled factors in the place of a parameter, in the dtype, on the device and as trainable as `like`.

    The module itself is changed; the parameter need not have values.
    """
    # Only its shape is needed, and it may be large.
    empty = like.new_empty(weight.tensor_shape, device="meta")
    module._parameters[parameter] = nn.Parameter(empty, like.requires_grad)
    factored = FactoredWeight(weight, form, rank, like=like.detach())
    parametrize.register_parametrization(module, parameter, factored, unsafe=True)
    factors = module.parametrizations[parameter]  # type: ignore[index]
    assert isinstance(factors, nn.Module)
    for name, tensor in factors.named_parameters(recurse=False):
        setattr(factors, name, nn.Parameter(torch.zeros_like(tensor, device=like.device), like.requires_grad))
    if len(factored_parameters(module)) == 1:
        module.register_state_dict_post_hook(_as_stored)  # type: ignore[no-untyped-call]
        module.register_load_state_dict_pre_hook(_as_registered)  # type: ignore[no-untyped-call]
        _share_products(type(module))
    _tell_recurrent(module)


def _share_products(parametrized: type[nn.Module]) -> None:
    """Let each product be computed once in a forward pass of a class that PyTorch made for one module.

    A hook would do that too, but attention takes a slower path where it has hooks.
    """
    inherited = parametrized.forward

    @functools.wraps(inherited)
    def forward(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        if torch.compiler.is_compiling() or _products.get() is not None:
            return inherited(self, *arguments, **keywords)
        token = _products.set({})
        try:
            return inherited(self, *arguments, **keywords)
        finally:
            _products.reset(token)

    setattr(parametrized, "forward", forward)  # noqa: B010 - the type says that a method is not assigned


def fill_factors(module: nn.Module, parameter: str, tensors: Mapping[str, Tensor]) -> None:
    """Assign the factors of a parameter, by their names below the layer's; tensors are not copied."""
    lists: Any = module.parametrizations
    factors = lists[parameter]
    factored: FactoredWeight = factors[0]
    for number, name in enumerate(factored.trained):
        old = getattr(factors, f"original{number}")
        setattr(factors, f"original{number}", nn.Parameter(tensors[name].to(old.device), old.requires_grad))
    for name in factored.fixed:
        setattr(factored, _attribute(name), tensors[name].to(getattr(factored, _attribute(name)).device))
    _tell_recurrent(module)


def _tell_recurrent(module: nn.Module) -> None:
    if isinstance(module, nn.RNNBase):
        with torch.no_grad():
            module._init_flat_weights()  # it keeps a list of its weights


def to_be_factored(module: nn.Module) -> nn.Module:
    """A copy of a module that shares its tensors and submodules; the module itself if it already has factors."""
    if factored_parameters(module):
        return module
    copied = module.__new__(type(module))
    containers = (dict, list, set)
    copied.__dict__.update(
        {key: copy.copy(value) if isinstance(value, containers) else value for key, value in module.__dict__.items()}
    )
    return copied


def factored_parameters(module: nn.Module) -> dict[str, FactoredWeight]:
    """The factored parameters of a module itself, not of its submodules, by name."""
    if not parametrize.is_parametrized(module):
        return {}
    lists: Any = module.parametrizations
    return {name: each[0] for name, each in lists.items() if isinstance(each[0], FactoredWeight)}


def _names(module: nn.Module, prefix: str) -> Iterator[tuple[str, dict[str, str], FactoredWeight]]:
    """For each factored parameter its name in a state dict, the names there of its tensors to those in PyTorch, and
    its map."""
    for name, factored in factored_parameters(module).items():
        base, inner = layer_name(prefix + name), f"{prefix}parametrizations.{name}."
        stem = f"{base}." if base else ""
        names = {f"{stem}{each}": f"{inner}original{number}" for number, each in enumerate(factored.trained)}
        names |= {f"{stem}{each}": f"{inner}0.{_attribute(each)}" for each in factored.fixed}
        yield prefix + name, names, factored


def _as_stored(module: nn.Module, state: OrderedDict[str, Tensor], prefix: str, _: Mapping[str, Any]) -> None:
    for marker, names, factored in _names(module, prefix):
        for stored, registered in names.items():
            if registered in state:
                state[stored] = state.pop(registered)
        shape = FORMS[factored.form].marker(factored.stands_for)
        if next(iter(names)) in state and shape is not None:
            state[marker] = factored.weight.new_empty(shape)


def _as_registered(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for marker, names, _factored in _names(module, prefix):
        if marker in state and state[marker].numel() == 0:
            del state[marker]
        for stored, registered in names.items():
            if stored in state:
                state[registered] = state.pop(stored)


def can_be_pair(root: nn.Module, name: str, parameter: str, *, kind: Kind) -> bool:
    """Whether a layer is of this kind, and its weight is used only by calling the layer."""
    modules: dict[str, nn.Module] = dict(root.named_modules(remove_duplicate=False))
    layer, parent = modules[name], modules.get(name.rpartition(".")[0])
    if parameter != "weight" or directly_read_by(layer, parent) is not None or own_state(layer) is not None:
        return False
    classes: dict[Kind, tuple[type[nn.Module], ...]] = {
        "linear": (nn.Linear,),
        "convolution": CONVOLUTIONS,
        "grouped convolution": CONVOLUTIONS,
        "transposed convolution": TRANSPOSED_CONVOLUTIONS,
        "embedding": (nn.Embedding,),
    }
    if kind == "transposed linear":
        return type(layer).__name__ == "Conv1D"
    grouped = getattr(layer, "groups", 1) > 1
    if kind == "embedding" and isinstance(layer, nn.Embedding) and type(layer) is not nn.Embedding:
        return only_scales(layer)
    return type(layer) in classes.get(kind, ()) and grouped == (kind == "grouped convolution")
