"""Planning for speed on an accelerator, which is measured, and on which models are timed."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from compressor import TimingSettings, compress, evaluate
from compressor.engine import Run
from compressor.evaluation import count_parameters
from compressor.evaluation.cost import forward_seconds
from compressor.latency import MatrixProduct
from compressor.latency.measure import measure_profile
from tests.latency.fake import SMALL
from tests.planning.profiles import charging
from tests.standin.accelerator import counted, memory
from tests.standin.networks import NETWORKS

pytestmark = pytest.mark.slow


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 48))


def by_size(model: nn.Module, call: Callable[[], Any], device: torch.device) -> float:
    """Two nanoseconds for each stored number, what the device charges; the call is timed on the device too."""
    assert {each.device for each in model.parameters()} == {device}
    forward_seconds(model, call, device)
    return 2e-9 * count_parameters(model)


TIMING = TimingSettings(profile=charging(), timer=by_size, batch=(1,), most_repeats=7)


@pytest.mark.parametrize("at", ["cpu", "standin"])
@pytest.mark.parametrize("budget", [{"keep": 0.5}, {"max_latency": 0.7}, {"keep": 0.5, "max_latency": 0.7}], ids=str)
def test_a_module(at, budget, device):
    found, expected = (
        compress(network().to(place), prefer="speed", device=on, timing_settings=TIMING, **budget)
        for place, on in ((at, "standin"), ("cpu", "cpu"))
    )
    assert {each.device.type for each in found.model.parameters()} == {at}
    assert [each.ratio for each in found.latency] == pytest.approx([each.ratio for each in expected.latency])
    assert [(each.form, each.rank) for each in found.plan.layers] == [
        (each.form, each.rank) for each in expected.plan.layers
    ]


@pytest.mark.parametrize("name", ["llama", "convolutions", "bert", "vit"])
def test_networks_with_examples_of_their_own(name, device):
    asked = {"calibration": "self", "calibration_samples": 8, "effort": "fast", "keep": 0.8, "bits": 16}
    small = compress(NETWORKS[name].on(device), device="standin", timing_settings=TIMING, prefer="speed", **asked)
    assert small.latency
    assert {each.device for each in small.model.parameters()} == {device}


def test_a_drop_beside_a_latency(device):
    x = torch.randn(64, 24)
    data = (x, network()(x).argmax(-1))
    small = compress(
        network().to(device), max_latency=0.9, max_drop=1.0, data=data, device="standin", timing_settings=TIMING
    )
    assert small.evaluation.device == "standin:0 (a stand-in)"


def test_timing_waits_only_around_each_repeat(device):
    data = (torch.randn(8, 24), torch.zeros(8, dtype=torch.long))
    found = []
    for repeats in (3, 8):
        settings = TimingSettings(fewest_repeats=repeats, most_repeats=repeats, batch=(1, 2))
        with counted() as counts:
            evaluate(network().to(device), data=data, device="standin", timing_settings=settings)
        found.append(counts["synchronize"])
    assert found[1] - found[0] == 2 * 2 * 5


def test_a_model_that_does_not_fit_twice_on_the_device_is_not_timed(device, caplog):
    with caplog.at_level(logging.WARNING), memory(free=50_000):
        small = compress(network(), keep=0.5, prefer="speed", device="standin", timing_settings=TIMING)
    assert "more than is free on standin" in caplog.text
    assert small.latency == ()


def test_the_device_is_measured(device):
    with counted() as counts:
        profile = measure_profile(Run(device), [torch.float32], convolutions=False, settings=SMALL)
    assert profile.name == "a stand-in"
    assert counts["synchronize"] > 0
    product = MatrixProduct(rows=8, inner=64, columns=64, itemsize=4)
    assert 0 < float(profile.seconds(product, torch.float32)) < math.inf
