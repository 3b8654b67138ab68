"""The order of a network's layers, and what keeps one from being put beside another."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from compressor.errors import BadInput
from compressor.merging.chain import chain_of_shapes, traced_chain


class Convolutional(nn.Module):
    """Written the way people write them: functions, methods, a skip connection, batch normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.drop = nn.Dropout()
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stem(2 * x - 1)))
        x = (x + self.body(x)).tanh()
        x = functional.max_pool2d(x, 2)
        x = self.drop(x.view(x.size(0), -1))
        return self.head(x)  # type: ignore[no-any-return]


def test_layers_come_in_the_order_in_which_they_run() -> None:
    chain = traced_chain(Convolutional())
    assert chain.layers == ("stem", "body", "head")
    assert chain.first == {"stem"}
    assert chain.batch_norms == {"norm": "channels"}
    assert chain.linear is False


def test_normalized_inputs_are_shared() -> None:
    chain = traced_chain(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2)))
    assert chain.batch_norms == {"1": "inputs"}
    assert chain.layers == ("2",)


@pytest.mark.parametrize(
    ("between", "linear"), [(nn.Identity(), True), (nn.Dropout(), True), (nn.ReLU(), False), (nn.GELU(), False)]
)
def test_what_lies_between_the_layers_says_whether_the_network_is_linear(between: nn.Module, linear: bool) -> None:
    assert traced_chain(nn.Sequential(nn.Linear(3, 3), between, nn.Linear(3, 3))).linear is linear


class Shaped(nn.Module):
    """Two linear layers with a function of the test's choosing between or around them."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "what"),
    [
        (lambda net, x: net.second(net.first(x)) + x, "mixes the inputs"),
        (lambda net, x: net.second(net.first(x) + x), "mixes the inputs"),
        (lambda net, x: net.second(net.first(x).softmax(-1)), "softmax may mix"),
        (lambda net, x: net.second(net.first(x).flip(1)), "flip may mix"),
        (lambda net, x: net.second(net.first(x).mean(1, keepdim=True)), "mean may mix"),
        (lambda net, x: net.second(net.first(x).view(-1, 4)), "view may mix"),
        (lambda net, x: net.second(torch.cat([net.first(x)], 1)), "cat may mix"),
        (lambda net, x: net.second(net.first(x) @ net.first.weight), "outside a layer"),
        (lambda net, x: net.second(net.first(x) * net.scale), "outside a layer"),
        (lambda net, x: net.second(net.first(net.first(x))), "more than once"),
        (lambda net, x: net.second(net.first(x)).relu(), "not simply that"),
        (lambda net, x: (net.second(net.first(x)), x), "not simply that"),
        (lambda net, x: net.first(net.second(x) if x.sum() > 0 else x), "cannot be traced"),
    ],
)
def test_what_mixes_channels_is_refused(function: Any, what: str) -> None:
    with pytest.raises(BadInput, match=what):
        traced_chain(Shaped(function))


@pytest.mark.parametrize(
    ("layer", "what"),
    [
        (nn.LayerNorm(4), "LayerNorm"),
        (nn.Softmax(dim=1), "Softmax"),
        (nn.PReLU(), "PReLU"),
        (nn.Flatten(0), "Flatten"),
        (nn.Bilinear(4, 4, 4), "cannot be traced|Bilinear"),
    ],
)
def test_modules_that_cannot_stand_side_by_side_are_refused_by_name(layer: nn.Module, what: str) -> None:
    with pytest.raises(BadInput, match=what):
        traced_chain(nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 4)))


def test_grouped_convolutions_and_shared_weights_are_refused() -> None:
    with pytest.raises(BadInput, match="grouped"):
        traced_chain(nn.Sequential(nn.Conv1d(4, 4, 1, groups=2)))
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    with pytest.raises(BadInput, match="shares its weight"):
        traced_chain(tied)


# Files without code


@given(sizes=st.lists(st.integers(1, 12), min_size=2, max_size=14), data=st.data())
def test_numbered_layers_are_put_in_the_order_of_their_numbers(sizes: list[int], data: st.DataObject) -> None:
    shapes = {f"layers.{number}.weight": (d_out, d_in) for number, (d_in, d_out) in enumerate(pairwise(sizes))}
    stored = dict(data.draw(st.permutations(list(shapes.items()))))
    assert chain_of_shapes(stored, None).layers == tuple(name.removesuffix(".weight") for name in shapes)


@given(sizes=st.lists(st.integers(1, 50), min_size=2, max_size=7, unique=True), data=st.data())
def test_shapes_that_fit_in_one_way_need_no_numbers(sizes: list[int], data: st.DataObject) -> None:
    names = data.draw(st.permutations(["alpha", "beta", "gamma", "delta", "mu", "nu"]))[: len(sizes) - 1]
    shapes = {f"{name}.weight": (d_out, d_in) for name, (d_in, d_out) in zip(names, pairwise(sizes), strict=True)}
    assume(len(shapes) == len(names))
    stored = dict(data.draw(st.permutations(list(shapes.items()))))
    assert chain_of_shapes(stored, None).layers == tuple(names)


@pytest.mark.parametrize(
    ("shapes", "what"),
    [
        ({"encoder.weight": (2, 8), "decoder.weight": (8, 2)}, "order"),
        ({"a.weight": (4, 4), "b.weight": (4, 4)}, "order"),
        ({"a.weight": (4, 8), "b.weight": (4, 8)}, "order"),
        ({"a.weight": (4, 8), "norm.weight": (4,)}, "norm.weight"),
        ({"a.weight": (4, 8, 3, 3)}, "a.weight"),
        ({"a.weight": (4, 8), "table": (4, 8)}, "table"),
        ({f"{chr(97 + i)}.weight": (4, 4) for i in range(20)} | {"z.weight": (7, 9)}, "order"),
    ],
)
def test_files_whose_order_is_not_certain_are_refused(shapes: dict[str, tuple[int, ...]], what: str) -> None:
    with pytest.raises(BadInput, match=what):
        chain_of_shapes(shapes, None)
