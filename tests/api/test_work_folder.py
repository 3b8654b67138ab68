"""A run that is interrupted goes on from its work folder, to what an uninterrupted run gives; no other run does."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor import BadInput, compress
from compressor.io import CARD_FILE
from tests.calibration.tiny_models import TWO_PASSES, inputs_for, transformer


class Interrupted(BaseException):
    pass


class Progress:
    """Counts the calls of each step, and interrupts the run at one of them."""

    def __init__(self, at: int | None = None) -> None:
        self.calls, self.left = Counter[str](), at

    def __call__(self, step: str, done: int, total: int) -> None:
        self.calls[step] += 1
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Interrupted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folder") / "model"
    model: Any = transformer("llama")
    model.save_pretrained(folder)
    return folder


def data(seed: int = 0) -> list[dict[str, Tensor]]:
    torch.manual_seed(seed)
    return [inputs_for("llama", 4) for _ in range(4)]


CASES: Mapping[str, Callable[[], dict[str, Any]]] = {
    "by its weights": lambda: {"keep": 0.5, "calibration": "none"},
    "calibrated": lambda: {"keep": 0.4, "calibration": data(), "calibration_settings": TWO_PASSES},
    "embeddings": lambda: {"keep": 0.4, "calibration": data(), "effort": "balanced", "embeddings": True},
    "on its own examples": lambda: {"keep": 0.4, "calibration": "self", "calibration_samples": 8, "effort": "fast"},
}


def files(output: Path) -> dict[str, bytes]:
    """What a folder holds, but for the card, which states times."""
    return {each.name: each.read_bytes() for each in output.iterdir() if each.name != CARD_FILE}


def until_done(run: Callable[[Progress], object], moments: Iterator[int]) -> int:
    """Run something again and again, interrupted at these calls of its progress; how often it was."""
    for interruptions, at in enumerate(moments):
        try:
            run(Progress(at))
        except Interrupted:
            continue
        return interruptions
    run(Progress())
    return interruptions + 1


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_run_ends_with_the_bytes_of_another(folder: Path, tmp_path: Path, case: str) -> None:
    whole, parts, work = tmp_path / "whole", tmp_path / "parts", tmp_path / "work"
    asked = CASES[case]()
    compress(folder, output=whole, prefer="size", **asked)
    moments = random.Random(case)

    def run(progress: Progress) -> None:
        compress(folder, output=parts, prefer="size", work_dir=work, progress=progress, **asked)

    assert until_done(run, (moments.randrange(1, 12) for _ in range(12))) > 1
    assert files(parts) == files(whole)
    assert not work.exists()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["parts", "whole"]


def network() -> nn.Module:
    """Convolutions with batch normalizations, whose statistics move when layers before them are compressed."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels, made in ((1, 12), (12, 12), (12, 12)):
        layers += [nn.Conv2d(channels, made, 3, padding=1), nn.BatchNorm2d(made), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return model


@pytest.mark.slow
def test_an_interrupted_run_on_a_module_ends_with_the_same_module(tmp_path: Path) -> None:
    images = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    asked: dict[str, Any] = {"keep": 0.4, "calibration": images, "calibration_settings": TWO_PASSES, "prefer": "size"}
    whole = compress(network(), **asked).model
    made: list[nn.Module | None] = []

    def run(progress: Progress) -> None:
        made.append(compress(network(), work_dir=tmp_path / "work", progress=progress, **asked).model)

    assert until_done(run, iter(range(1, 20, 2))) > 3
    assert whole is not None
    assert made[0] is not None
    expected, found = whole.state_dict(), made[0].state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def interrupted(folder: Path, work: Path, at: int, **asked: Any) -> Progress:
    progress = Progress(at)
    with pytest.raises(Interrupted):
        compress(folder, prefer="size", work_dir=work, progress=progress, **asked)
    return progress


@pytest.mark.slow
def test_what_is_done_is_not_done_again_and_is_said(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work, output, asked = tmp_path / "work", tmp_path / "output", CASES["calibrated"]()
    done = interrupted(folder, work, 40, output=output, **asked)
    assert done.calls["compensate"] > 0
    assert not output.exists()
    units = len(list((work / "units").iterdir()))
    assert units > 10
    records = (work / "journal.jsonl").read_text()
    with caplog.at_level(logging.INFO, "compressor"):
        compress(folder, output=output, prefer="size", work_dir=work, **asked)
    assert f"{work}: goes on from " in caplog.text
    assert json.loads(records.splitlines()[-1])["record"]["unit"]


OTHERS: Mapping[str, tuple[dict[str, Any], str]] = {
    "another size": ({"keep": 0.6}, "`keep` was 0.5"),
    "no size": ({"keep": None, "tolerance": 0.5}, "`keep` was 0.5, `tolerance` was not given"),
    "other layers": ({"exclude": ("*q_proj",)}, "`exclude` was not given"),
    "another seed": ({"calibration": "self", "seed": 1}, "`seed` was 0"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_run_that_is_asked_for_something_else_is_refused_by_name(folder: Path, tmp_path: Path, other: str) -> None:
    work, output = tmp_path / "work", tmp_path / "output"
    asked = {"keep": 0.5, "calibration": "none", "output": output}
    interrupted(folder, work, 3, **asked)
    given, said = OTHERS[other]
    with pytest.raises(BadInput, match="belongs to another run: " + said) as refused:
        compress(folder, prefer="size", work_dir=work, **{**asked, **given})
    assert refused.value.option == "work_dir"
    compress(folder, prefer="size", work_dir=work, **asked)  # and is there to go on from


def test_a_run_on_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    work, asked = tmp_path / "work", {"keep": 0.5, "calibration": "none", "output": tmp_path / "output"}
    interrupted(folder, work, 3, **asked)
    model: Any = transformer("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(BadInput, match="the model changed"):
        compress(tmp_path / "other", prefer="size", work_dir=work, **asked)


def test_a_run_on_other_calibration_data_is_refused(folder: Path, tmp_path: Path) -> None:
    work, asked = tmp_path / "work", {"keep": 0.5, "effort": "fast", "output": tmp_path / "output"}
    interrupted(folder, work, 1, calibration=data(), **asked)
    with pytest.raises(BadInput, match="the calibration data changed"):
        compress(folder, prefer="size", work_dir=work, calibration=data(seed=1), **asked)


def test_nothing_is_left_of_a_run_that_did_nothing(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    with pytest.raises(BadInput, match="already exists"):
        compress(folder, keep=0.5, calibration="none", output=output, work_dir=tmp_path / "work")
    assert not (tmp_path / "work").exists()
