"""A calibration in another process is the same one, and so are the plans and factors that follow from it."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from compressor.calibration import CalibrationSettings, calibrate, split_examples
from compressor.calibration.search import PlannedModel, PlanRequest, plan_unrefined
from compressor.calibration.sent_plans import CalibratedRequest
from compressor.calibration.shared import SharedCalibration
from compressor.calibration.weighted_layers import weighted_layers
from compressor.data import open_data
from compressor.engine import Fingerprint, Journal, Run
from compressor.measure.memory_window import EPSILON
from compressor.model import Model, inspect_layers, measured_layers, open_model
from compressor.planning import Budget, quantized_forms
from tests.calibration.test_drop import assert_same_plan
from tests.calibration.tiny_models import CPU, TWO_PASSES, inputs_for, transformer

NORMALIZED = """
from torch import nn

def build():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 24), nn.ReLU(), nn.Linear(24, 5),
    )
"""


def opened(name: str, folder: Path) -> Model:
    if name == "llama":
        save: Any = transformer(name)
        save.save_pretrained(folder)
        return open_model(folder)
    (folder / "normalized.py").write_text(NORMALIZED)
    namespace: dict[str, Any] = {}
    exec(NORMALIZED, namespace)
    torch.manual_seed(0)
    model: nn.Sequential = namespace["build"]()
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the statistics of the data
            nn.init.uniform_(module.weight, 0.5, 1.5)
    with torch.no_grad():
        model(images(500))
    save_file(model.state_dict(), folder / "model.safetensors")
    return open_model(folder / "model.safetensors", factory=f"{folder / 'normalized.py'}:build")


def images(count: int = 60) -> torch.Tensor:
    """Smooth images, so that their patches are correlated."""
    return nn.functional.interpolate(torch.randn(count, 3, 4, 4), size=8, mode="bilinear") + 0.5


def examples(name: str) -> list[Any]:
    torch.manual_seed(1)
    return [inputs_for("llama", 4) for _ in range(3)] if name == "llama" else [{"input": images()} for _ in range(8)]


def planning(
    name: str, folder: Path, settings: CalibrationSettings, *, widths: tuple[int, ...] = (16,)
) -> CalibratedRequest:
    subject, run = opened(name, folder), Run(CPU, seed=3)
    measured = [
        replace(m, quantized=quantized_forms(m.layer, widths))
        for m in measured_layers(subject, inspect_layers(subject, EPSILON, run))
    ]
    data = split_examples(open_data(examples(name)))
    calibration = calibrate(subject.streamed, [m.layer for m in measured], data, run=run, settings=settings)
    request = PlanRequest(budget=Budget("keep", 0.3), shard_size=10**9)
    return CalibratedRequest(subject, measured, request, calibration, weighted_layers(measured, calibration))


def elsewhere(asked: CalibratedRequest, journal: Journal) -> CalibratedRequest:
    """The same as another process has it."""
    sent = asked.subject.sent(), SharedCalibration.of(asked.calibration), asked.measured, asked.weighted, asked.request
    model, shared, measured, weighted, request = pickle.loads(pickle.dumps(sent))
    assert shared.is_seen
    subject = model.opened()
    assert subject is not asked.subject
    return CalibratedRequest(subject, measured, request, shared.opened(subject.streamed, journal), weighted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "effort", "widths"),
    [
        ("llama", "best", (16,)),
        ("normalized", "balanced", (16,)),
        ("normalized", "best", (16,)),
        ("normalized", "best", (4, 8)),
    ],
)
def test_what_another_process_plans_is_what_is_planned_here(
    name: str, effort: str, *, widths: tuple[int, ...], tmp_path: Path
) -> None:
    settings = replace(TWO_PASSES, refine=effort == "best", recalibration_rounds=int(effort == "best"))
    # Recalibrated in any case, whatever the loss.
    asked = planning(name, tmp_path, replace(settings, trust_factor=1.0), widths=widths)
    here = plan_unrefined(
        asked.subject, asked.measured, asked.request, calibration=asked.calibration, weighted=asked.weighted
    )
    journal = Journal.open(tmp_path / "there", Fingerprint(), option="work_dir")
    sent = pickle.loads(pickle.dumps(elsewhere(asked, journal).sent(journal)))
    journal.keep_only("found")
    assert len(list(tmp_path.glob("there/units/*"))) == len(sent.errors)
    found = asked.received(sent, journal)
    assert found is not None
    assert found.solution == here.solution
    assert found.warnings == here.warnings
    assert_same_plan(found, here)
    assert any(layer.bits < 16 for layer in here.plan.layers) == (16 not in widths)
    assert bool(here.statistics) == (name == "normalized")
    if here.refine is None:
        assert found.refine is None
        return
    assert found.refine is not None
    refined: tuple[PlannedModel, PlannedModel] = found.refine(), here.refine()
    assert_same_plan(*refined)
    journal.go_with_object()
    del found, refined
    assert (tmp_path / "there").exists()
    del journal
    assert not (tmp_path / "there").exists()


@pytest.mark.slow
def test_a_process_that_misses_a_file_of_the_run_does_not_see_it_and_factors_are_not_taken_for_granted(
    tmp_path: Path,
) -> None:
    asked = planning("normalized", tmp_path, replace(TWO_PASSES, refine=False, recalibration_rounds=0))
    shared = SharedCalibration.of(asked.calibration)
    name = min(shared.moments.names)
    assert shared.is_seen
    hidden = shared.moments.path(name).rename(tmp_path / "hidden")
    assert not shared.is_seen
    hidden.rename(shared.moments.path(name))
    there = Journal.open(tmp_path / "there", Fingerprint(), option="work_dir")
    sent = elsewhere(asked, there).sent(there)
    assert asked.received(sent, there) is not None
    assert asked.received(sent, Journal.open(tmp_path / "other", Fingerprint(), option="work_dir")) is None
