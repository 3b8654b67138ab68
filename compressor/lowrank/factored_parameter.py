"""Factors in the place of a parameter that a module multiplies with in code of its own, such as an LSTM's weights.

The module keeps its code, its fused kernels among it, and finds the product of the factors under the parameter's name:
`W = up down`, by `torch.nn.utils.parametrize`. What is stored becomes less, what is computed does not. In a state dict
the factors are called as everywhere else in the format, `X.down.weight` and `X.up.weight` beside a zero-size `X`.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compressor.network import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, Kind, directly_read_by, layer_name, own_state
from compressor.network.forms import Form


class FactoredWeight(nn.Module):
    """The map from two factors to a weight of `shape`, of rank `rank`, to be registered as its parametrization.

    The factors are shaped as in the file: `down` of `r x c x ..` and `up` of `d_out x r x ..`, of a pivoted pair
    `(d_out - r) x r`, which the rows' `order` completes; a spatial pair's are a vertical and a horizontal kernel.
    """

    last_down: Tensor | None
    last_up: Tensor | None
    last_product: Tensor | None

    def __init__(self, shape: tuple[int, ...], form: Form, rank: int, *, device: torch.device) -> None:
        super().__init__()
        self.shape, self.form, self.rank = shape, form, rank
        if form == "pivoted":
            self.register_buffer("order", torch.zeros(shape[0], dtype=torch.int32, device=device))
        # Of the last forward pass on a CPU without gradients. As buffers they are seen by who counts memory.
        for name in ("last_down", "last_up", "last_product"):
            self.register_buffer(name, None, persistent=False)

    def forward(self, down: Tensor, up: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or down.device.type != "cpu":
            self._forget()
            return self._product(down, up)
        # Modules ask several times in a pass. To compare the factors costs a small part of multiplying them, and sees
        # changes that PyTorch's own version counters do not.
        if self.last_product is None or not (_same(down, self.last_down) and _same(up, self.last_up)):
            self.last_down, self.last_up = down.detach().clone(), up.detach().clone()
            self.last_product = self._product(down, up)
        return self.last_product

    def __prepare_scriptable__(self) -> FactoredWeight:
        raise RuntimeError(
            "TorchScript compiles no parametrized modules: give it the whole model, which it compiles with the product"
        )

    def _forget(self) -> None:
        self.last_down = self.last_up = self.last_product = None

    def _apply(self, fn: Any, recurse: bool = True) -> FactoredWeight:
        self._forget()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Unfilled factors for a weight: their values are loaded, never computed here."""
        d_out, *rest = self.shape
        pointwise = [1 for _ in rest[1:]]
        down, up = [self.rank, *rest], [d_out, self.rank, *pointwise]
        if self.form == "pivoted":
            up[0] -= self.rank
        if self.form == "spatial":
            down, up = [self.rank, rest[0], rest[1], 1], [d_out, self.rank, 1, rest[2]]
        return weight.new_empty(down), weight.new_empty(up)

    def _product(self, down: Tensor, up: Tensor) -> Tensor:
        device = down.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            # Autocast casts a weight where it is used. The product keeps its own dtype, as the weight would.
            with torch.autocast(device, enabled=False):
                return self._multiplied(down, up)
        return self._multiplied(down, up)

    def _multiplied(self, down: Tensor, up: Tensor) -> Tensor:
        if self.form == "spatial":
            return torch.einsum("orj,rci->ocij", up[:, :, 0], down[..., 0])
        if self.form == "pivoted":
            assert isinstance(self.order, Tensor)
            return torch.cat([down, up @ down]).index_select(0, self.order)
        return (up.flatten(1) @ down.flatten(1)).reshape(self.shape)

    def extra_repr(self) -> str:
        return f"shape={self.shape}, rank={self.rank}"


def _same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.dtype == b.dtype and torch.equal(a, b)


def put_factors(
    module: nn.Module, parameter: str, form: Form, *, rank: int, like: Tensor, shape: tuple[int, ...]
) -> None:
    """Put unfilled factors in the place of a parameter, in the dtype, on the device and as trainable as `like`.

    The module itself is changed; the parameter need not have values.
    """
    device = like.device
    # Only its shape is needed, and it may be large.
    module._parameters[parameter] = nn.Parameter(like.new_empty(shape, device="meta"), like.requires_grad)
    parametrize.register_parametrization(
        module, parameter, FactoredWeight(shape, form, rank, device=device), unsafe=True
    )
    factors = module.parametrizations[parameter]  # type: ignore[index]
    assert isinstance(factors, nn.Module)
    for name, tensor in factors.named_parameters(recurse=False):
        setattr(factors, name, nn.Parameter(torch.zeros_like(tensor, device=device), like.requires_grad))
    if len(factored_parameters(module)) == 1:
        module.register_state_dict_post_hook(_as_stored)  # type: ignore[no-untyped-call]
        module.register_load_state_dict_pre_hook(_as_registered)  # type: ignore[no-untyped-call]
    _tell_recurrent(module)


def fill_factors(module: nn.Module, parameter: str, *, down: Tensor, up: Tensor, order: Tensor | None) -> None:
    """Give the factors of a parameter their values: the tensors themselves, not copies of them."""
    lists: Any = module.parametrizations
    factors = lists[parameter]
    for name, tensor in (("original0", down), ("original1", up)):
        old = getattr(factors, name)
        setattr(factors, name, nn.Parameter(tensor.to(old.device), old.requires_grad))
    if order is not None:
        factors[0].order = order.to(factors[0].order.device)
    _tell_recurrent(module)


def _tell_recurrent(module: nn.Module) -> None:
    if isinstance(module, nn.RNNBase):
        with torch.no_grad():
            module._init_flat_weights()  # it keeps a list of its weights


def to_be_factored(module: nn.Module) -> nn.Module:
    """A copy of a module with the same tensors and the same modules inside; itself if it has factors already."""
    if factored_parameters(module):
        return module
    copied = module.__new__(type(module))
    containers = (dict, list, set)
    copied.__dict__.update(
        {key: copy.copy(value) if isinstance(value, containers) else value for key, value in module.__dict__.items()}
    )
    return copied


def factored_parameters(module: nn.Module) -> dict[str, FactoredWeight]:
    """The parameters of a module, not of those inside it, that are factored, by name."""
    if not parametrize.is_parametrized(module):
        return {}
    lists: Any = module.parametrizations
    return {name: each[0] for name, each in lists.items() if isinstance(each[0], FactoredWeight)}


def _names(module: nn.Module, prefix: str) -> Iterator[tuple[str, dict[str, str]]]:
    """For each factored parameter its name in a state dict, and the names there of its tensors to those in PyTorch."""
    for name, factored in factored_parameters(module).items():
        base, inner = layer_name(prefix + name), f"{prefix}parametrizations.{name}."
        stem = f"{base}." if base else ""
        names = {f"{stem}down.weight": f"{inner}original0", f"{stem}up.weight": f"{inner}original1"}
        if factored.form == "pivoted":
            names[f"{stem}order"] = f"{inner}0.order"
        yield prefix + name, names


def _as_stored(module: nn.Module, state: OrderedDict[str, Tensor], prefix: str, _: Mapping[str, Any]) -> None:
    for marker, names in _names(module, prefix):
        for stored, registered in names.items():
            if registered in state:
                state[stored] = state.pop(registered)
        down = state.get(next(iter(names)))
        if down is not None:
            state[marker] = down.new_empty(0)


def _as_registered(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for marker, names in _names(module, prefix):
        if marker in state and state[marker].numel() == 0:
            del state[marker]
        for stored, registered in names.items():
            if stored in state:
                state[registered] = state.pop(stored)


def can_be_pair(root: nn.Module, name: str, parameter: str, *, kind: Kind) -> bool:
    """Whether a layer of a model is of this kind, and calling a pair in its place is all that uses its weight."""
    modules: dict[str, nn.Module] = dict(root.named_modules(remove_duplicate=False))
    layer, parent = modules[name], modules.get(name.rpartition(".")[0])
    if parameter != "weight" or directly_read_by(layer, parent) is not None or own_state(layer) is not None:
        return False
    classes: dict[Kind, tuple[type[nn.Module], ...]] = {
        "linear": (nn.Linear,),
        "convolution": CONVOLUTIONS,
        "transposed convolution": TRANSPOSED_CONVOLUTIONS,
        "embedding": (nn.Embedding,),
    }
    if kind == "transposed linear":
        return type(layer).__name__ == "Conv1D"
    return type(layer) in classes.get(kind, ()) and getattr(layer, "groups", 1) == 1
