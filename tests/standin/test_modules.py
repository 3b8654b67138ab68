"""Low-rank layers on an accelerator: the kernels that they launch, and that none waits for the device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compressor import compress
from compressor.forms import LowRankLinear, PivotedLinear
from compressor.lowrank import FactoredWeight
from tests.standin.accelerator import counted

pytestmark = pytest.mark.slow

WAITS = {"synchronize", "item", "copy to host"}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [LowRankLinear, PivotedLinear])
def test_a_pair_launches_two_kernels_and_a_pivoted_one_one_more_to_order(device, kind, bias):
    torch.manual_seed(0)
    layer = kind(12, 18, 5, bias=bias, like=torch.empty(0))
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    pivoted = kind is PivotedLinear
    if pivoted:
        layer.order.copy_(torch.randperm(18))
    x = torch.randn(3, 12)
    with torch.no_grad():
        expected = layer(x)
        layer.to(device)
        with counted() as counts:
            y = layer(x.to(device))
    torch.testing.assert_close(y.cpu(), expected)
    launched = {name: count for name, count in counts.items() if name.startswith("aten::")}
    assert sum(launched.values()) == 2 + pivoted * (1 + bias), launched
    assert not counts.keys() & WAITS


@pytest.mark.parametrize("kind", [nn.LSTM, nn.MultiheadAttention])
def test_factored_parameters_are_multiplied_once_a_pass_and_are_never_out_of_date(device, kind):
    torch.manual_seed(0)
    many = (16, 2) if kind is nn.MultiheadAttention else (16, 16)
    small = compress(kind(*many), keep=0.4, prefer="size", form="plain").model.eval()
    factored = [part for part in small.modules() if isinstance(part, FactoredWeight)]
    assert factored
    x = torch.randn(4, 2, 16)
    arguments = [x] * (3 if kind is nn.MultiheadAttention else 1)
    there = [each.to(device) for each in arguments]
    products = []
    for part in factored:
        part.register_forward_hook(lambda _, __, product: products.append(product))
    small.to(device)
    with torch.no_grad():
        for _ in range(2):
            # `data` and fused optimizers change parameters without PyTorch's counting it.
            for parameter in small.parameters():
                parameter.data.mul_(1.1)
            products.clear()
            with counted() as counts:
                y = small(*there)[0]
            assert not counts.keys() & WAITS
            assert len({id(product) for product in products}) == len(factored)
            small.cpu()
            torch.testing.assert_close(y.cpu(), small(*arguments)[0], rtol=1e-4, atol=1e-5)
            small.to(device)
