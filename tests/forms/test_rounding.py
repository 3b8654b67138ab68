"""What quantizing would cost is what simulated errors cost, with the second factor refitted to the first."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compressor.factorize import FactorPair, Metric, decompose, pivoted_pair
from compressor.forms.pair_form import PairForm
from compressor.forms.pivoted import PIVOTED
from compressor.forms.plain import PLAIN
from compressor.forms.quantized_parts import pivoted_parts, plain_parts
from compressor.forms.rounding import rounded_matrix, rounded_pair
from compressor.network import Kind
from compressor.quantize import Quantization, SimulatedMatrix, Simulation
from tests.quantize.test_gptq import random
from tests.quantize.test_simulated import metric_of

KINDS: tuple[Kind, ...] = ("linear", "embedding", "transposed convolution")
METRIC, MATRIX = metric_of(96, 128), random(96, 128)


def simulating(bits: int) -> Callable[[Tensor, Metric | None], SimulatedMatrix]:
    def quantize(matrix: Tensor, metric: Metric | None) -> SimulatedMatrix:
        assert metric is not None
        return Simulation(metric).matrix(matrix, Quantization(bits), metric)

    return quantize


def truncated(rank: int) -> tuple[FactorPair, float]:
    """The best pair and its loss."""
    pair = decompose(MATRIX, METRIC).pair(MATRIX, rank, METRIC)
    return pair, METRIC.squared_size(MATRIX - pair.product())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_of_a_matrix(kind: Kind, bits: int) -> None:
    turned = kind != "linear"
    matrix, metric = (MATRIX.T, Metric(METRIC.gradients, METRIC.inputs)) if turned else (MATRIX, METRIC)
    cost = metric.squared_size(matrix - simulating(bits)(matrix, metric).product())
    rounded = rounded_matrix(kind, MATRIX, simulation=Simulation(METRIC))
    assert rounded.cost(Quantization(bits)) == pytest.approx(cost, rel=0.05)


@pytest.mark.parametrize("bits", [8, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_of_a_plain_pair(kind: Kind, bits: int) -> None:
    pair, before = truncated(24)
    parts = plain_parts(kind, pair, MATRIX, metric=METRIC, quantize=simulating(bits))
    up, down = parts["up.weight"].product(), parts["down.weight"].product()
    up = up.T if kind == "transposed convolution" else up
    down = down if kind == "linear" else down.T
    rounded = rounded_pair(PLAIN, kind, pair, simulation=Simulation(METRIC))
    assert rounded.cost(Quantization(bits)) == pytest.approx(METRIC.squared_size(MATRIX - up @ down) - before, rel=0.05)


@pytest.mark.parametrize("bits", [8, 6])
def test_of_a_pivoted_pair(bits: int) -> None:
    pair, before = truncated(12)
    parts = pivoted_parts(pivoted_pair(pair), MATRIX, metric=METRIC, quantize=simulating(bits))
    down, up, order = (parts[name] for name in ("down.weight", "up.weight", "order"))
    assert isinstance(down, SimulatedMatrix)
    assert isinstance(up, SimulatedMatrix)
    assert isinstance(order, Tensor)
    product = torch.cat([down.product(), up.product() @ down.product()])[order.long()]
    rounded = rounded_pair(PIVOTED, "linear", pair, simulation=Simulation(METRIC))
    # What is carried to the chosen rows alone is left out.
    assert rounded.cost(Quantization(bits)) == pytest.approx(METRIC.squared_size(MATRIX - product) - before, rel=0.2)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("form", [PLAIN, PIVOTED], ids=lambda form: form.name)
def test_of_a_pair_of_a_higher_rank_than_the_matrix(form: PairForm, rank: int) -> None:
    matrix = 2.0**30 * (random(96, rank) @ random(rank, 128, seed=1))
    pair = decompose(matrix, METRIC).pair(matrix, 40, METRIC)
    rounded = rounded_pair(form, "linear", pair, simulation=Simulation(METRIC))
    costs = [rounded.cost(Quantization(bits)) for bits in (8, 4)]
    assert 0 <= costs[0] <= costs[1] <= 0.1 * METRIC.squared_size(matrix)
