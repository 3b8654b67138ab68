"""Calibration of quantized layers: errors, candidates, compensation, and refinement work on them as on pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressor.calibration import Calibration, Compensated, compensate, holdout_loss, refine, uncompensated
from compressor.calibration.candidates import Judge, Search
from compressor.calibration.decompositions import own_errors
from compressor.calibration.fitted_weights import FittedWeight
from compressor.calibration.weighted_layers import weighted_layers
from compressor.engine import InProcess, Run
from compressor.forms import FORMS
from compressor.forms.quantized_layers import QuantizedWeight
from compressor.lowrank import stored_error
from compressor.planning import Budget, LayerPlan, MeasuredLayer, choose_ranks, quantized_forms
from compressor.quantize import unpack
from tests.calibration.tiny_models import CPU, TWO_PASSES, calibrated, left_as_it_was

FORMS_AND_RANKS = [("dense@3g16", 0), ("dense@2g16z", 2), ("plain@4", 5), ("pivoted@8", 5)]
IDS = [f"{form} {rank}" for form, rank in FORMS_AND_RANKS]


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.other(torch.relu(self.one(x)))


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    """Two blocks whose inputs have a mean, calibrated in two passes."""
    torch.manual_seed(0)
    model = nn.Sequential(_Block(), _Block()).eval()
    mixed = torch.randn(40, 32) / 6
    parts = [[{"input": torch.randn(64, 40) @ mixed + 0.5} for _ in range(3)] for _ in range(2)]
    return calibrated(model, *parts, settings=TWO_PASSES)


def plans(calibration: Calibration, form: str, rank: int) -> list[LayerPlan]:
    return [
        LayerPlan(layer.name, layer.shape, layer.kind, rank, form, 0, 0.0, "") for layer in calibration.layers.values()
    ]


def quantized_weights(solution: Compensated) -> list[QuantizedWeight]:
    modules = [each for module in solution.modules.values() for each in module.modules()]
    return [each for each in modules if isinstance(each, QuantizedWeight)]


@pytest.mark.parametrize(("form", "rank"), FORMS_AND_RANKS, ids=IDS)
def test_the_errors_are_those_of_what_is_stored(calibration: Calibration, form: str, rank: int) -> None:
    layers = list(calibration.layers.values())
    found = own_errors(calibration, [(layer, None, [form]) for layer in layers])
    solution = uncompensated(calibration, plans(calibration, form, rank))
    for plan, errors in zip(plans(calibration, form, rank), found, strict=True):
        layer = calibration.layers[plan.name]
        stored = stored_error(
            layer, plan, solution.factors[plan.name], matrix=calibration.weight(layer).double(),
            metric=calibration.metrics[plan.name],
        )  # fmt: skip
        # They are simulated, and at ranks between those that are looked at they are interpolated.
        assert errors[form][rank] == pytest.approx(stored, rel=0.15)


class _Counting(InProcess):
    """An engine that counts its jobs."""

    jobs = 0

    def map(self, job: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        def counted() -> Iterator[Any]:
            for item in items:
                type(self).jobs += 1
                yield item

        return super().map(job, counted())


def test_errors_and_quantized_layers_are_made_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 16)).eval()
    calibration = calibrated(model, [{"input": torch.randn(64, 32)}])
    engine = _Counting()
    calibration = replace(calibration, run=Run(CPU, engine=engine))
    asked = [(layer, None, ["dense@4g16", "plain@8"]) for layer in calibration.layers.values()]
    planned = plans(calibration, "dense@4g16", 0)

    def work() -> tuple[list[Any], dict[str, Tensor]]:
        errors = [{form: each.tolist() for form, each in found.items()} for found in own_errors(calibration, asked)]
        factors = uncompensated(calibration, planned).factors.values()
        return errors, {name: each for named in factors for name, each in named.items()}

    (errors, tensors), made = work(), engine.jobs
    assert made == len(asked) * 3  # a decomposition, the errors, and the quantized layer of each
    again, same = work()
    assert engine.jobs == made
    assert errors == again
    assert all(torch.equal(each, same[name]) for name, each in tensors.items())
    # Of those that are known no form is measured again.
    list(own_errors(calibration, [(layer, None, ["dense@4g16", "dense@8"]) for layer, *_ in asked]))
    assert engine.jobs == made + len(asked)


@pytest.mark.parametrize(("form", "rank"), FORMS_AND_RANKS, ids=IDS)
def test_no_mean_is_moved_where_there_is_a_bias(calibration: Calibration, form: str, rank: int) -> None:
    solution = compensate(calibration, plans(calibration, form, rank), f"mean of {form}")
    place = next(iter(calibration.layers.values())).module
    x = torch.cat([batch.inputs["input"] for batch in calibration.data.fit])
    with torch.no_grad():
        before, after = (
            module(x).mean(0) for module in (calibration.model.get_submodule(place), solution.modules[place])
        )
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("form", "rank"), FORMS_AND_RANKS, ids=IDS)
def test_compensated_and_refined_layers_lose_less_and_hold_integers(
    calibration: Calibration, form: str, rank: int
) -> None:
    planned = plans(calibration, form, rank)
    alone = uncompensated(calibration, planned)
    refitted = compensate(calibration, planned, f"refit of {form}")
    with left_as_it_was(calibration.model):
        refined = refine(calibration, refitted, f"refine {form}")
    losses = [holdout_loss(calibration, each.modules) for each in (alone, refitted, refined)]
    assert losses == sorted(losses, reverse=True)
    assert losses[2] < 0.98 * losses[0]
    for plan in planned:
        layer = calibration.layers[plan.name]
        infos = {f"{layer.name}.{info.name}": info for info in FORMS[form].infos(layer, rank, torch.float32)}
        factors = refined.factors[plan.name]
        assert infos.keys() <= factors.keys()
        assert all(factors[name].dtype == info.dtype for name, info in infos.items())
        assert all(tuple(factors[name].shape) == info.shape for name, info in infos.items())
    assert quantized_weights(refined)
    assert all(each.fitted is None for each in quantized_weights(refined))


@pytest.mark.parametrize("rounding", [False, True])
def test_what_is_fitted_is_what_is_stored(calibration: Calibration, rounding: bool) -> None:
    settings = replace(TWO_PASSES, refinement=replace(TWO_PASSES.refinement, rounding=rounding))
    start = uncompensated(calibration, plans(calibration, "dense@3g16", 0))

    def moved(modules: Mapping[str, nn.Module], *_: object, **__: object) -> bool:
        fitted = [each for module in modules.values() for each in module.modules() if isinstance(each, FittedWeight)]
        assert len(fitted) == len(modules)
        for each in fitted:
            assert (each.offsets is not None) == rounding
            each.scales.data *= 2
            if each.offsets is not None:
                each.offsets.data.fill_(0.75)
        return True

    refined = refine(replace(calibration, settings=settings), start, f"rounding {rounding}", fit=moved)
    for before, after in zip(quantized_weights(start), quantized_weights(refined), strict=True):
        assert torch.equal(after.weight_scale, 2 * before.weight_scale)
        integers = [unpack(each.weight_packed, 3, each.columns).int() for each in (before, after)]
        assert torch.equal(integers[1], (integers[0] + 1).clamp(max=7) if rounding else integers[0])


def search(calibration: Calibration, judge: Judge, **known: Any) -> Search:
    """A search of all choices in 8 and 4 bits, that knows no layer's spectrum but in the metric."""
    measured = [
        MeasuredLayer(layer, np.ones(min(layer.shape)), 4, quantized=quantized_forms(layer, (8, 4)))
        for layer in calibration.layers.values()
    ]

    def allocated(layers: Sequence[MeasuredLayer], budget: Budget, exponent: float) -> tuple[LayerPlan, ...]:
        return choose_ranks(layers, budget, "auto", file_bytes=lambda _: 0, exponent=exponent)

    weighted = weighted_layers(measured, calibration)
    return Search(calibration, weighted, allocated, (0.0,), judge=judge, **known)


def kinds(modules: Mapping[str, nn.Module]) -> tuple[bool, bool]:
    """Whether some module is quantized, and whether some is a pair."""
    inside = [each for module in modules.values() for each in module.modules()]
    return any(isinstance(each, QuantizedWeight) for each in inside), any(hasattr(each, "down") for each in inside)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)], ids=["bits", "ranks", "both"])
def test_bits_alone_and_ranks_alone_are_taken_where_the_holdout_loses_less(
    calibration: Calibration, wanted: tuple[bool, bool]
) -> None:
    seen = []

    def judge(_: Calibration, modules: Mapping[str, nn.Module]) -> float:
        seen.append(kinds(modules))
        return float(seen[-1] != wanted)

    found = search(calibration, judge, penalties=(1.0, 1e3)).tried(Budget("keep", 0.4))[0]
    assert {(True, False), (False, True)} <= set(seen)
    assert found.loss == min(float(each != wanted) for each in seen)
    assert sum(plan.parameters for plan in found.layers) <= 0.4 * sum(plan.parameters_before for plan in found.layers)
    if found.loss == 0:
        assert any(plan.bits < 16 for plan in found.layers) == wanted[0]
        assert any(plan.rank for plan in found.layers) == wanted[1]
    else:
        assert wanted == (True, True)


BITS, RANKS = (True, False), (False, True)


@pytest.mark.parametrize("within", [1.1, 2.0])
def test_candidates_that_lose_a_little_more_are_compared_again_as_they_are_compensated(
    calibration: Calibration, within: float
) -> None:
    seen = []

    def judge(_: Calibration, modules: Mapping[str, nn.Module]) -> float:
        seen.append(kinds(modules))
        if seen[-1] == BITS:
            return 1.2 if seen.count(RANKS) < 2 else 0.5
        return 1.0 if seen[-1] == RANKS else math.inf

    settings = replace(TWO_PASSES, compensated_within=within)
    found = search(replace(calibration, settings=settings), judge, penalties=(1.0,)).find(Budget("keep", 0.4))
    assert (found.quantizes, found.truncates) == (BITS if within > 1.2 else RANKS)
    assert found.loss == (0.5 if within > 1.2 else 1.0)


@pytest.mark.parametrize("within", [1.1, 1.25])
def test_close_candidates_are_refined_beside_each_other(calibration: Calibration, within: float) -> None:
    losses = {RANKS: 1.0, BITS: 1.2}

    def judge(_: Calibration, modules: Mapping[str, nn.Module]) -> float:
        return losses.get(kinds(modules), math.inf)

    settings = replace(TWO_PASSES, refined_within=within)
    alike = search(replace(calibration, settings=settings), judge, penalties=(1.0,))
    found = alike.find(Budget("keep", 0.4))
    assert (found.quantizes, found.truncates) == RANKS
    losses[BITS] = 0.5
    refined = alike.refined(found)
    assert (refined.quantizes, refined.truncates) == (BITS if within > 1.2 else RANKS)


@pytest.mark.parametrize(("keep", "bits"), [(0.7, 8), (0.4, 4)])
def test_the_most_bits_that_all_layers_may_have_are_tried(calibration: Calibration, keep: float, bits: int) -> None:
    def judge(_: Calibration, modules: Mapping[str, nn.Module]) -> float:
        return float(len(modules))

    tried = search(calibration, judge, penalties=(1.0,)).tried(Budget("keep", keep))
    assert any({plan.bits for plan in each.layers} - {16} == {bits} and not each.truncates for each in tried)


def test_one_width_is_not_compared_with_the_model_as_it_is(calibration: Calibration) -> None:
    def judge(_: Calibration, modules: Mapping[str, nn.Module]) -> float:
        return float(len(modules))

    [found] = search(calibration, judge, penalties=(1.0, 2.0)).tried(Budget("bits", 4))
    assert [plan.bits for plan in found.layers] == [4] * len(calibration.layers)
