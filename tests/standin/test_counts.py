"""How much a run waits for the accelerator, and copies to it: bounds that may only fall."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import compressor
from compressor.calibration import CalibrationData, CalibrationSettings, RefinementSettings, calibrate
from compressor.data import Batch
from compressor.engine import Run
from compressor.forms import LowRankLinear, PivotedLinear
from compressor.lowrank import FactoredWeight
from tests.calibration.tiny_models import eligible
from tests.standin.accelerator import counted
from tests.standin.networks import NETWORKS

pytestmark = pytest.mark.slow

BRIEF = CalibrationSettings(refinement=RefinementSettings(passes=1, steps=2))
EFFORTS: dict[str, dict[str, Any]] = {
    "fast": {"effort": "fast"},
    "balanced": {"effort": "balanced"},
    "best": {"calibration_settings": BRIEF},
}


def counts_of(name: str, at: torch.device | str, *, batches: int, **asked: Any) -> Counter[str]:
    """What the accelerator does while a network that lies `at` a device is compressed on it."""
    network = NETWORKS[name]
    model, data = network.on(at), network.batches(batches)
    with counted() as counts:
        compressor.compress(model, keep=0.6, prefer="size", bits=16, device="standin", calibration=data, **asked)
    return counts


def size(model: nn.Module) -> int:
    return sum(each.nbytes for each in (*model.parameters(), *model.buffers()))


# How often the device is waited for in all.
WAITS_OF = {
    ("llama", "fast"): 400,
    ("perceptron", "fast"): 80,
    ("perceptron", "balanced"): 190,  # of three allocations that differ
    ("perceptron", "best"): 400,
}


@pytest.mark.parametrize(("name", "effort"), WAITS_OF)
def test_how_often_a_model_is_moved_and_the_device_is_waited_for(name, effort, device):
    there, here = (counts_of(name, at, batches=4, **EFFORTS[effort]) for at in (device, "cpu"))
    moved = (here["bytes to device"] - there["bytes to device"]) / size(NETWORKS[name].on("cpu"))
    assert here["synchronize"] <= WAITS_OF[name, effort]
    assert moved <= 2, "once to see that it takes the data, and once to be planned for"


def test_how_often_models_are_moved_to_be_evaluated(device):
    network = NETWORKS["perceptron"]
    inputs = torch.cat(network.batches(4))
    data = DataLoader(TensorDataset(inputs, torch.zeros(len(inputs), dtype=torch.long)), batch_size=4)
    found = []
    for at in (device, "cpu"):
        with counted() as counts:
            compressor.evaluate(network.on(at), baseline=network.on(at), data=data, device="standin")
        found.append(counts["bytes to device"])
    assert found[1] - found[0] <= 2 * 2 * size(network.on("cpu")), "one after the other to be run, and both to be timed"


def waits_of_calibration(model: nn.Module, batches: Sequence[Tensor], device: torch.device) -> int:
    """How often the device is waited for while metrics are taken of the eligible layers of a model on it."""
    fit, holdout = ([Batch({"inputs": each}, torch.empty(0)) for each in part] for part in (batches, batches[:1]))
    layers = eligible(model)
    with counted() as counts:
        calibrate(model, layers, CalibrationData(tuple(fit), tuple(holdout), labeled=False), run=Run(device))
    return counts["synchronize"]


@pytest.mark.parametrize("name", ["llama", "perceptron", "convolutions", "recurrent", "encoder", "mixture"])
def test_waits_of_calibration_for_each_batch(name, device):
    network = NETWORKS[name]
    few, many = (waits_of_calibration(network.on(device), network.batches(count), device) for count in (4, 8))
    assert (many - few) / 4 <= 1, "whether the loss is finite"


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "t5"])
def test_a_compressed_model_runs_without_a_wait(name, device):
    network = NETWORKS[name]
    small = compressor.compress(network.on(device), keep=0.6, calibration="none", prefer="size", device="standin").model
    inputs = network.batches(1)[0].to(device)
    dense = network.on(device)
    found = []
    for model in (dense, small):
        with torch.no_grad():
            model(inputs)
            with counted() as counts:
                model(inputs)
        found.append(counts)
    # Experts whose layers are pairs run one after the other, and it depends on the router on which tokens.
    assert found[1]["synchronize"] <= found[0]["synchronize"]
    assert found[1]["copy to host"] == (1 if name == "mixture" else 0)
    assert found[1]["copy to device"] == found[0]["copy to device"]


# With the number of their weights that become pairs.
MULTIPLYING = {"recurrent": (nn.LSTM(16, 24), 2), "attention": (nn.MultiheadAttention(16, 4), 2)}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", MULTIPLYING)
def test_weights_stored_as_factors_are_multiplied_once_in_a_pass(kind, training, device):
    module, weights = MULTIPLYING[kind]
    model = Alone(module).to(device).train(training)
    small = compressor.compress(model, keep=0.6, prefer="size", device="standin").model
    inputs = torch.randn(6, 4, 16, device=device)
    products = []
    for each in (model, small):
        with counted() as counts, torch.set_grad_enabled(training):
            each(inputs)
        assert counts["synchronize"] == 0
        products.append(sum(counts[f"aten::{name}"] for name in ("mm", "addmm", "_native_multi_head_attention")))
    assert products[1] - products[0] == weights


class Alone(nn.Module):
    """A module that takes one tensor, or three that are the same."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.module(*[inputs] * (3 if isinstance(self.module, nn.MultiheadAttention) else 1))[0]
        return outputs


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
    small = compressor.compress(kind(*many), keep=0.4, prefer="size", form="plain").model.eval()
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
