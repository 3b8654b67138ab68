"""What quantizing would cost is what errors that are carried cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.factorize import Metric
from compressor.quantize import Quantization, QuantizationSettings, Simulation, gptq
from tests.quantize.test_gptq import BFLOAT16, loss, moment, random


def metric_of(d_out: int, d_in: int, *, diagonal: str = "neither") -> Metric:
    inputs, gradients = moment(d_in, 1, d_in // 2) + torch.eye(d_in), moment(d_out, 2, d_out // 2) + torch.eye(d_out)
    return Metric(
        inputs.diagonal().clone() if diagonal == "inputs" else inputs,
        gradients.diagonal().clone() if diagonal == "gradients" else gradients,
    )


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_simulated_error_costs_what_the_first_pass_does(bits: int, diagonal: bool) -> None:
    matrix, metric = random(48, 64), metric_of(48, 64, diagonal="gradients" if diagonal else "neither")
    found = Simulation(metric).matrix(matrix, Quantization(bits, 32), metric).product()
    first = gptq(matrix, Quantization(bits, 32), metric, scale_dtype=BFLOAT16, settings=QuantizationSettings(rounds=0))
    assert 0.6 < loss(metric, matrix, found) / loss(metric, matrix, first.product()) < 1.2


def test_without_correlated_inputs_rounding_to_nearest_is_simulated() -> None:
    matrix, metric = random(6, 8), Metric(torch.arange(1, 9).double(), moment(6, 1))
    found = gptq(matrix, Quantization(3), metric, scale_dtype=BFLOAT16)
    assert torch.equal(Simulation(metric).matrix(matrix, Quantization(3), metric).product(), found.product())


def carried(simulation: Simulation, metric: Metric, left: Tensor) -> Tensor:
    rows, columns = simulation.carrying(metric)
    return rows.carried(columns.carried(left.T).T)


@pytest.mark.parametrize("scale", [1.0, 2.0**-40, 2.0**40])
@pytest.mark.parametrize("diagonal", ["neither", "gradients", "inputs"])
def test_the_weights_are_what_an_error_in_one_number_costs(diagonal: str, scale: float) -> None:
    metric = metric_of(5, 7, diagonal=diagonal)
    metric = Metric(scale * metric.inputs, metric.gradients)
    simulation = Simulation(metric)
    rows, columns = simulation.carrying(metric)
    for i in range(5):
        for j in range(7):
            left = torch.zeros(5, 7, dtype=torch.float64)
            left[i, j] = 1
            cost = metric.squared_size(carried(simulation, metric, left))
            assert float(rows.weights[i] * columns.weights[j]) == pytest.approx(cost, rel=1e-9)


@pytest.mark.parametrize("unit", [1.0, 2.0**-100, 2.0**100])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("bits", [8, 5, 4])
def test_the_cost_is_that_of_the_simulated_error(bits: int, turned: bool, unit: float) -> None:
    matrix, metric = random(96, 128), metric_of(96, 128)
    if turned:
        matrix, metric = matrix.T, Metric(metric.gradients, metric.inputs)
    found = Simulation(metric).matrix(matrix, Quantization(bits), metric).product()
    cost = Simulation(metric).cost(unit * matrix, Quantization(bits), metric, unit=unit)
    assert cost == pytest.approx(metric.squared_size(matrix - found), rel=0.05)


def test_the_weights_of_a_moment_of_zero_are_zero() -> None:
    metric = Metric(torch.zeros(3, 3).double(), torch.zeros(2, 2).double())
    for side in Simulation(metric).carrying(metric):
        assert not side.weights.any()


def test_moments_of_the_metric_are_factorized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    factorize = torch.linalg.cholesky

    def counted(matrix: Tensor) -> Tensor:
        made.append(len(matrix))
        return factorize(matrix)

    monkeypatch.setattr(torch.linalg, "cholesky", counted)
    metric = metric_of(5, 7)
    simulation = Simulation(metric)
    for bits in (8, 4, 2):
        simulation.matrix(random(5, 7), Quantization(bits), metric)
    assert sorted(made) == [5, 7]
