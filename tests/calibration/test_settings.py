"""Settings: each says what it is, and each is used."""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compressor
from compressor import CalibrationSettings, PlanningSettings, TimingSettings
from compressor.calibration import RefinementSettings, split_examples
from compressor.data import open_data
from compressor.factorize import FactorizationSettings

ALL = (CalibrationSettings, RefinementSettings, FactorizationSettings, PlanningSettings, TimingSettings)


@pytest.mark.parametrize("settings", ALL)
def test_every_setting_has_a_docstring_and_a_default(settings: Any) -> None:
    [tree] = ast.parse(inspect.getsource(settings)).body
    assert isinstance(tree, ast.ClassDef)
    documented = {
        field.target.id
        for field, text in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }
    assert documented == {field.name for field in fields(settings)}
    assert settings() == settings()


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 5))


def batches(count: int = 8) -> list[Tensor]:
    return list(torch.randn(count, 16, 12, generator=torch.Generator().manual_seed(1)))


def steps(settings: CalibrationSettings | None = None, *, refine: bool | None = None) -> list[tuple[str, int]]:
    """The steps of a compression, each with its number of parts."""
    seen: list[tuple[str, int]] = []

    def note(name: str, done: int, total: int) -> None:
        if done == total:
            seen.append((name, total))

    options: dict[str, Any] = {"refine": refine, "calibration_settings": settings, "progress": note}
    compressor.compress(model(), keep=0.4, calibration=batches(), **options)
    return seen


def names(settings: CalibrationSettings | None = None, *, refine: bool | None = None) -> list[str]:
    return [name for name, _ in steps(settings, refine=refine)]


@pytest.mark.slow
def test_parts_of_the_search_are_switched_off() -> None:
    trusting = CalibrationSettings(trust_factor=1e9)
    assert names(trusting) == ["measure", "run", "calibrate", "allocate", "compensate", "refine", "factorize"]
    assert "refine" not in names(trusting, refine=False)
    without = CalibrationSettings(trust_factor=1e9, refine=False)
    assert "refine" not in names(without)
    assert "refine" in names(without, refine=True)
    assert "compensate" not in names(CalibrationSettings(trust_factor=1e9, compensate=False), refine=False)
    [allocations] = [
        total
        for name, total in steps(CalibrationSettings(trust_factor=1e9, exponents=(1.0,)), refine=False)
        if name == "allocate"
    ]
    assert allocations == 1


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_a_round_of_recalibration_is_run_where_the_estimate_is_not_trusted(rounds: int) -> None:
    found = names(CalibrationSettings(trust_factor=1.0, recalibration_rounds=rounds), refine=False)
    assert found.count("calibrate") == 1 + rounds


@pytest.mark.parametrize(("every", "fit"), [(2, 4), (4, 6), (8, 7)])
def test_the_share_of_the_holdout(every: int, fit: int) -> None:
    found = split_examples(open_data(batches(8)), CalibrationSettings(holdout_every=every))
    assert (len(found.fit), len(found.holdout)) == (fit, 8 - fit)


def test_thresholds_reach_inspect_and_compress() -> None:
    recipe = compressor.TrainingRecipe(
        optimizer="sgd",
        learning_rate=0.1,
        schedule="constant",
        weight_decay=0.03,
        momentum=0.0,
        batch_size=16,
        steps=400,
    )
    strict, lenient = (
        compressor.inspect(model(), recipe=recipe, planning_settings=settings).advice
        for settings in (None, PlanningSettings(largest_surviving_share=1.0))
    )
    assert strict is not None
    assert lenient is None
    with pytest.raises(compressor.QualityGateNotMet, match=r"tolerance 0\.01"):
        compressor.compress(model(), planning_settings=PlanningSettings(safe_tolerance=0.01))


def test_timing_reaches_evaluate() -> None:
    timing = TimingSettings(fewest_repeats=2, most_repeats=2)
    data = (torch.randn(20, 12), torch.arange(20) % 5)
    found = compressor.evaluate(model(), data=data, timing_settings=timing)
    assert [each.repeats for each in found.latency] == [2, 2]


@pytest.mark.parametrize("option", ["calibration_settings", "planning_settings"])
def test_settings_of_another_kind_are_refused(option: str) -> None:
    with pytest.raises(compressor.BadInput, match=f"`{option}` is of type TimingSettings; give a compressor"):
        compressor.compress(model(), keep=0.5, calibration=batches(), **{option: TimingSettings()})


@pytest.mark.parametrize(
    ("settings", "values"),
    [
        (CalibrationSettings, {"samples": 1}),
        (CalibrationSettings, {"holdout_every": 1}),
        (CalibrationSettings, {"tokens_at_once": 0}),
        (CalibrationSettings, {"recalibration_rounds": -1}),
        (CalibrationSettings, {"exponents": ()}),
        (CalibrationSettings, {"exponents": 1.0}),
        (RefinementSettings, {"passes": 0}),
        (RefinementSettings, {"steps": 0}),
        (PlanningSettings, {"most_trials": 0}),
        (PlanningSettings, {"excluded_forms": "spatial"}),
        (PlanningSettings, {"excluded_forms": ("plain",)}),
    ],
)
def test_settings_with_which_nothing_can_be_done_are_refused(settings: Any, values: dict[str, Any]) -> None:
    [name] = values
    with pytest.raises(compressor.BadInput, match=f"`{name}` .*; give ") as caught:
        settings(**values)
    assert caught.value.option == name
