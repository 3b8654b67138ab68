"""Statistics of batch normalization move as their inputs do, only where that helps, and are written as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor import CalibrationSettings, compress
from compressor.calibration import Calibration, Compensated, compensate
from compressor.calibration.calibration import with_layers
from compressor.calibration.examples import Part
from tests.calibration.tiny_models import calibrated, eligible, planned

pytestmark = pytest.mark.slow


def build() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(inplace=True),
        nn.Conv2d(12, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(256, 24, bias=False), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 5),
    )  # fmt: skip


def images(count: int, shift: float = 0.0) -> Tensor:
    """Smooth images, so that their patches are correlated, and of a mean that is not zero."""
    return nn.functional.interpolate(torch.randn(count, 3, 4, 4), size=8, mode="bilinear") + 0.5 + shift


@pytest.fixture(scope="module")
def network() -> nn.Sequential:
    """A network whose statistics are those of its data."""
    torch.manual_seed(0)
    model = build()
    for module in model:
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = None
            nn.init.uniform_(module.weight, 0.5, 1.5)
    with torch.no_grad():
        model(images(500))
    return model.eval()


def calibrations(network: nn.Sequential, shift: float = 0.0) -> Calibration:
    torch.manual_seed(1)
    fit, holdout = ([{"inputs": images(60, s)} for _ in range(3)] for s in (0.0, shift))
    return calibrated(network, fit, holdout)


@torch.no_grad()
def inputs_of(calibration: Calibration, solution: Compensated | None, place: str, *, part: Part) -> Tensor:
    """What a batch normalization is given, as one row for every position."""
    seen: list[Tensor] = []
    modules = {} if solution is None else {p: m for p, m in solution.modules.items() if p != place}
    with with_layers(calibration.model, modules) as model:
        handle = model.get_submodule(place).register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
        for chunk in calibration.data.chunks(part):
            model(*calibration.data.read(chunk).inputs.values())
        handle.remove()
    return torch.cat([x.movedim(1, -1).flatten(0, -2) for x in seen])


def normalized(x: Tensor, statistics: tuple[Tensor, Tensor], module: nn.BatchNorm2d) -> Tensor:
    mean, variance = statistics
    return (x - mean.double()) / (variance.double() + module.eps).sqrt() * module.weight.double()


@torch.no_grad()
@pytest.mark.parametrize("shift", [0.0, -2.0])
def test_statistics_move_by_as_much_as_their_inputs_exactly_where_that_helps_on_holdout_data(
    network: nn.Sequential, shift: float
) -> None:
    calibration = calibrations(network, shift)
    plans = [planned(layer, max(1, min(layer.shape) // 4)) for layer in calibration.layers.values()]
    solution = compensate(calibration, plans)
    moved = []
    for place in ("1", "4", "8"):
        dense = network.get_submodule(place)
        x, y = (inputs_of(calibration, each, place, part="fit") for each in (None, solution))
        mean = dense.running_mean + y.mean(0) - x.mean(0)
        variance = dense.running_var * y.var(0, correction=0) / x.var(0, correction=0)
        x, y = (inputs_of(calibration, each, place, part="holdout") for each in (None, solution))
        candidates = [(dense.running_mean, dense.running_var), (mean, dense.running_var), (mean, variance)]
        wanted = normalized(x, candidates[0], dense)
        errors = [float((normalized(y, each, dense) - wanted).square().sum()) for each in candidates]
        best = min(range(3), key=errors.__getitem__)
        moved.append(best > 0)
        assert moved[-1] == (place in solution.modules)
        if not moved[-1]:
            assert f"{place}.running_mean" not in solution.statistics
            continue
        for name, expected in zip(("running_mean", "running_var"), candidates[best], strict=True):
            found = solution.statistics[f"{place}.{name}"].double()
            torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-6)
    assert any(moved) if shift == 0 else not all(moved)


def test_statistics_stay_where_nothing_before_them_changed(network: nn.Sequential) -> None:
    calibration = calibrations(network)
    last = eligible(network)[-1]
    assert compensate(calibration, [planned(last, 2)]).statistics == {}
    nothing = compensate(calibration, [planned(layer, None) for layer in calibration.layers.values()])
    assert (nothing.statistics, nothing.modules) == ({}, {})


def test_a_channel_that_is_constant_keeps_its_variance(network: nn.Sequential) -> None:
    model = build().eval()
    model.load_state_dict(network.state_dict())
    with torch.no_grad():
        model[3].weight[5] = 0
    calibration = calibrations(model)
    plans = [planned(layer, 3) for layer in calibration.layers.values()]
    solution = compensate(calibration, plans)
    assert "4.running_var" in solution.statistics
    assert float(solution.statistics["4.running_var"][5]) == float(model[4].running_var[5])
    assert all(torch.isfinite(each).all() for each in solution.statistics.values())


def test_a_file_holds_the_moved_statistics_and_loads_to_what_is_in_memory(
    network: nn.Sequential, tmp_path: Path
) -> None:
    torch.manual_seed(2)  # of a draw on which compensation is chosen
    batches = [images(40) for _ in range(6)]
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    settings = CalibrationSettings(refine=False)
    in_memory = compress(
        network, keep=0.2, calibration=batches, calibration_settings=settings, prefer="size", bits=16
    ).model
    report = compress(
        tmp_path / "model.safetensors",
        factory=build,
        keep=0.2,
        calibration=batches,
        calibration_settings=settings,
        prefer="size",
        bits=16,
    )
    assert in_memory is not None
    written, expected = load_file(str(report.output)), in_memory.state_dict()
    moved = [name for name in expected if name.endswith(("running_mean", "running_var"))]
    assert any(not torch.equal(written[name], network.state_dict()[name]) for name in moved)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_a_folder_holds_the_moved_statistics_and_loads_to_what_is_in_memory(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=4
    )  # fmt: skip
    model = transformers.ResNetForImageClassification(config)
    with torch.no_grad():
        for _ in range(20):
            model.train()(nn.functional.interpolate(images(32), size=32))
    model.eval().save_pretrained(tmp_path / "model")
    batches = [{"pixel_values": nn.functional.interpolate(images(16), size=32)} for _ in range(4)]
    in_memory = compress(model, keep=0.3, calibration=batches, effort="balanced", prefer="size", bits=16).model
    report = compress(
        tmp_path / "model",
        output=tmp_path / "small",
        keep=0.3,
        calibration=batches,
        effort="balanced",
        prefer="size",
        bits=16,
    )
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "small")
    assert report.output == str(tmp_path / "small")
    assert in_memory is not None
    expected, dense = in_memory.state_dict(), model.state_dict()
    assert any("running" in n and not torch.equal(t, dense[n]) for n, t in loaded.state_dict().items())
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    with torch.no_grad():
        one, other = (each.eval()(**batches[0]).logits for each in (loaded, in_memory))
    assert torch.equal(one, other)
