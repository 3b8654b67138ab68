"""Parameters stored as factors are multiplied once in a forward pass, and are never out of date."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compressor import compress
from compressor.lowrank import FactoredWeight

D = 16
X = torch.randn(5, 2, D, generator=torch.Generator().manual_seed(0))
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "lstm": (lambda: nn.LSTM(D, D), (X,)),
    "bidirectional gru": (lambda: nn.GRU(D, D, bidirectional=True), (X,)),
    "attention": (lambda: nn.MultiheadAttention(D, 2), (X, X, X)),
}


def small(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = compress(MODULES[name][0](), keep=0.4, prefer="size", form="plain").model
    assert model is not None
    return model.eval()


def outputs(model: nn.Module, name: str) -> Tensor:
    result: Tensor = model(*MODULES[name][1])[0]
    return result


class Products(TorchDispatchMode):
    """Counts products of matrices of inner sizes other than the layers'."""

    def __init__(self, ranks: set[int]) -> None:
        super().__init__()
        self.ranks, self.count = ranks, 0

    def __torch_dispatch__(self, func: Any, _: Any, *given: Any) -> Any:
        args, keywords = (*given, {})[:2]
        if func is torch.ops.aten.mm.default and args[0].shape[1] in self.ranks:
            self.count += 1
        return func(*args, **keywords or {})


@pytest.mark.parametrize("name", MODULES)
def test_each_product_is_computed_once_in_a_pass_with_gradients(name: str) -> None:
    model = small(name)
    factored = [part for part in model.modules() if isinstance(part, FactoredWeight)]
    ranks = {part.rank for part in factored}
    assert factored
    assert max(ranks) < D
    for each in (model, copy.deepcopy(model)):
        for _ in range(2):
            with Products(ranks) as counted:
                y = outputs(each, name)
            assert counted.count == len(factored)
            y.sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(outputs(each, name), y)


@pytest.mark.parametrize("name", MODULES)
def test_gradients_are_those_of_products_that_are_not_shared(name: str) -> None:
    model = small(name)
    alone = type(model).__mro__[1].forward  # of the class that is not parametrized
    y, expected = outputs(model, name), alone(model, *MODULES[name][1])[0]  # type: ignore[attr-defined]
    assert torch.equal(y, expected)
    parameters = list(model.parameters())
    found = torch.autograd.grad(y.square().sum(), parameters, retain_graph=True)
    for one, other in zip(found, torch.autograd.grad(expected.square().sum(), parameters), strict=True):
        torch.testing.assert_close(one, other)
