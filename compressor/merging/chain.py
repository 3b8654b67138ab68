"""The order of a feed-forward network's layers, and that nothing between them mixes one channel with another.

Only such a network can be put side by side with others: what a layer puts out for one must reach no layer of another.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from torch import fx, nn

from compressor.errors import BadInput
from compressor.lowrank import join
from compressor.network import is_weight, layer_name

# What runs before the first layer works on the inputs, which are shared; what runs after it on channels of each part.
Where = Literal["inputs", "channels"]

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMALIZATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_LINEAR_MODULES = (
    nn.Identity,
    nn.Flatten,
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
_NONLINEAR_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
    *(nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
# Functions and tensor methods that treat every channel alike, by name: torch has most of them in three places.
_LINEAR_NAMES = {"dropout", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "contiguous"}
_LINEAR_NAMES |= {"add", "iadd", "add_"}
_NONLINEAR_NAMES = {"relu", "relu_", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "softplus"}
_NONLINEAR_NAMES |= {"tanh", "sigmoid", "hardtanh", "hardswish", "hardsigmoid"}
_NONLINEAR_NAMES |= {"max_pool1d", "max_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d"}

# How many layers are tried as the next one before the order of a file without code counts as unknown.
_LARGEST_SEARCH = 10_000


@dataclass(frozen=True)
class Chain:
    """The layers of a feed-forward network in the order in which they run, the last one being its head.

    `first` are the layers that read the inputs of the network, `batch_norms` where its batch normalizations are;
    `linear` says that nothing but linear maps is in it, None where that is not known.
    """

    layers: tuple[str, ...]
    first: frozenset[str]
    batch_norms: Mapping[str, Where]
    linear: bool | None

    @property
    def head(self) -> str:
        return self.layers[-1]


def traced_chain(module: nn.Module) -> Chain:
    """The chain of a module, from the graph of its `forward` (torch.fx).

    Between the layers there may be elementwise activations, pooling, dropout, batch normalization, flattening from
    the channels on, and sums of such streams.

    Raises:
        BadInput: the graph cannot be traced, or something in it mixes channels; the message says what.
    """
    try:
        graph = fx.symbolic_trace(module).graph
    except Exception as error:  # the user's own code, traced: it may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _refused(f"its forward cannot be traced ({reason})") from error
    return _Tracing(module, graph).chain()


def chain_of_shapes(shapes: Mapping[str, tuple[int, ...]], source: Path | None) -> Chain:
    """The chain of a file that holds nothing but linear layers, from how their shapes and names follow each other.

    `shapes` are those of the dense tensors, by name. The activations are taken to be elementwise, as they are in any
    plain chain.

    Raises:
        BadInput: there is something else in the file, or its layers can be put in more than one order.
    """
    weights = {layer_name(name): shape for name, shape in shapes.items() if is_weight(name) and len(shape) == 2}
    known = {join(name, tensor) for name in weights for tensor in ("weight", "bias")}
    if strange := [name for name in shapes if name not in known]:
        raise _unknown_order(f"{strange[0]} belongs to no linear layer", source)
    orders = list(_orders(weights))
    if len(orders) > 1:
        numbered = sorted(weights, key=_natural)
        orders = [order for order in orders if order == numbered and len({_pattern(name) for name in order}) == 1]
    if len(orders) != 1:
        raise _unknown_order("the order of its layers does not follow from their shapes and names", source)
    return Chain(tuple(orders[0]), frozenset(orders[0][:1]), {}, linear=None)


def _orders(weights: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """The orders in which every layer takes what the one before puts out; two at most.

    Layers of one shape whose names differ in their numbers alone come in the order of the numbers.
    """
    names = sorted(weights, key=_natural)
    tries = 0

    def extended(order: list[str]) -> Iterator[list[str]]:
        nonlocal tries
        if len(order) == len(names):
            yield order
            return
        passed_over = set()
        for name in names:
            kind = (weights[name], _pattern(name))
            if name in order or kind in passed_over:
                continue
            passed_over.add(kind)
            tries += 1
            if tries > _LARGEST_SEARCH:
                return
            if not order or weights[order[-1]][0] == weights[name][1]:
                yield from extended([*order, name])

    return islice(extended([]), 2)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def _pattern(name: str) -> str:
    return re.sub(r"[0-9]+", "#", name)


class _Tracing:
    """The walk along a graph, with where in the network each of its values is."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.modules = dict(module.named_modules())
        self.graph = graph
        self.where: dict[fx.Node, Where | Literal["number"]] = {}
        self.layers: list[str] = []
        self.first: set[str] = set()
        self.batch_norms: dict[str, Where] = {}
        self.linear = True

    def chain(self) -> Chain:
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self.where[node] = "inputs"
            elif node.op == "output":
                head = self._head(node)
            else:
                self.where[node] = self._visited(node)
        # The graph is in the order of execution; the head is what its output comes from.
        if self.layers[-1] != head:
            raise _refused(f"its output is that of {head}, and {self.layers[-1]} runs later")
        return Chain(tuple(self.layers), frozenset(self.first), self.batch_norms, self.linear)

    def _visited(self, node: fx.Node) -> Where | Literal["number"]:
        origins = {self.where[each] for each in node.all_input_nodes} - {"number"}
        if node.op == "get_attr":
            raise _refused(f"it uses {node.target} outside a layer")
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, LAYERS):
            return self._layer(node, module, origins)
        if isinstance(module, NORMALIZATIONS):
            self.batch_norms[str(node.target)] = "inputs" if origins == {"inputs"} else "channels"
        elif module is not None and next(module.parameters(), None) is not None:
            raise _refused(f"{node.target} ({type(module).__name__}) is no layer that can be put side by side")
        if not origins or self._reads_size(node):
            return "number"
        if origins == {"inputs"}:
            return "inputs"
        if len(origins) > 1:
            raise _refused(f"{_described(node, module)} mixes the inputs with what a layer puts out")
        if not self._keeps_channels_apart(node, module):
            raise _refused(f"{_described(node, module)} may mix channels")
        return "channels"

    def _layer(self, node: fx.Node, module: nn.Module, origins: set[Any]) -> Where:
        name = str(node.target)
        if getattr(module, "groups", 1) != 1:
            raise _refused(f"{name} is a grouped convolution")
        if name in self.layers:
            raise _refused(f"{name} is called more than once")
        if any(module.weight is self.modules[layer].weight for layer in self.layers):
            raise _refused(f"{name} shares its weight with another layer")
        self.layers.append(name)
        if origins == {"inputs"}:
            self.first.add(name)
        return "channels"

    def _reads_size(self, node: fx.Node) -> bool:
        if node.op == "call_method" and node.target in {"size", "dim"}:
            return True
        return node.op == "call_function" and node.target is getattr and node.args[1] == "shape"

    def _keeps_channels_apart(self, node: fx.Node, module: nn.Module | None) -> bool:
        if isinstance(module, nn.Flatten):
            return bool(module.start_dim == 1)
        if module is not None:
            self.linear &= not isinstance(module, _NONLINEAR_MODULES)
            return isinstance(module, (*_LINEAR_MODULES, *_NONLINEAR_MODULES, *NORMALIZATIONS))
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if name in {"view", "reshape"}:
            return len(node.args) == 3 and isinstance(node.args[1], fx.Node) and bool(node.args[2] == -1)
        if name == "flatten":
            return bool((node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim")) == 1)
        if name == "mean":
            axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            axes = axes if isinstance(axes, list | tuple) else (axes,)
            return all(isinstance(axis, int) and axis >= 2 for axis in axes)
        self.linear &= name not in _NONLINEAR_NAMES
        return _is_torch(node) and name in _LINEAR_NAMES | _NONLINEAR_NAMES

    def _head(self, output: fx.Node) -> str:
        node = output.args[0]
        while isinstance(node, fx.Node) and node.op == "call_module":
            module = self.modules[str(node.target)]
            if isinstance(module, LAYERS):
                if len(node.users) > 1:
                    raise _refused(f"the output of {node.target} is used inside the network too")
                return str(node.target)
            if not isinstance(module, nn.Identity | nn.Dropout):
                break
            node = node.args[0]
        raise _refused("its output is not simply that of its last layer")


def _is_torch(node: fx.Node) -> bool:
    """Whether a node is a tensor's method, a sum, or a function of torch rather than one of the user's of that name."""
    if node.op == "call_method" or node.target in {operator.add, operator.iadd}:
        return True
    return str(getattr(node.target, "__module__", "")).partition(".")[0] == "torch"


def _described(node: fx.Node, module: nn.Module | None) -> str:
    if module is not None:
        return f"{node.target} ({type(module).__name__})"
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _refused(what: str) -> BadInput:
    return BadInput(
        f"the model that `factory` builds cannot be concatenated: {what}",
        option="factory",
        remedy="merge with `mode='sum'`, or build it from linear layers, convolutions and elementwise activations",
    )


def _unknown_order(what: str, source: Path | None) -> BadInput:
    return BadInput(
        f"the networks cannot be concatenated: {what}",
        where=source,
        remedy="pass `factory` with the function that builds it, or merge with `mode='sum'`",
    )
