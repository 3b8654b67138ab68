"""What int8 and int4 of the same model lose is what they lose when they are asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from compressor import CalibrationSettings, Compression, compress


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 5)).eval()


INPUTS = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(64) % 5


def test_with_data_alone_it_is_that_of_rounding_to_nearest() -> None:
    compression = compress(network(), keep=0.7, prefer="size", data=(INPUTS, LABELS), calibration="none", bits=16)
    assert [(each.bits, each.method) for each in compression.uniform] == [
        (8, "round to nearest"),
        (4, "round to nearest"),
    ]
    for each in compression.uniform:
        alone = compress(network(), bits=each.bits, prefer="size", data=(INPUTS, LABELS), calibration="none")
        assert alone.evaluation is not None
        assert each.loss == pytest.approx(alone.evaluation.compressed_loss, abs=1e-12)
        assert each.value == alone.evaluation.compressed
        assert each.bytes == alone.bytes.after
        assert each.parameters == alone.plan.eligible_after


def test_the_relative_error_is_that_of_the_plainest_rounding(tmp_path: Path) -> None:
    dense = network()
    save_file(dense.state_dict(), tmp_path / "model.safetensors")
    compression = compress(tmp_path / "model.safetensors", keep=0.7, prefer="size", bits=16, dry_run=True)
    int8, int4 = compression.uniform
    assert int8.error is not None
    assert int4.error is not None
    errors = []
    for layer in (dense[0], dense[2], dense[4]):
        weight = layer.weight.detach().double()
        scales = weight.abs().amax(1, keepdim=True) / 127
        errors.append(float(((weight / scales).round() * scales - weight).norm() / weight.norm()))
    expected = (sum(error**2 for error in errors) / 3) ** 0.5
    assert int8.error == pytest.approx(expected, rel=0.1)
    assert int8.error < int4.error < 0.3
    assert int4.bytes < int8.bytes < compression.bytes.before
    assert int8.loss is int8.holdout_loss is None


def calibrated(**settings: bool) -> Compression:
    return compress(
        network(),
        keep=0.6,
        prefer="size",
        bits=16,
        calibration=(INPUTS, LABELS),
        calibration_settings=CalibrationSettings(refine=False, compensate=False, exponents=(1.0,), **settings),
    )


def test_with_calibration_it_is_the_loss_on_the_holdout() -> None:
    compression = calibrated()
    found = {(each.bits, each.method): each.holdout_loss for each in compression.uniform}
    assert len(found) == 4
    assert all(loss is not None and loss >= 0 for loss in found.values())
    assert found[8, "GPTQ"] < found[4, "GPTQ"]  # type: ignore[operator]
    assert found[4, "GPTQ"] < found[4, "round to nearest"]  # type: ignore[operator]
    assert compression.plan.calibration is not None
    assert compression.plan.calibration.holdout_loss > found[8, "GPTQ"]  # type: ignore[operator]
    better = compression.better_uniform
    assert better is not None
    assert better.uniform.bytes < compression.bytes.after
    assert compression.to_dict()["better_uniform"]["words"] == str(better)
    assert [each["bits"] for each in compression.to_dict()["uniform"]] == [8, 8, 4, 4]


def test_settings_leave_it_at_the_errors() -> None:
    compression = calibrated(uniform=False)
    assert [each.method for each in compression.uniform] == ["round to nearest"] * 2
    assert all(each.error is not None and each.holdout_loss is None for each in compression.uniform)
    assert not CalibrationSettings.of("fast").uniform
