"""Settings: each says what it is, and each is used."""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

import compressor
from compressor import CalibrationSettings, PlanningSettings, TimingSettings
from compressor.calibration import RefinementSettings, split_examples
from compressor.choices import Effort
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


def steps(**options: Any) -> list[tuple[str, int]]:
    """The steps of a compression, each with its number of parts."""
    seen: list[tuple[str, int]] = []

    def note(name: str, done: int, total: int) -> None:
        if done == total:
            seen.append((name, total))

    compressor.compress(model(), keep=0.4, calibration=batches(), progress=note, prefer="size", bits=16, **options)
    return seen


def names(settings: CalibrationSettings) -> list[str]:
    return [name for name, _ in steps(calibration_settings=settings)]


@pytest.mark.slow
def test_parts_of_the_search_are_switched_off() -> None:
    trusting = CalibrationSettings(trust_factor=1e9)
    assert names(trusting) == ["measure", "run", "calibrate", "allocate", "compensate", "refine", "factorize"]
    again = ["run", "calibrate", "allocate"]  # at the model that is compressed half as far, before anything is refitted
    distrusting = names(replace(trusting, trust_factor=1.0))
    assert distrusting == ["measure", "run", "calibrate", "allocate", *again, "compensate", "refine", "factorize"]
    unrefined = replace(trusting, refine=False)
    assert "refine" not in names(unrefined)
    assert "compensate" not in names(replace(unrefined, compensate=False))
    one_exponent = steps(calibration_settings=replace(unrefined, exponents=(1.0,)))
    assert [total for name, total in one_exponent if name == "allocate"] == [1]


def test_each_effort_adds_parts_to_the_one_below() -> None:
    fast, balanced, best = (CalibrationSettings.of(effort) for effort in get_args(Effort))
    assert best == CalibrationSettings()
    parts = [
        (set(each.exponents), each.window_caps, each.compensate, each.recalibration_rounds > 0, each.refine)
        for each in (fast, balanced, best)
    ]
    assert [len(exponents) for exponents, *_ in parts] == [1, 3, 3]
    for (fewer, *off), (more, *on) in pairwise(parts):
        assert fewer <= more
        assert off <= on
        assert off != on
        assert all(there or not before for before, there in zip(off, on, strict=True))


@pytest.mark.slow
def test_an_effort_runs_its_parts() -> None:
    fast, balanced = dict(steps(effort="fast")), dict(steps(effort="balanced"))
    assert list(fast) == ["measure", "run", "calibrate", "allocate", "factorize"]
    assert list(balanced) == ["measure", "run", "calibrate", "allocate", "compensate", "factorize"]
    assert (fast["allocate"], balanced["allocate"]) == (1, 3)
    assert steps(effort="best") == steps()
    assert "refine" in dict(steps())


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_a_round_of_recalibration_is_run_where_the_estimate_is_not_trusted(rounds: int) -> None:
    found = names(CalibrationSettings(trust_factor=1.0, recalibration_rounds=rounds, refine=False))
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
        compressor.compress(model(), planning_settings=PlanningSettings(safe_tolerance=0.01), prefer="size")


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
        (CalibrationSettings, {"kept_weights": -1}),
        (CalibrationSettings, {"recalibration_rounds": -1}),
        (CalibrationSettings, {"exponents": ()}),
        (CalibrationSettings, {"truncation_penalties": ()}),
        (CalibrationSettings, {"truncation_penalties": (0.5,)}),
        (CalibrationSettings, {"exponents": 1.0}),
        (RefinementSettings, {"passes": 0}),
        (RefinementSettings, {"steps": 0}),
        (PlanningSettings, {"most_trials": 0}),
        (PlanningSettings, {"most_refined": 0}),
        (PlanningSettings, {"excluded_forms": "spatial"}),
        (PlanningSettings, {"excluded_forms": ("plain",)}),
    ],
)
def test_settings_with_which_nothing_can_be_done_are_refused(settings: Any, values: dict[str, Any]) -> None:
    [name] = values
    with pytest.raises(compressor.BadInput, match=f"`{name}` .*; give ") as caught:
        settings(**values)
    assert caught.value.option == name


def test_moments_depend_on_which_examples_are_run_backward_and_not_on_the_search() -> None:
    best = CalibrationSettings()
    assert replace(best, gradient_every=2).of_moments != best.of_moments
    assert replace(best, most_classes=10).of_moments != best.of_moments
    assert CalibrationSettings.of("balanced").of_moments == best.of_moments


def test_long_texts_are_run_backward_and_refitted_to_in_part() -> None:
    best = CalibrationSettings(most_tokens=1000)
    assert best.on(0) == best.on(1000) == best
    assert (best.on(1001).gradient_every, best.on(1001).refit_every) == (2, 2)
    assert best.on(2001).gradient_every == 3
    assert replace(best, gradient_every=4).on(2001) == replace(best, gradient_every=4, refit_every=3)
