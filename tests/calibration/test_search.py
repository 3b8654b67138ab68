"""Compression with calibration data: what it promises over compression without, on models trained here."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from compressor import BadInput, compress, plan, restore
from compressor.calibration import (
    CalibrationSettings,
    calibrate,
    compensate,
    holdout_loss,
    split_examples,
    uncompensated,
)
from compressor.data import open_data
from compressor.data.builtin_data import digits
from compressor.engine import Run
from compressor.io import open_checkpoint
from compressor.network import find_layers, module_architecture
from tests.calibration.tiny_models import TWO_PASSES, trained_on_digits

pytestmark = pytest.mark.slow


def build() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 96), nn.ReLU(), nn.Linear(96, 10),
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    return trained_on_digits(build())


def batches() -> list[tuple[Tensor, Tensor]]:
    images, labels = digits("train")
    return list(zip(images[:256].split(32), labels[:256].split(32), strict=True))


@torch.no_grad()
def divergence(dense: nn.Module, compressed: nn.Module | None) -> float:
    assert compressed is not None
    images, _ = digits("test")
    before, after = (model(images).double().log_softmax(-1) for model in (dense, compressed))
    return float(nn.functional.kl_div(after, before, log_target=True, reduction="batchmean"))


@pytest.mark.parametrize("keep", [0.6, 0.4, 0.25])
def test_it_loses_at_most_half_of_what_plain_truncation_loses_at_the_same_size(trained: nn.Module, keep: float) -> None:
    plain, calibrated = (
        compress(trained, keep=keep, prefer="size"),
        compress(trained, keep=keep, calibration=batches(), prefer="size", bits=16),
    )
    assert calibrated.plan.eligible_after <= keep * calibrated.plan.eligible_before
    assert divergence(trained, calibrated.model) <= divergence(trained, plain.model) / 2


@pytest.mark.parametrize("keep", [0.12, 0.07])
def test_compensation_loses_less_on_holdout_data_and_is_kept_only_there(trained: nn.Module, keep: float) -> None:
    # Of so few examples it takes all.
    settings, run = replace(CalibrationSettings.of("balanced"), refit_every=1), Run(torch.device("cpu"))
    chosen = plan(trained, keep=keep, calibration=batches(), calibration_settings=settings, prefer="size", bits=16)
    layers = [layer for layer in find_layers(open_checkpoint(trained), module_architecture(trained)) if layer.eligible]
    calibration = calibrate(trained, layers, split_examples(open_data(batches())), run=run, settings=settings)
    refitted, truncated = (
        holdout_loss(calibration, each(calibration, chosen.layers).modules) for each in (compensate, uncompensated)
    )
    assert refitted < 0.8 * truncated
    assert chosen.calibration is not None
    assert chosen.calibration.holdout_loss == pytest.approx(min(refitted, truncated))


def test_the_dense_model_is_left_as_it_was(trained: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    trained.train()
    compress(trained, keep=0.5, calibration=batches(), calibration_settings=TWO_PASSES, prefer="size", bits=16)
    assert trained.training
    assert all(parameter.requires_grad for parameter in trained.parameters())
    assert not any(module._forward_hooks for module in trained.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())


def test_the_same_seed_gives_the_same_bytes(trained: nn.Module, tmp_path: Path) -> None:
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    written = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        report = compress(
            tmp_path / "model.safetensors", output=tmp_path / f"{name}.safetensors", factory=build, keep=0.4,
            calibration="builtin:digits", calibration_samples=64, calibration_settings=TWO_PASSES, seed=seed, bits=16,
        )  # fmt: skip
        written.append(Path(str(report.output)).read_bytes())
    assert written[0] == written[1] != written[2]


def test_a_file_is_compressed_as_the_module_is_and_restores(trained: nn.Module, tmp_path: Path) -> None:
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    asked: Any = {"keep": 0.4, "bits": 16, "calibration": batches(), "calibration_settings": TWO_PASSES}
    in_memory = compress(trained, **asked, prefer="size").model
    report = compress(tmp_path / "model.safetensors", factory=build, **asked)
    restore(str(report.output), output=tmp_path / "back.safetensors")
    dense = build()
    dense.load_state_dict(load_file(tmp_path / "back.safetensors"), strict=True)
    images, _ = digits("test")
    assert in_memory is not None
    torch.testing.assert_close(dense(images), in_memory(images), rtol=1e-3, atol=1e-3)


def test_what_was_predicted_and_measured_is_said(trained: nn.Module) -> None:
    asked: Any = {"bits": 16, "calibration": batches(), "calibration_samples": 256, "calibration_settings": TWO_PASSES}
    chosen = plan(trained, keep=0.5, **asked, prefer="size")
    found = chosen.calibration
    assert found is not None
    assert (found.examples, found.holdout) == (192, 64)
    assert 0 < found.predicted_loss < 1
    assert 0 < found.holdout_loss < 1
    assert found.exponent in (0.0, 0.5, 1.0)
    document = json.loads(json.dumps(chosen.to_dict()))
    assert document["calibration"]["holdout_loss"] == found.holdout_loss
    assert plan(trained, keep=0.5, prefer="size").to_dict()["calibration"] is None


def test_a_layer_that_no_example_reaches_stays_dense() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.head = nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.used(x)))

    torch.manual_seed(0)
    data = [torch.randn(8, 20) for _ in range(4)]
    report = compress(Branching(), keep=0.7, calibration=data, calibration_settings=TWO_PASSES, prefer="size", bits=16)
    ranks = {layer.name: (layer.rank, layer.reason) for layer in report.plan.layers}
    assert ranks["unused"] == (None, "no calibration example reached it with an effect on the outputs")
    assert ranks["used"][0] is not None


@pytest.mark.parametrize(
    "data",
    [
        [(torch.randn(4, 1, 8, 8), torch.zeros(4)) for _ in range(3)],
        [{"inputs": torch.randn(4, 1, 8, 8)} for _ in range(3)],
        (torch.randn(4, 1, 8, 8) for _ in range(3)),
    ],
    ids=["pairs", "mappings", "generator"],
)
def test_any_iterable_of_batches_will_do(data: Any) -> None:
    torch.manual_seed(0)
    found = compress(build(), keep=0.5, calibration=data, calibration_settings=TWO_PASSES, prefer="size", bits=16)
    assert found.plan.calibration is not None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "yields 0 batches"),
        ([torch.randn(1, 1, 8, 8)], "two examples at least, and has one batch"),
        (["text"], "needs the model's tokenizer"),
        ([torch.full((4, 1, 8, 8), math.inf)] * 2, "not finite"),
        ("builtin:nothing", "builtin:nothing"),
    ],
)
def test_bad_calibration_is_one_line(data: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        compress(build(), keep=0.5, calibration=data, prefer="size", bits=16)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("request_", [{}, {"tolerance": 0.1}])
def test_it_wants_a_size_to_share_among_the_layers(trained: nn.Module, request_: dict[str, float]) -> None:
    with pytest.raises(BadInput, match="`keep` or `max_size`"):
        compress(trained, calibration=batches(), **request_)  # type: ignore[arg-type]


def test_its_plan_is_better_applied_with_the_data_than_without_which_it_says(
    trained: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = plan(trained, keep=0.3, calibration=batches(), prefer="size", bits=16)
    (tmp_path / "plan.json").write_text(json.dumps(chosen.to_dict()))
    applied = compress(trained, plan=tmp_path / "plan.json", calibration=batches())
    assert applied.plan.calibration is not None
    assert [layer.rank for layer in applied.plan.layers] == [layer.rank for layer in chosen.layers]
    assert not caplog.messages
    without = compress(trained, plan=tmp_path / "plan.json")
    assert divergence(trained, applied.model) < divergence(trained, without.model) / 2
    assert any("calibration data" in message for message in caplog.messages)


def test_factors_are_stored_in_the_dtype_of_the_file_whatever_the_configuration_computes_in(
    llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    llama.half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    tokens = torch.randint(0, 12, (16, 8), generator=torch.Generator().manual_seed(0))
    small = compress(folder, keep=0.6, calibration=tokens, effort="balanced", prefer="size", bits=16)
    assert small.output is not None
    stored = open_checkpoint(small.output).tensors.values()
    assert {info.dtype for info in stored if info.dtype.is_floating_point} == {torch.float16}
    assert all(layer.error is not None for layer in small.plan.layers)
