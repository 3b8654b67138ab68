"""The steps that `compress` announces, against those that it goes through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from compressor import Plan, compress, plan
from compressor.api.workload import (
    CalibrationWork,
    CompressionWork,
    EvaluationWork,
    ForwardTime,
    QuantizationWork,
    Workers,
    first_run,
    work_on_calibration,
    work_on_quantization,
)
from compressor.calibration import CalibrationData, CalibrationSettings
from compressor.calibration.settings import EndToEndSettings
from compressor.engine import InProcess, ProcessPool, Run, processors
from compressor.model import open_model
from compressor.planning import PlanningSettings
from tests.api.followed import Followed
from tests.calibration.tiny_models import CPU, TWO_PASSES, batch_of, eligible, inputs_for, transformer

pytestmark = pytest.mark.slow


def model(width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(3)]
    return nn.Sequential(nn.Linear(8, width), nn.Sequential(*blocks), nn.Linear(width, 5))


def calibrated() -> dict[str, Any]:
    return {"calibration": batches(), "calibration_settings": replace(TWO_PASSES, uniform=True), "bits": 16}


def batches() -> list[Tensor]:
    return list(torch.randn(12, 4, 8, generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=generator.normal(size=(40, 8)).astype("f4"), y=np.arange(40) % 5)
    return tmp_path / "data.npz"


COMMANDS: dict[str, Callable[[Path, Followed], Any]] = {
    "weights alone": lambda _, seen: compress(model(), keep=0.5, progress=seen, prefer="size"),
    "evaluated": lambda data, seen: compress(model(), keep=0.5, data=data, progress=seen, prefer="size"),
    "calibrated": lambda _, seen: compress(model(), keep=0.5, **calibrated(), progress=seen, prefer="size"),
    "not refined": lambda data, seen: compress(
        model(), keep=0.5, data=data, calibration=batches(), effort="balanced", progress=seen, prefer="size", bits=16
    ),
    "within a drop": lambda data, seen: compress(model(), max_drop=0.5, data=data, progress=seen, prefer="size"),
    "within a drop, calibrated": lambda data, seen: compress(
        model(), max_drop=0.5, data=data, **calibrated(), progress=seen, prefer="size"
    ),
    "quantized": lambda _, seen: compress(
        model(32), keep=0.3, **{**calibrated(), "bits": "8,4"}, progress=seen, prefer="size"
    ),
    "planned": lambda _, seen: plan(model(), keep=0.5, **calibrated(), progress=seen, prefer="size"),
    "a given plan": lambda _, seen: compress(
        model(),
        plan=_given(),
        calibration=batches(),
        calibration_settings=replace(TWO_PASSES, uniform=True),
        progress=seen,
    ),
}


def _given() -> Plan:
    return plan(model(), keep=0.5, prefer="size")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_step_was_announced_and_those_that_are_certain_come(command: str, data: Path) -> None:
    seen = Followed()
    COMMANDS[command](data, seen)
    seen.require_all_announced()


def test_a_progress_that_takes_no_steps_costs_no_measurement() -> None:
    def forwards(progress: Any) -> int:
        subject, calls = model(), []
        subject.register_forward_pre_hook(lambda *_: calls.append(1))
        compress(subject, keep=0.5, calibration=batches(), effort="balanced", progress=progress, prefer="size", bits=16)
        return len(calls)

    without, quiet, watched = (forwards(progress) for progress in (None, lambda *_: None, Followed()))
    assert without == quiet < watched


def test_the_measurement_changes_nothing_of_the_result() -> None:
    subject, random = model(), torch.random.get_rng_state()
    plain, watched = (
        compress(subject, keep=0.5, **calibrated(), progress=progress, prefer="size").model
        for progress in (None, Followed())
    )
    assert plain is not None
    assert watched is not None
    torch.testing.assert_close(watched.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert not any(module._forward_pre_hooks for module in subject.modules())


@given(
    fixed=st.floats(1e-4, 1),
    each=st.floats(1e-5, 1),
    size=st.integers(2, 64),
    examples=st.integers(1, 1000),
    segments=st.integers(1, 40),
)
def test_small_batches_and_many_segments_cost_more(
    fixed: float, each: float, size: int, *, examples: int, segments: int
) -> None:
    forward = ForwardTime(fixed + each, fixed + size * each, size)
    whole = forward.of(examples)
    assert whole >= examples * each * (1 - 1e-6)
    in_segments = forward.of_segments(examples, segments=segments)
    assert in_segments >= whole * (1 - 1e-9)
    assert forward.of_segments(examples, 1, segments=segments) >= in_segments * (1 - 1e-6)
    assert forward.of(0) == 0


def work(workers: Workers, settings: CalibrationSettings | None = None) -> CalibrationWork:
    """That of a calibration on 64 examples of a second each, four at a time, with 16 for the holdout."""
    return CalibrationWork(
        fit=64, holdout=16, forward=ForwardTime(1.0, 4.0, 4), groups=4, segments=5, optimizing=0.1,
        products=0.5, in_metric=2.0, settings=settings or CalibrationSettings(), workers=workers,
    )  # fmt: skip


def test_what_is_quantized_takes_as_long_as_it_is_asked_for() -> None:
    settings = CalibrationSettings(exponents=(1.0, 0.0), truncation_penalties=(1.0, 2.0), recalibration_rounds=0)
    one, plain = QuantizationWork(errors=100.0, one_pass=10.0, in_rounds=1.0, forming=0.0), work(Workers(), settings)
    allocate, *compensate = replace(plain, quantization=one).planning_steps(2.0, given=False)
    before, compensate_before = plain.planning_steps(2.0, given=False)
    # By two exponents; the second penalty, bits alone, one width; and ranks alone by two exponents.
    judged = 16 * (1 + 1 / 5)
    assert allocate.cost == pytest.approx(before.cost + 100 + 7 * 10 + 5 * judged)
    assert [step.certain for step in compensate] == [True, False, False, False]
    assert compensate[0].cost == pytest.approx(compensate_before.cost + 2 * 1)
    # Of a given plan there is one allocation, and workers divide what is quantized.
    alone, divided = (
        replace(plain, quantization=one, workers=Workers(count)).planning_steps(0.0, given=True)[0] for count in (1, 4)
    )
    assert alone.cost == pytest.approx(100 + 10 + judged)
    assert divided.cost == pytest.approx((100 + 10) / 4 + judged)


def test_texts_that_a_model_writes_are_written_and_fitted_to() -> None:
    quantization = QuantizationWork(errors=0.0, one_pass=0.0, in_rounds=0.0, forming=3.0)
    settings = CalibrationSettings(refit_every=1)
    plain = replace(work(Workers(), settings), forward=ForwardTime(2.0, 5.0, 4), quantization=quantization)
    writing = replace(plain, written=640, tokens=10)
    before, steps = (each.refinement_steps(alone=False) for each in (plain, writing))
    assert [step.name for step in before] == ["refine"] * 4
    assert [step.name for step in steps] == ["generate", *["refine end to end"] * 2, "refine", "refine"]
    assert steps[1] == steps[2]
    assert [step.name for step in writing.refinement_steps(alone=True)] == ["generate", "refine end to end", "refine"]
    assert not any(step.certain for step in steps)
    assert steps[-1].costs == before[-1].costs
    generate, fit = steps[:2]
    # A second for a forward, and one for each text; 32 are written at a time, and 704 // 64 fitted to.
    assert generate.costs == pytest.approx([10 + 32] * 20)
    judged = 16 + 16 / 4 + 3.0 / 3 * 16 / 4
    batches = 704 / 11
    one_pass = 4 * batches * (5 + 11) + batches * (0.1 + 4.0) + judged
    assert fit.costs == pytest.approx([704 / 4 * (5 + 4) + judged, one_pass, one_pass])
    assert len(writing.refinement_steps(alone=True)) == 3
    unquantized = replace(writing, quantization=None).refinement_steps(alone=False)
    assert [(step.name, step.certain) for step in unquantized] == [("refine", True)]


@pytest.mark.parametrize(("name", "most", "texts"), [("llama", 2**27, 40), ("llama", 1, 0), ("bert", 2**27, 0)])
def test_texts_are_counted_before_anything_is_calibrated(name: str, most: int, texts: int) -> None:
    subject, batch = transformer(name).eval(), batch_of(inputs_for(name, 4))
    data, layers = CalibrationData((batch,), (batch,), labeled=False), eligible(subject)
    settings = CalibrationSettings(refit_every=1, end_to_end=EndToEndSettings(most_weights=most))
    first = first_run(subject, layers, data, device=CPU)
    assert first is not None
    found = work_on_calibration(subject, layers, data, first=first, run=Run(CPU), settings=settings)
    assert found is not None
    assert (found.written, found.tokens) == (texts, 8)


def test_layers_without_quantized_forms_are_not_timed() -> None:
    subject = open_model(model())
    asked = partial(work_on_quantization, subject.checkpoint, subject.layers, device=torch.device("cpu"), settings=None)
    assert asked({}) is None
    found = asked({layer.name: ("dense@8",) for layer in subject.layers})
    assert found is not None
    assert min(found.errors, found.one_pass, found.in_rounds, found.forming) > 0


def test_layers_are_divided_among_workers() -> None:
    alone, four = (
        CompressionWork((8.0, 4.0), workers=Workers(count)).steps(given=False, writes=True) for count in (1, 4)
    )
    assert [step.name for step in alone] == [step.name for step in four] == ["measure", "factorize"]
    assert four[0].costs == (2.0, 1.0)
    assert four[1].cost == alone[1].cost / 4


@pytest.mark.parametrize(("count", "rounds"), [(2, 4), (3, 3), (8, 1), (20, 1)])
def test_slices_of_the_examples_are_taken_by_workers_one_after_the_other(count: int, rounds: int) -> None:
    slow = ForwardTime(2.0, 8.0, 4)  # in one thread
    alone, sliced = work(Workers()).calibration_steps(), work(Workers(count, slow)).calibration_steps()
    assert [step.name for step in alone] == [step.name for step in sliced] == ["run", "calibrate"]
    here = 16 + 3 * 4.0
    there = 2 * (sum(step.cost for step in alone) - here) + 8 * 8.0  # and each slice runs a batch for the segments
    assert sliced[0].cost == pytest.approx(here + there / 8 * rounds)
    assert sliced[1].cost == 0
    # Workers that cannot open the model, and one batch, leave them here.
    assert work(Workers(count)).calibration_steps() == alone
    assert (
        replace(work(Workers(count, slow)), fit=4).calibration_steps()
        == replace(work(Workers()), fit=4).calibration_steps()
    )


def test_sizes_that_workers_plan_are_one_step_each_and_refinements_are_not_divided() -> None:
    searching = CompressionWork(
        (8.0, 4.0),
        work(Workers()),
        EvaluationWork(10, ForwardTime(1.0, 4.0, 4)),
        search=PlanningSettings(most_trials=4),
    )
    alone, four = (replace(searching, at_once=count).steps(given=False, writes=False) for count in (1, 4))
    names = [step.name for step in four if step.name not in ("measure", "run", "calibrate")]
    assert names == ["search"] * 8 + ["refine", "search"] * 3
    planned, refined = [step.cost for step in four if step.name == "search"][::10]
    assert refined == 10
    first = alone[: next(place for place, step in enumerate(alone) if step.name == "search") + 1]
    whole = sum(step.cost for step in first) - sum(step.cost for step in four[:3])
    assert planned == pytest.approx(whole / 4)


def test_workers_are_those_of_the_engine_and_no_more_than_processors() -> None:
    assert Workers.of(Run(torch.device("cpu"), engine=InProcess(4))) == Workers()
    assert Workers.of(Run(torch.device("cpu"), engine=ProcessPool(10_000))) == Workers(processors())
    assert Workers.of(Run(torch.device("cuda"), engine=ProcessPool(4))) == Workers(4)
    torch.set_num_threads(2)
    try:
        with Workers(3).timing():
            assert torch.get_num_threads() == 1
        with Workers().timing():
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
