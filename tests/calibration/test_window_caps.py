"""The window rule's caps on the ranks of a calibrated plan: when they are tried, and when they are taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from compressor import BadInput, Plan, TrainingRecipe, inspect
from compressor.calibration import Calibration, CalibrationSettings, calibrate, holdout_loss, split_examples
from compressor.calibration.candidates import Judge, Search
from compressor.calibration.search import PlanRequest, plan_ranks
from compressor.calibration.weighted_layers import weighted_layers
from compressor.data import open_data
from compressor.data.builtin_data import digits
from compressor.engine import Run
from compressor.forms import PivotedLinear
from compressor.measure.memory_window import EPSILON
from compressor.model.measurements import inspect_layers, measured_layers
from compressor.model.opened import open_model
from compressor.planning import Budget, LayerPlan, MeasuredLayer, PlanningSettings, choose_ranks, rank_caps
from compressor.report.wording import calibration_words
from tests.calibration.tiny_models import eligible

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
STEPS, LEARNING_RATE, WEIGHT_DECAY = 400, 0.1, 0.03
SIZE = Budget("keep", 0.55)
# The rule applies to a network that kept more of its start than it usually allows for: its caps then matter.
LENIENT = PlanningSettings(largest_surviving_share=0.5)


@pytest.fixture(scope="module")
def trained() -> nn.Sequential:
    """A perceptron that kept exp(-1.2) of its initialization, above which only a few singular values stand."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    images, labels = digits("train")
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for _ in range(STEPS):
        batch = torch.randint(len(images), (16,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    return model.eval()


def recipe(optimizer: str = "sgd") -> TrainingRecipe:
    return TrainingRecipe(
        optimizer=optimizer, learning_rate=LEARNING_RATE, schedule="constant", weight_decay=WEIGHT_DECAY,
        momentum=0.0 if optimizer == "sgd" else None, batch_size=16, steps=STEPS,
    )  # fmt: skip


def batches() -> list[tuple[Tensor, Tensor]]:
    images, labels = digits("train")
    return list(zip(images[:128].split(32), labels[:128].split(32), strict=True))


@pytest.fixture(scope="module")
def calibration(trained: nn.Sequential) -> Calibration:
    settings = CalibrationSettings(refine=False)
    return calibrate(trained, eligible(trained), split_examples(open_data(batches())), run=Run(CPU), settings=settings)


def measured(model: nn.Module, known: Sequence[TrainingRecipe]) -> list[MeasuredLayer]:
    subject = open_model(model, recipe=known)
    return measured_layers(subject, inspect_layers(subject, EPSILON, Run(CPU)), LENIENT)


def planned(calibration: Calibration, known: Sequence[TrainingRecipe] = (), *, judge: Judge = holdout_loss) -> Plan:
    subject = open_model(calibration.model, recipe=known)
    request = PlanRequest(budget=SIZE, shard_size=10**9)
    layers = measured(calibration.model, known)
    return plan_ranks(subject, layers, request, calibration=calibration, judge=judge).plan


def edges(model: nn.Module) -> dict[str, int]:
    """How many singular values of each layer stand above the edge of its initialization."""
    found = inspect(model, recipe=recipe()).layers
    return {each.layer.name: each.initialization.above_edge or 0 for each in found if each.initialization is not None}


def judged_by(rank_of_a_pair: Callable[[int], float]) -> Judge:
    """A holdout loss that depends on the largest rank alone."""

    def loss(_: object, modules: Mapping[str, nn.Module]) -> float:
        ranks = [module.get_submodule("down").weight.shape[0] for module in modules.values()]
        return rank_of_a_pair(max(int(rank) for rank in ranks))

    return loss


def test_the_caps_are_taken_where_they_lose_less_on_the_holdout(calibration: Calibration) -> None:
    caps = edges(calibration.model)
    free = planned(calibration)
    assert any((layer.rank or min(layer.shape)) > caps[layer.name] for layer in free.layers)
    capped = planned(calibration, [recipe()], judge=judged_by(float))
    assert all(layer.rank is not None and layer.rank <= caps[layer.name] for layer in capped.layers)
    assert capped.calibration is not None
    assert capped.calibration.capped
    assert capped.to_dict()["calibration"]["capped"] is True
    assert "capped by the window rule" in calibration_words(capped.calibration)


def test_the_caps_are_left_where_they_lose_more(calibration: Calibration) -> None:
    judge = judged_by(lambda rank: -float(rank))
    free, tried = planned(calibration, judge=judge), planned(calibration, [recipe()], judge=judge)
    assert tried.layers == free.layers
    assert tried.calibration is not None
    assert not tried.calibration.capped
    assert "window rule" not in calibration_words(tried.calibration)


@pytest.mark.parametrize(
    ("known", "caps"),
    [([], True), ([recipe("adamw")], True), ([recipe()], False)],
    ids=["no recipe", "AdamW", "switched off"],
)
def test_nothing_more_is_measured_where_there_is_no_cap(
    calibration: Calibration, known: list[TrainingRecipe], caps: bool
) -> None:
    judged: list[int] = []

    def counted(_: object, modules: Mapping[str, nn.Module]) -> float:
        judged.append(len(modules))
        return 1.0

    once = replace(calibration, settings=replace(calibration.settings, recalibration_rounds=0))
    planned(once, [recipe()], judge=counted)
    with_caps = len(judged)
    judged.clear()
    planned(replace(once, settings=replace(once.settings, window_caps=caps)), known, judge=counted)
    assert len(judged) == with_caps - 1


@pytest.mark.parametrize(("exponents", "pivoted"), [((1.0, 0.0), [False, False]), ((0.0,), [True])])
def test_only_what_is_stored_is_pivoted(
    calibration: Calibration, exponents: tuple[float, ...], pivoted: list[bool]
) -> None:
    judged: list[bool] = []

    def noted(_: object, modules: Mapping[str, nn.Module]) -> float:
        judged.append(any(isinstance(module, PivotedLinear) for module in modules.values()))
        return 1.0

    settings = CalibrationSettings(exponents=exponents, compensate=False, recalibration_rounds=0, refine=False)
    chosen = planned(replace(calibration, settings=settings), judge=noted)
    assert any(layer.form == "pivoted" for layer in chosen.layers)
    assert judged == pivoted


def test_where_no_ranks_are_found_under_the_caps_the_plan_is_that_without_them(calibration: Calibration) -> None:
    def allocate(layers: Sequence[MeasuredLayer], budget: Budget, exponent: float) -> tuple[LayerPlan, ...]:
        if any(m.rank_cap is not None for m in layers):
            raise BadInput("no ranks were found", remedy="allow more")
        return choose_ranks(layers, budget, "auto", file_bytes=lambda _: 0, exponent=exponent)

    layers = measured(calibration.model, [recipe()])
    caps = rank_caps(layers, "sgd")
    assert caps
    free = Search(calibration, weighted_layers(layers, calibration), allocate, calibration.settings.exponents)
    assert replace(free, caps=caps).find(SIZE).layers == free.find(SIZE).layers
