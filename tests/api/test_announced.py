"""The steps that `diagnose`, `merge`, and fine-tunes announce, against those that they go through."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from compressor import BadInput, CalibrationSettings, TrainingRecipe, compress, diagnose, merge
from compressor.api.announced import comparison_seconds
from compressor.model import open_model
from tests.adapters.adapters_of import kohya_file
from tests.api.followed import Followed

pytestmark = pytest.mark.slow

ONE_PASS = CalibrationSettings(compensate=False, refine=False, recalibration_rounds=0)
ARCHITECTURE = """
from torch import nn

def net():
    return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 5))
"""


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 5))


def normalized() -> nn.Sequential:
    """A network with a layer whose scale does nothing."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 24, bias=False), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 5))


@torch.no_grad()
def tuned(base: nn.Module, *, seed: int = 1) -> nn.Module:
    """A copy that was moved in all layers but the last."""
    torch.manual_seed(seed)
    module = copy.deepcopy(base)
    for each in [each for each in module.modules() if isinstance(each, nn.Linear)][:-1]:
        each.weight.add_(0.3 * torch.randn(each.weight.shape))
    return module


def save(module: nn.Module, path: Path) -> Path:
    save_file(module.state_dict(), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Networks, what they are built by, checkpoints of one run, two adapters, and data."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(40, 8)).astype("f4")
    np.savez(tmp_path / "data.npz", x=x, y=np.arange(40) % 5)
    many = generator.normal(size=(400, 8)).astype("f4")
    with torch.no_grad():
        np.savez(tmp_path / "own.npz", x=many, y=tuned(net())(torch.from_numpy(many)).argmax(1))
    (tmp_path / "nets.py").write_text(ARCHITECTURE)
    for name, module in (("base", net()), ("a", tuned(net())), ("b", tuned(net(), seed=2))):
        save(module, tmp_path / f"{name}.safetensors")
    (tmp_path / "run").mkdir()
    for step in (10, 20, 30):
        save(net(step), tmp_path / "run" / f"step-{step}.safetensors")
    for name in ("one", "two"):
        kohya_file(tmp_path / f"{name}.safetensors")
    return tmp_path


def _merge(folder: Path, seen: Followed, *names: str, **asked: Any) -> Any:
    models = [folder / f"{name}.safetensors" for name in names or ("a", "b")]
    return merge(models, output=folder / "out.safetensors", progress=seen, **asked)


def _tuned_file(folder: Path, seen: Followed, **asked: Any) -> Any:
    return compress(
        folder / "a.safetensors",
        base=folder / "base.safetensors",
        output=folder / "out.safetensors",
        progress=seen,
        **asked,
    )


def _with_data(folder: Path) -> dict[str, Any]:
    return {"data": [folder / "data.npz"] * 2, "factory": f"{folder / 'nets.py'}:net"}


RECIPE = TrainingRecipe(optimizer="sgd", learning_rate=0.1, weight_decay=0.1, batch_size=16, steps=100)

COMMANDS: dict[str, Callable[[Path, Followed], Any]] = {
    "diagnosed by weights": lambda _, seen: diagnose(net(), progress=seen),
    "diagnosed on data": lambda folder, seen: diagnose(net(), data=folder / "data.npz", progress=seen),
    "diagnosed with invariant layers": lambda folder, seen: diagnose(
        normalized(), data=folder / "data.npz", recipe=RECIPE, progress=seen
    ),
    "diagnosed with a series": lambda folder, seen: diagnose(net(), series=folder / "run", progress=seen),
    "added": lambda folder, seen: _merge(folder, seen, mode="sum"),
    "added to a base": lambda folder, seen: _merge(folder, seen, mode="sum", base=folder / "base.safetensors"),
    "added and measured": lambda folder, seen: _merge(folder, seen, mode="sum", **_with_data(folder)),
    "side by side": lambda folder, seen: _merge(folder, seen, mode="concat", **_with_data(folder)),
    "adapters added": lambda folder, seen: _merge(folder, seen, "one", "two"),
    "adapters added and truncated": lambda folder, seen: _merge(folder, seen, "one", "two", keep=0.5),
    "an adapter resized": lambda folder, seen: compress(
        folder / "one.safetensors", output=folder / "out.safetensors", energy=0.9, progress=seen
    ),
    "an adapter planned": lambda folder, seen: compress(
        folder / "one.safetensors", dry_run=True, rank=4, progress=seen
    ),
    "a fine-tune": lambda folder, seen: _tuned_file(folder, seen, keep=0.3),
    "a fine-tune quantized": lambda folder, seen: _tuned_file(folder, seen, keep=0.2, bits=4),
    "a fine-tune measured": lambda folder, seen: _tuned_file(
        folder, seen, keep=0.3, data=folder / "data.npz", factory=f"{folder / 'nets.py'}:net"
    ),
    "a fine-tune that is not written": lambda folder, seen: _tuned_file(folder, seen, keep=0.3, dry_run=True),
    "a module tuned": lambda _, seen: compress(tuned(net()), base=net(), keep=0.3, progress=seen),
    "a module tuned, calibrated": lambda folder, seen: compress(
        tuned(net()),
        base=net(),
        keep=0.3,
        calibration=folder / "data.npz",
        calibration_settings=ONE_PASS,
        progress=seen,
    ),
    "a module tuned, within a drop": lambda folder, seen: compress(
        tuned(net()), base=net(), max_drop=0.45, data=folder / "own.npz", allow_miss=True, progress=seen
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_step_was_announced_and_those_that_are_certain_come(command: str, folder: Path) -> None:
    seen = Followed()
    COMMANDS[command](folder, seen)
    seen.require_all_announced()


def names(command: str, folder: Path) -> list[str]:
    seen = Followed()
    COMMANDS[command](folder, seen)
    return [step.name for step in seen.steps]


def test_what_is_written_after_it_was_measured_is_found_twice(folder: Path) -> None:
    assert names("a fine-tune", folder) == ["compare", "measure", "factorize"]
    (folder / "out.safetensors").unlink()
    assert names("a fine-tune measured", folder) == ["compare", "measure", "factorize", "evaluate", "factorize"]
    assert names("a fine-tune that is not written", folder) == ["compare", "measure"]
    assert names("a module tuned", folder) == ["compare", "measure", "factorize"]


def test_gradient_noise_may_be_left_out_where_no_layer_is_invariant(folder: Path) -> None:
    for module, left_out in ((net(), ["gradient noise"]), (normalized(), [])):
        seen = Followed()
        diagnose(module, data=folder / "data.npz", recipe=RECIPE, progress=seen)
        assert [step.name for step in seen.left_out] == left_out


def test_a_series_costs_as_much_for_each_checkpoint_as_the_model(folder: Path) -> None:
    seen = Followed()
    diagnose(net(), series=folder / "run", progress=seen)
    series, measure = seen.steps
    assert series.costs == measure.costs * 3


def test_tensors_of_another_network_are_not_timed_and_refused_as_before(folder: Path) -> None:
    other = save(nn.Sequential(nn.Linear(3, 4)), folder / "other.safetensors")
    base, model = (open_model(path) for path in (other, folder / "a.safetensors"))
    assert comparison_seconds(model, base, to_all=False) == tuple(
        float(info.elements) for info in model.checkpoint.tensors.values()
    )
    with pytest.raises(BadInput, match="lacks"):
        compress(folder / "a.safetensors", base=other, keep=0.5, progress=Followed())
    with torch.no_grad():
        broken = net()
        broken[2].weight[0, 0] = torch.nan
    with pytest.raises(BadInput, match=r"2\.weight"):
        compress(broken, base=net(), keep=0.5, progress=Followed())


def test_a_progress_that_takes_no_steps_costs_no_measurement(folder: Path) -> None:
    def forwards(progress: Any) -> int:
        subject, calls = net(), []
        subject.register_forward_pre_hook(lambda *_: calls.append(1))
        diagnose(subject, data=folder / "data.npz", progress=progress)
        return len(calls)

    without, quiet, watched = (forwards(progress) for progress in (None, lambda *_: None, Followed()))
    assert without == quiet < watched
