"""Networks with low-rank layers: made, and checked to be what their times will be reported as."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compressor.forms import DENSE, FORMS, PairForm, stored_bytes
from compressor.latency import DeviceProfile
from compressor.lowrank import put_pair
from compressor.model import open_model
from compressor.network import Layer

# How far the outputs of a layer may be from those of the product of its factors, relative to the largest of them.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


class NotAsStatedError(Exception):
    """A network does not have the layers, the shapes, or the bytes that its times would be reported for."""


@dataclass(frozen=True)
class Placed:
    """What became of one eligible layer.

    Attributes:
        layer: The layer.
        form: The form of its pair, or `dense`.
        rank: The pair's rank; 0 of a dense layer.
    """

    layer: Layer
    form: str
    rank: int

    @property
    def parameters(self) -> int:
        """The numbers that it stores."""
        if self.form == DENSE:
            return self.layer.parameters
        return FORMS[self.form].parameters(self.layer, self.rank)

    def nbytes(self, itemsize: int) -> int:
        """The bytes that it stores."""
        return stored_bytes(self.layer, self.form, self.rank, itemsize=itemsize)


@dataclass(frozen=True)
class Variant:
    """A network with low-rank layers.

    Attributes:
        name: How they were chosen.
        module: The network.
        placed: What became of each eligible layer.
    """

    name: str
    module: nn.Module
    placed: tuple[Placed, ...]


def eligible_layers(model: nn.Module) -> list[Layer]:
    """The layers that the package would factorize."""
    return [layer for layer in open_model(model).layers if layer.eligible]


def rank_within(form: PairForm, layer: Layer, keep: float, *, multiple: int) -> int:
    """The largest rank whose pair stores at most a share of the layer's numbers; 0 where there is none.

    A multiple of `multiple`, unless it is smaller than that.
    """
    ranks = np.arange(1, min(form.sides(layer)) + 1)
    largest = int(np.count_nonzero(form.parameters(layer, ranks) <= keep * layer.parameters))
    return largest - largest % multiple if largest >= multiple else largest


def multiple_of(layer: Layer, profile: DeviceProfile, dtype: torch.dtype) -> int:
    """What the ranks of a layer are multiples of on a device."""
    return profile.rank_multiple(layer.kind, dtype, width=min(layer.shape))


def in_one_form(
    model: nn.Module, layers: Sequence[Layer], forms: Sequence[str], *, keep: float, profile: DeviceProfile
) -> Variant:
    """A copy of a network whose layers are all pairs of one share of their numbers, in the first form that they take.

    Ranks are multiples of the device's, where the layer has so many. The factors are random.
    """
    copied = copy.deepcopy(model)
    dtype = next(model.parameters()).dtype
    placed = []
    for layer in layers:
        form = next((FORMS[name] for name in forms if FORMS[name].takes(layer)), None)
        multiple = multiple_of(layer, profile, dtype)
        rank = 0 if form is None else rank_within(form, layer, keep, multiple=multiple)
        if form is None or rank == 0:
            placed.append(Placed(layer, DENSE, 0))
            continue
        copied = put_pair(copied, layer.module, form.name, rank=rank)
        fill(copied.get_submodule(layer.module))
        placed.append(Placed(layer, form.name, rank))
    return Variant(" / ".join(forms[:1]), copied.eval(), tuple(placed))


def fill(pair: nn.Module) -> None:
    """Give an unfilled pair random factors, and a pivoted one a random order, as trained ones have."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in pair.parameters():
            fan_in = math.prod(parameter.shape[1:]) or 1
            values = torch.randn(parameter.shape, generator=generator) / math.sqrt(fan_in)
            parameter.copy_(values)
        order = getattr(pair, "order", None)
        if isinstance(order, Tensor):
            order.copy_(torch.randperm(order.numel(), generator=generator))


def check(variant: Variant, dense: nn.Module, run: Callable[[nn.Module], Any]) -> None:
    """Require that what is timed is low rank: `NotAsStatedError` where it is not.

    The module in each layer's place is of its form's class and is what a forward calls; its tensors have the shapes of
    its rank; the bytes of the network are those of the plan; and each layer computes what the product of its factors
    does in the dense layer's place.
    """
    itemsize = next(dense.parameters()).dtype.itemsize
    expected = network_bytes(dense)
    for each in variant.placed:
        if each.form != DENSE:
            check_layer(each, variant.module.get_submodule(each.layer.module), dense.get_submodule(each.layer.module))
            expected += each.nbytes(itemsize) - each.layer.parameters * itemsize
    _require(network_bytes(variant.module) == expected, f"{variant.name}: not the bytes of its plan")
    called: set[str] = set()
    names = {each.layer.module for each in variant.placed}
    handles = [
        variant.module.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
        for name in names
    ]
    run(variant.module)
    for handle in handles:
        handle.remove()
    _require(called == names, f"{variant.name}: a forward does not call {sorted(names - called)[:3]}")


def network_bytes(model: nn.Module) -> int:
    """Bytes of the parameters, and of the orders of pivoted pairs."""
    orders = [buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] == "order"]
    return sum(tensor.nbytes for tensor in [*model.parameters(), *orders])


@torch.no_grad()
def check_layer(placed: Placed, pair: nn.Module, dense: nn.Module) -> None:
    """`check` of one layer."""
    form, name = FORMS[placed.form], placed.layer.module
    _require(isinstance(pair, form.classes), f"{name}: {type(pair).__name__} is no {placed.form} pair")
    weight = dense.weight
    assert isinstance(weight, Tensor)
    state = pair.state_dict()
    tensors = {}
    for info in form.infos(placed.layer, placed.rank, weight.dtype):
        tensors[info.name] = state[info.name]
        _require(tuple(state[info.name].shape) == info.shape, f"{name}: the shape of {info.name}")
        _require(state[info.name].dtype == info.dtype, f"{name}: the dtype of {info.name}")
    product = form.product(
        placed.layer, {key: each.double() if each.is_floating_point() else each for key, each in tensors.items()}
    )
    if type(dense).__name__ == "Conv1D":
        product = product.T
    reference = copy.deepcopy(dense).double()
    reference.weight = nn.Parameter(product.reshape(weight.shape))
    bias = state.get(form.bias)
    if bias is not None:
        reference.bias = nn.Parameter(bias.double())
    inputs = an_input(dense)
    expected, found = reference(inputs.double()), pair(inputs).double()
    difference = float((expected - found).abs().max() / expected.abs().max())
    _require(difference <= TOLERANCES[weight.dtype], f"{name}: outputs differ from the product's by {difference:.1e}")


def an_input(dense: nn.Module) -> Tensor:
    """A small random input of a dense layer."""
    weight: Any = dense.weight
    generator = torch.Generator().manual_seed(1)
    if isinstance(dense, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        sides = [
            2 * (size - 1) * dilation + 1 + 4 for size, dilation in zip(dense.kernel_size, dense.dilation, strict=True)
        ]
        shape: tuple[int, ...] = (2, dense.in_channels, *sides)
    else:
        shape = (2, 3, weight.shape[1] if isinstance(dense, nn.Linear) else weight.shape[0])
    return torch.randn(shape, generator=generator).to(weight.device, weight.dtype)


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise NotAsStatedError(what)
