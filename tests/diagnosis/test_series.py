"""The checkpoints of a run in the order of their steps, whatever their names look like."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compressor.diagnosis.series import RankSeries, SeriesLayer, measure_series
from compressor.errors import BadInput
from compressor.measure import effective_ranks
from compressor.model import open_model


def series_of(folder: Path, names: list[str]) -> RankSeries:
    """Checkpoints by these names, the norm of whose only layer is 1 in the first, 2 in the second, and so on."""
    folder.mkdir(exist_ok=True)
    for norm, name in enumerate(names, start=1):
        weight = torch.zeros(4, 4)
        weight[0, 0] = norm
        file = folder / name if name.endswith((".pth", ".ckpt")) else folder / name / "model.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"fc.weight": weight}, file) if file.suffix == ".safetensors" else torch.save(
            {"fc.weight": weight}, file
        )
    model = folder.parent / "model.safetensors"
    save_file({"fc.weight": torch.eye(4)}, model)
    return measure_series(folder, open_model(model), torch.device("cpu"))


@pytest.mark.parametrize(
    ("names", "unit", "steps"),
    [
        # Decimals of a loss are no step, however long.
        (
            ["slim-Epoch-9-Loss-2.6786906265077137.pth", "slim-Epoch-49-Loss-2.51.pth", "slim-Epoch-499-Loss-2.3.pth"],
            "epoch",
            (9, 49, 499),
        ),
        (["m_0.913_7.pth", "m_0.92_31.pth"], "step", (7, 31)),
        (["acc-93-m2.pth", "acc-91-m7.pth"], "step", (2, 7)),
        # Lightning's names; a later version of the same file keeps its step.
        (["epoch=0-step=100.ckpt", "epoch=1-step=250.ckpt", "epoch=11-step=900-v1.ckpt"], "step", (100, 250, 900)),
        (["epoch=2-val_loss=0.31.ckpt", "epoch=10-val_loss=0.29.ckpt"], "epoch", (2, 10)),
        (["checkpoint-500", "checkpoint-1000"], "step", (500, 1000)),
        (["model_0000500.pth", "model_0010000.pth"], "step", (500, 10000)),
        (["iter_0005000", "iter_0010000"], "step", (5000, 10000)),
        (["net-iteration12-lr1e-3.pth", "net-iteration100-lr1e-4.pth"], "step", (12, 100)),
        (["step1", "step512", "step143000"], "step", (1, 512, 143000)),
        (["500_steps.pth", "10k_steps.pth"], "step", (500, 10000)),
        (["3_epochs.pth", "20_epochs.pth"], "epoch", (3, 20)),
        (["checkpoint_epoch_3.pth", "checkpoint_epoch_20.pth"], "epoch", (3, 20)),
        # A number that all names share belongs to the name.
        (["resnet18-seed7-5.pth", "resnet18-seed7-40.pth"], "step", (5, 40)),
    ],
)
def test_steps_are_read_as_they_are_meant(
    tmp_path: Path, names: list[str], unit: str, *, steps: tuple[int, ...]
) -> None:
    found = series_of(tmp_path / "run", names)
    assert (found.unit, found.steps, found.checkpoints) == (unit, steps, tuple(names))
    assert found.layers[0].norms == pytest.approx(range(1, len(names) + 1))
    assert found.to_dict()["unit"] == unit


def test_what_carries_no_number_or_no_weights_is_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "logs-3").mkdir(parents=True)
    (folder / "optimizer-300.pth").write_text("the state of an optimizer")
    found = series_of(folder, ["epoch-1.pth", "epoch-2.pth", "best.pth", "last.ckpt"])
    assert found.steps == (1, 2)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["net_3_10.pth", "net_4_20.pth"], r"which number in net_3_10\.pth is the step"),
        (["epoch-3.pth", "step-500.pth", "epoch-4.pth"], r"has an epoch and step-500\.pth does not"),
        (["epoch-3.pth", "model_50.pth"], r"has an epoch and model_50\.pth does not"),
        (["epoch_1_iter_900.pth", "epoch_2_iter_100.pth"], "restarts the steps in every epoch"),
        (["loss-0.31.pth", "loss-0.29.pth"], "holds 0 checkpoints with a step in their names"),
        (["step-7.pth", "step-7.ckpt"], "are both of step 7"),
    ],
)
def test_names_that_are_not_clear_are_refused_with_a_name_that_is(tmp_path: Path, names: list[str], says: str) -> None:
    with pytest.raises(BadInput, match=says) as refused:
        series_of(tmp_path / "run", names)
    assert any(word in str(refused.value) for word in ("checkpoint-500", "keep one"))


def test_the_norm_before_the_window_is_looked_up_in_steps() -> None:
    layer = SeriesLayer("fc", (effective_ranks(torch.ones(2).numpy()),) * 3, (1.0, 2.0, 3.0))
    by_epoch = RankSeries("run", ("a", "b", "c"), (1, 2, 30), (layer,), "epoch")
    assert by_epoch.norm_before("fc", 250, steps_per_epoch=100) == 2
    # The length of an epoch is not known: nor is the checkpoint before the window.
    assert by_epoch.norm_before("fc", 250) is None
    by_step = RankSeries("run", ("a", "b", "c"), (1, 2, 300), (layer,), "step")
    assert by_step.norm_before("fc", 250) == 2


def test_numbers_without_a_word_are_said_to_be_taken_for_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    series_of(tmp_path / "named", ["checkpoint-5", "checkpoint-10"])
    assert not caplog.messages
    assert series_of(tmp_path / "lone", ["model_5.pth", "model_10.pth"]).unit == "step"
    [said] = caplog.messages
    assert "the number in model_10.pth is taken as its step" in said
    assert "epoch=10" in said


def test_the_ranks_of_a_convolution_with_groups_are_those_of_its_groups(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 12, 3, groups=4), torch.nn.Flatten(), torch.nn.LazyLinear(2))
    model(torch.randn(1, 8, 3, 3))
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        save_file(model.state_dict(), tmp_path / f"checkpoint-{step}" / "model.safetensors")
    [grouped, _] = measure_series(tmp_path, open_model(model), torch.device("cpu")).layers
    assert {ranks.full for ranks in grouped.ranks} == {3}
    assert grouped.norms[0] == pytest.approx(float(model[0].weight.detach().norm()))
