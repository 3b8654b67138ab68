"""Differences by what they are worth: calibrated, or within a measured drop, they are what is stored and measured."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor import CalibrationSettings, QualityGateNotMet, TrainingRecipe, compress, restore
from compressor.cli.run import run

torch.set_num_threads(1)

FACTORY = """
from torch import nn

def net():
    return nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 6))
"""
ALONE = CalibrationSettings(compensate=False, refine=False, recalibration_rounds=0)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 6))


def inputs(count: int, *, seed: int) -> Tensor:
    """Examples that lie in few directions: most of a difference does nothing on them."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(6, 24, generator=generator)
    generator.manual_seed(seed)
    return torch.randn(count, 6, generator=generator) @ directions + 0.05 * torch.randn(count, 24, generator=generator)


@torch.no_grad()
def labeled(model: nn.Module, count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    x = inputs(count, seed=seed)
    return x, model(x).argmax(-1)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Sequential, nn.Sequential]:
    """A base, and a fine-tune whose differences are of full rank."""
    torch.manual_seed(0)
    base = net()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for each in tuned:
            if isinstance(each, nn.Linear):
                each.weight.add_(0.5 * each.weight.std() * torch.randn(each.weight.shape))
    return base, tuned


@pytest.fixture
def files(trained: tuple[nn.Sequential, nn.Sequential], tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    for module, path in zip(trained, paths, strict=True):
        save_file(module.state_dict(), path, metadata={"format": "pt"})
    (tmp_path / "nets.py").write_text(FACTORY)
    for name, count in (("calibration", 96), ("data", 2000)):
        x, y = labeled(trained[1], count, seed=count)
        np.savez(tmp_path / f"{name}.npz", x=x.numpy(), y=y.numpy())
    return paths


@torch.no_grad()
def divergence(model: nn.Module, tuned: nn.Module) -> float:
    """How far predictions are from those of the fine-tune, on examples that nothing was chosen by."""
    x = inputs(400, seed=3)
    of_tuned = tuned(x).log_softmax(-1)
    return float((of_tuned.exp() * (of_tuned - model(x).log_softmax(-1))).sum(-1).mean())


@pytest.mark.parametrize(
    "settings", [ALONE, CalibrationSettings.of("balanced"), None], ids=["alone", "balanced", "best"]
)
def test_calibrated_differences_lose_less_at_the_same_size(
    settings: CalibrationSettings | None, trained: tuple[nn.Sequential, nn.Sequential]
) -> None:
    base, tuned = trained
    by_weights = compress(tuned, base=base, keep=0.25)
    calibrated = compress(
        tuned,
        base=base,
        keep=0.25,
        calibration=labeled(tuned, 96, seed=1),
        calibration_settings=settings or CalibrationSettings(),
    )
    assert calibrated.plan.eligible_after <= 0.25 * calibrated.plan.eligible_before
    assert calibrated.plan.calibration is not None
    assert by_weights.model is not None
    assert calibrated.model is not None
    lost = divergence(calibrated.model, tuned)
    assert lost < 0.3 * divergence(by_weights.model, tuned)
    # What the search measured on its holdout is what the model loses on others.
    assert lost == pytest.approx(calibrated.plan.calibration.holdout_loss, rel=0.5)


def test_one_layer_is_the_best_pair_in_the_metric_of_its_inputs() -> None:
    """LAPACK's: the truncated SVD of `D S^(1/2)`, mapped back, where the gradients are alike in all directions."""
    torch.manual_seed(0)
    base, x = nn.Linear(24, 24, bias=False), inputs(4000, seed=1)
    tuned = nn.Linear(24, 24, bias=False)
    settings = CalibrationSettings(
        gradient_moments=False, compensate=False, refine=False, recalibration_rounds=0, samples=4000, holdout_every=1000
    )
    small = compress(
        tuned,
        base=base,
        keep=0.5,
        calibration=x,
        calibration_settings=settings,
        recipe=TrainingRecipe(weight_decay=0.0),
    )
    [layer] = small.plan.layers
    assert layer.rank == 6
    assert small.model is not None
    change = (tuned.weight - base.weight).double().detach()
    moment = (x.double().T @ x.double()) / len(x)
    values, vectors = torch.linalg.eigh(moment)
    root = vectors * values.clamp_min(1e-12).sqrt()
    singular = torch.linalg.svdvals(change @ root)
    least = float(singular[6:].square().sum())
    found: Any = small.model
    left_over = change - (found.pair.up.weight.double() @ found.pair.down.weight.double()).detach()
    # Its metric is that of all but four examples, shrunk a little towards the identity.
    assert float((left_over @ root).square().sum()) <= 1.05 * least
    assert torch.equal(found.base.weight, base.weight)
    plain = (change - _truncated(change, 6)) @ root
    assert float(plain.square().sum()) > 3 * least


def _truncated(matrix: Tensor, rank: int) -> Tensor:
    left, values, right = torch.linalg.svd(matrix)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


@pytest.mark.parametrize("asked", [{"keep": 0.25}, {"max_size": 5000}, {"max_drop": 0.3}], ids=str)
@pytest.mark.parametrize("calibrated", [False, True])
def test_base_and_file_are_what_was_measured(
    asked: dict[str, Any], calibrated: bool, *, files: tuple[Path, Path], tmp_path: Path
) -> None:
    base, tuned = files
    report = compress(
        tuned,
        base=base,
        factory=f"{tmp_path / 'nets.py'}:net",
        output=tmp_path / "pairs.safetensors",
        data=tmp_path / "data.npz",
        **({"effort": "balanced", "calibration": tmp_path / "calibration.npz"} if calibrated else {}),
        allow_miss="max_drop" in asked,
        **asked,
    )
    if "max_size" in asked:
        assert 4000 < (tmp_path / "pairs.safetensors").stat().st_size <= 5000
    if "keep" in asked:
        assert report.plan.eligible_after <= 0.25 * report.plan.eligible_before
    assert report.evaluation is not None
    assert report.evaluation.drop is not None
    if "max_drop" in asked:
        assert report.plan.search is not None
        [chosen] = [each for each in report.plan.search.trials if each.parameters == report.plan.eligible_after]
        assert chosen.bound <= 0.3
        # On the examples that did not decide, up to twice the standard errors of both halves.
        assert report.evaluation.drop <= 0.3 + 4 * chosen.standard_error
        assert report.plan.eligible_after < (0.6 if calibrated else 1.0) * report.plan.eligible_before
    restore(tmp_path / "pairs.safetensors", base=base, output=tmp_path / "again.safetensors")
    again = net()
    again.load_state_dict(load_file(tmp_path / "again.safetensors"))
    data = np.load(tmp_path / "data.npz")
    examples, labels = torch.from_numpy(data["x"]), torch.from_numpy(data["y"])
    if "max_drop" in asked:  # every second one decided
        examples, labels = examples[1::2], labels[1::2]
    with torch.no_grad():
        accuracy = float((again(examples).argmax(-1) == labels).double().mean())
    assert accuracy == pytest.approx(report.evaluation.compressed, abs=0.011)
    if calibrated:
        # The biases took up what the changes made of the inputs' means.
        stored = load_file(tmp_path / "pairs.safetensors")
        assert any(name.endswith("bias") for name in stored)


def test_what_the_base_does_as_well_is_not_stored(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str], *, tmp_path: Path
) -> None:
    base, tuned = files
    asked = [str(tuned), "--base", str(base), "--model", f"{tmp_path / 'nets.py'}:net", "--max-drop", "1"]
    written = tmp_path / "pairs.safetensors"
    assert run([*asked, "--data", str(tmp_path / "data.npz"), "-o", str(written)]) in (0, 2)
    if written.exists():
        assert written.stat().st_size < 2000
    else:
        assert "needs nothing beside its base" in capsys.readouterr().err


def test_no_size_within_an_impossible_drop(files: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = files
    noise = np.load(tmp_path / "data.npz")
    few = tmp_path / "few.npz"
    np.savez(few, x=noise["x"][:4], y=noise["y"][:4])
    with pytest.raises(QualityGateNotMet):
        compress(
            tuned,
            base=base,
            factory=f"{tmp_path / 'nets.py'}:net",
            output=tmp_path / "pairs.safetensors",
            data=few,
            keep=0.02,
            max_drop=0.0,
        )
    assert not (tmp_path / "pairs.safetensors").exists()


def test_a_plan_of_differences_is_calibrated(files: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = files
    settings = {"factory": f"{tmp_path / 'nets.py'}:net", "calibration": tmp_path / "calibration.npz", "effort": "fast"}
    report = compress(tuned, base=base, output=tmp_path / "a.safetensors", keep=0.25, **settings)
    (tmp_path / "plan.json").write_text(json.dumps(report.plan.to_dict()))
    again = compress(tuned, base=base, output=tmp_path / "b.safetensors", plan=tmp_path / "plan.json", **settings)
    assert [layer.rank for layer in again.plan.layers] == [layer.rank for layer in report.plan.layers]
    first, second = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-6)


def test_calibrated_bits_are_stored_as_they_were_measured(files: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = files
    report = compress(
        tuned,
        base=base,
        factory=f"{tmp_path / 'nets.py'}:net",
        output=tmp_path / "integers.safetensors",
        data=tmp_path / "data.npz",
        calibration=tmp_path / "calibration.npz",
        effort="balanced",
        keep=0.2,
        bits="8,4",
    )
    assert report.plan.quantized
    restore(tmp_path / "integers.safetensors", base=base, output=tmp_path / "again.safetensors")
    again = net()
    again.load_state_dict(load_file(tmp_path / "again.safetensors"))
    data = np.load(tmp_path / "data.npz")
    with torch.no_grad():
        right = again(torch.from_numpy(data["x"])).argmax(-1) == torch.from_numpy(data["y"])
    assert report.evaluation is not None
    assert float(right.double().mean()) == pytest.approx(report.evaluation.compressed, abs=0.006)


def test_statistics_of_batch_normalizations_move_along(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
    ).eval()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for weight in tuned.parameters():
            if weight.dim() > 1:
                weight.add_(0.5 * weight.std() * torch.randn(weight.shape))
    x = torch.randn(48, 3, 8, 8)
    small = compress(tuned, base=base, keep=0.2, calibration=x, effort="balanced")
    assert small.model is not None
    assert {layer.form for layer in small.plan.layers} <= {"plain", "channel", "dense"}
    by_weights = compress(tuned, base=base, keep=0.2)
    assert by_weights.model is not None
    other = torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        expected = tuned(other)
        lost = [float((each.model(other) - expected).square().mean()) for each in (small, by_weights)]
    assert lost[0] < lost[1]


@pytest.mark.slow
def test_peft_loads_a_calibrated_adapter_as_it_was_measured(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(  # which has biases beside three of its matrices
        **{"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    )
    base = transformers.Qwen2ForCausalLM(config)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if name.endswith("proj.weight"):
                weight.add_(2 * weight.std() * torch.randn(weight.shape))
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    tokens = torch.randint(3, 60, (48, 12), generator=torch.Generator().manual_seed(1))
    np.savez(tmp_path / "calibration.npz", input_ids=tokens[:32].numpy())
    np.savez(tmp_path / "data.npz", input_ids=tokens[32:].numpy())
    report = compress(
        tmp_path / "tuned",
        base=tmp_path / "base",
        output=tmp_path / "adapter",
        keep=0.3,
        calibration=tmp_path / "calibration.npz",
        data=tmp_path / "data.npz",
        effort="balanced",
    )
    assert report.fine_tune is not None
    assert report.fine_tune.verified_with == peft.__version__
    assert "Made by" in (tmp_path / "adapter" / "README.md").read_text()
    start = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(start, tmp_path / "adapter").eval()
    with torch.no_grad():
        outputs = loaded(input_ids=tokens[32:]).logits[:, :-1].reshape(-1, 60)
        loss = float(nn.functional.cross_entropy(outputs, tokens[32:, 1:].reshape(-1)))
    assert report.evaluation is not None
    assert float(np.exp(loss)) == pytest.approx(report.evaluation.compressed, rel=1e-4)
