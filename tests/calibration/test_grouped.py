"""Convolutions with groups in calibration: each group as the layer that it is, by itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from compressor.calibration import (
    Calibration,
    CalibrationSettings,
    Compensated,
    compensate,
    holdout_loss,
    refine,
    uncompensated,
)
from compressor.calibration.calibration import with_layers
from compressor.calibration.decompositions import decomposition_of, own_errors
from compressor.factorize import GroupedMetric, Metric, decompose
from compressor.lowrank import stored_error
from compressor.measure.moments import input_vectors, oas_shrinkage
from compressor.planning import LayerPlan
from tests.calibration.tiny_models import TWO_PASSES, calibrated, eligible, planned

GROUPS, CHANNELS = 3, 12


class Toy(nn.Module):
    """A convolution, and one with groups that is also given channels that pass the first by."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.first = nn.Conv1d(8, 6, 1, bias=bias)
        self.grouped = nn.Conv1d(CHANNELS, 9, 2, groups=GROUPS, bias=bias)
        self.head = nn.Linear(9, 5)
        with torch.no_grad():
            self.first.weight.mul_(3)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([torch.relu(self.first(x[:, :8])), x[:, 8:]], dim=2).flatten(1, 2)
        return self.head(self.grouped(both).mean(2))


def inputs(count: int) -> Tensor:
    mixed = torch.randn(14, 14, generator=torch.Generator().manual_seed(3)) / 14**0.5
    return torch.einsum("bcl,cd->bdl", torch.randn(count, 14, 5), mixed) + 0.5


def toy(*, bias: bool = True, settings: CalibrationSettings | None = None) -> Calibration:
    torch.manual_seed(0)
    model = Toy(bias=bias).eval()
    parts = ([{"x": inputs(80)} for _ in range(3)] for _ in range(2))
    return calibrated(model, *parts, settings=settings)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return toy(settings=TWO_PASSES)


def plan_of(calibration: Calibration, form: str, rank: int) -> LayerPlan:
    layer = calibration.layers["grouped"]
    return LayerPlan(layer.name, layer.shape, layer.kind, rank, form, 0, 0.0, "")


@torch.no_grad()
def given(calibration: Calibration, solution: Compensated | None) -> Tensor:
    """The vectors that the convolution with groups is applied to, of all its inputs, in a model."""
    seen: list[Tensor] = []
    layer = calibration.model.get_submodule("grouped")
    with with_layers(calibration.model, {} if solution is None else solution.modules) as model:
        own = model.get_submodule("grouped")
        handle = own.register_forward_pre_hook(lambda _, args: seen.append(input_vectors(layer, args[0].double())))
        for chunk in calibration.data.chunks("fit"):
            model(*calibration.data.read(chunk).inputs.values())
        handle.remove()
    return torch.cat(seen)


def test_every_group_is_decomposed_in_its_own_metric(calibration: Calibration) -> None:
    layer, metric = calibration.layers["grouped"], calibration.metrics["grouped"]
    assert isinstance(metric, GroupedMetric)
    assert [tuple(each.shape) for each in (metric.inputs, metric.gradients)] == [(GROUPS, 8, 8), (GROUPS, 3, 3)]
    found = decomposition_of(calibration, layer)
    matrix = calibration.weight(layer).double().flatten(1)
    blocks = [decompose(block, own).values for block, own in zip(matrix.chunk(GROUPS), metric.blocks, strict=True)]
    for place, value in enumerate(found.values):
        assert value == pytest.approx(math.hypot(*(block[place] for block in blocks)), rel=1e-6)


def test_the_moments_are_the_blocks_of_those_of_all_inputs(calibration: Calibration) -> None:
    metric = calibration.metrics["grouped"]
    assert isinstance(metric, Metric)
    vectors = given(calibration, None)
    vectors = vectors - vectors.mean(0)
    whole = vectors.T @ vectors / len(vectors)
    for place, inputs_of_group in enumerate(metric.inputs):
        own = slice(8 * place, 8 * place + 8)
        expected = oas_shrinkage(whole[own, own], len(vectors))
        torch.testing.assert_close(inputs_of_group, expected, rtol=1e-5, atol=1e-6)


def test_a_group_that_nothing_reaches_costs_next_to_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(8, 6, 1, groups=2), nn.Flatten(), nn.Linear(6, 3)).eval()
    x = torch.randn(64, 8, 1)
    x[:, 4:] = 0
    found = calibrated(model, [{"x": x}], [{"x": x}])
    metric = found.metrics["0"]
    assert isinstance(metric, GroupedMetric)
    reached, other = (own.squared_size(torch.ones(3, 4, dtype=torch.float64)) for own in metric.blocks)
    assert 0 < other < 1e-6 * reached


FORMS_AND_RANKS = [("grouped", 2), ("grouped@8", 2), ("grouped@4", 1), ("dense@4", 0), ("dense@3", 2)]


@pytest.mark.parametrize(("form", "rank"), FORMS_AND_RANKS)
def test_the_errors_are_those_of_what_is_stored(calibration: Calibration, form: str, rank: int) -> None:
    layer, plan = calibration.layers["grouped"], plan_of(calibration, form, rank)
    tensors = uncompensated(calibration, [plan]).factors["grouped"]
    matrix, metric = calibration.weight(layer).double().flatten(1), calibration.metrics["grouped"]
    stored = stored_error(layer, plan, tensors, matrix=matrix, metric=metric)
    if form == "grouped":
        values = decomposition_of(calibration, layer).values
        expected = (values[rank:] ** 2).sum() ** 0.5 / (values**2).sum() ** 0.5
        assert stored == pytest.approx(expected, rel=1e-3)
    else:
        [errors] = own_errors(calibration, [(layer, None, [form])])
        assert errors[form][rank] == pytest.approx(stored, rel=0.35)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("relative", [1e-4, 1e-1])
def test_the_refit_is_ridge_regression_of_every_group(bias: bool, relative: float) -> None:
    calibration = toy(bias=bias, settings=CalibrationSettings(ridges=(relative,)))
    first, _, _ = eligible(calibration.model)
    solution = compensate(calibration, [planned(first, 2), plan_of(calibration, "grouped", 3)])
    layer, pair = calibration.model.get_submodule("grouped"), solution.modules["grouped"]
    x, y = given(calibration, None), given(calibration, solution)
    weight = layer.weight.detach().double().flatten(1)
    about_x, about_y = (x.mean(0), y.mean(0)) if bias else (torch.zeros(24).double(), torch.zeros(24).double())
    x, y = x - about_x, y - about_y
    # One ridge for all groups, by the mean over all inputs.
    ridge = relative * (y**2).sum(0).mean() / len(y)
    down, up = pair.down.weight.double().flatten(1), pair.up.weight.double().flatten(1)
    moved = 0.0
    for group in range(GROUPS):
        inside, rows = slice(8 * group, 8 * group + 8), slice(3 * group, 3 * group + 3)
        own = weight[rows]
        left = torch.cat([y[:, inside] / len(y) ** 0.5, ridge.sqrt() * torch.eye(8, dtype=torch.float64)])
        right = torch.cat([x[:, inside] @ own.T / len(x) ** 0.5, ridge.sqrt() * own.T])
        expected = torch.linalg.lstsq(left, right).solution.T
        found = (up[rows] @ down[rows]).detach()
        rounding = 2e-6 + torch.finfo(torch.float32).eps / relative
        torch.testing.assert_close(found, expected, rtol=0, atol=rounding)
        moved += float((expected - own).norm() / own.norm())
        if bias:
            shifted = layer.bias.double()[rows] + own @ about_x[inside] - found @ about_y[inside]
            torch.testing.assert_close(pair.up.bias.double()[rows], shifted, rtol=0, atol=1e-5)
    assert moved > 0.05


@pytest.mark.parametrize("form", ["grouped", "grouped@6", "dense@3"])
def test_a_refit_and_fitted_factors_lose_less_on_holdout_examples(calibration: Calibration, form: str) -> None:
    first, _, _ = eligible(calibration.model)
    plans = [planned(first, 2), plan_of(calibration, form, 0 if form.startswith("dense") else 2)]
    alone, refitted = uncompensated(calibration, plans), compensate(calibration, plans)
    before, after = (holdout_loss(calibration, each.modules) for each in (alone, refitted))
    assert after < before
    assert holdout_loss(calibration, refine(calibration, refitted).modules) <= after
