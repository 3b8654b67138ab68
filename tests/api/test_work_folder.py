"""A run that is interrupted goes on from its work folder, to what an uninterrupted run gives; no other run does."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor import BadInput, compress
from compressor.api.work_folder import code_version
from compressor.io import CARD_FILE
from compressor.io.workspace import is_workspace
from compressor.planning import PlanningSettings
from compressor.version import VERSION
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


def examples() -> Tensor:
    torch.manual_seed(1)
    return inputs_for("llama", 16)["input_ids"]


CASES: Mapping[str, Callable[[], dict[str, Any]]] = {
    "by its weights": lambda: {"keep": 0.5, "calibration": "none"},
    "from its seed": lambda: {"keep": 0.5, "calibration": "none", "initial": 0},
    "calibrated": lambda: {
        "keep": 0.4,
        "bits": 16,
        "calibration": data(),
        "calibration_settings": replace(TWO_PASSES, uniform=True),
        "embeddings": True,
    },
    "in bits": lambda: {
        "keep": 0.3,
        "bits": (8, 4),
        "calibration": data(),
        "calibration_settings": replace(TWO_PASSES, exponents=(0.0,), truncation_penalties=(2.0,)),
    },
    "within a drop": lambda: {"max_drop": 20.0, "data": {"input_ids": examples()}, "calibration": "none"},
    "within a drop, refined": lambda: {
        "max_drop": 20.0,
        "bits": 16,
        "data": {"input_ids": examples()},
        "calibration": data(),
        "calibration_settings": TWO_PASSES,
        "planning_settings": PlanningSettings(most_trials=3, most_refined=2),
    },
    "on its own examples": lambda: {
        "keep": 0.4,
        "calibration": "self",
        "calibration_samples": 8,
        "effort": "fast",
        "bits": 16,
    },
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

    assert until_done(run, (moments.randrange(1, 24) for _ in range(12))) > 1
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
    asked: dict[str, Any] = {
        "keep": 0.4,
        "calibration": images,
        "calibration_settings": TWO_PASSES,
        "prefer": "size",
        "bits": 16,
    }
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
    work, output = tmp_path / "work", tmp_path / "output"
    asked: dict[str, Any] = {"keep": 0.5, "calibration": data(), "effort": "fast", "output": output}
    interrupted(folder, work, 28, **asked)
    done, text = units_of(work), (work / "journal.jsonl").read_text()
    assert len(done) > 30
    assert not output.exists()
    with caplog.at_level(logging.INFO, "compressor"), pytest.raises(Interrupted):
        compress(folder, prefer="size", work_dir=work, progress=Progress(33), **asked)
    left = len(done) - text.count('"dropped"')  # gradients, which are removed once they were used
    assert f"{work}: goes on from {left} results that are done" in caplog.text
    more = units_of(work)
    assert more[: len(done)] == done
    assert not set(done) & set(more[len(done) :])


OTHERS: Mapping[str, tuple[dict[str, Any], str]] = {
    "another size": ({"keep": 0.6}, "`keep` was 0.5"),
    "no size": ({"keep": None, "tolerance": 0.5}, "`keep` was 0.5, `tolerance` was not given"),
    "other layers": ({"exclude": ("*q_proj",)}, "`exclude` was not given"),
    "another seed": ({"calibration": "self", "seed": 1}, "`seed` was 0"),
    "another start": ({"initial": 1}, "the initial weights changed"),
    "other thresholds": ({"planning_settings": PlanningSettings(most_trials=3)}, "`planning_settings` was not given"),
}


def test_settings_are_told_apart_by_all_that_they_hold(folder: Path, tmp_path: Path) -> None:
    asked = {"keep": 0.5, "calibration": "none", "output": tmp_path / "output"}
    work = tmp_path / "work"
    settings = [PlanningSettings(most_trials=trials) for trials in (3, 3, 4)]
    for each in settings[:2]:
        interrupted(folder, work, 3, planning_settings=each, **asked)
    with pytest.raises(BadInput, match="`planning_settings` was a PlanningSettings of SHA-256"):
        compress(folder, prefer="size", work_dir=work, planning_settings=settings[2], **asked)


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


def test_the_version_of_a_release_is_its_number_and_of_a_checkout_its_code_too(tmp_path: Path) -> None:
    package = tmp_path / "package"
    (package / "room").mkdir(parents=True)
    (package / "room" / "a.py").write_text("a = 1")
    assert code_version(package, None) == VERSION
    from_git = code_version(package, '{"url": "https://example.org"}')
    (tmp_path / "pyproject.toml").touch()
    before = code_version(package, None)
    assert before == from_git
    assert before.startswith(f"{VERSION} with code of SHA-256 ")
    (package / "room" / "a.pyc").write_text("b = 1")
    assert code_version(package, None) == before
    seen = {before}
    changes: tuple[Callable[[], object], ...] = (
        lambda: (package / "room" / "a.py").write_text("a = 2"),
        lambda: (package / "room" / "a.py").rename(package / "a.py"),
        lambda: (package / "settings.json").write_text("{}"),
    )
    for change in changes:
        change()
        seen.add(code_version(package, None))
    assert len(seen) == 4


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
    work, asked = tmp_path / "work", {"keep": 0.5, "effort": "fast", "bits": 16, "output": tmp_path / "output"}
    interrupted(folder, work, 1, calibration=data(), **asked)
    with pytest.raises(BadInput, match="the calibration data changed"):
        compress(folder, prefer="size", work_dir=work, calibration=data(seed=1), **asked)


def test_nothing_is_left_of_a_run_that_did_nothing(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    with pytest.raises(BadInput, match="already exists"):
        compress(folder, keep=0.5, calibration="none", output=output, work_dir=tmp_path / "work")
    assert not (tmp_path / "work").exists()


def units_of(folder: Path) -> list[str]:
    """The names in a journal, in the order in which they were recorded."""
    records = [json.loads(line)["record"] for line in (folder / "journal.jsonl").read_text().splitlines()]
    return [record["unit"] for record in records if "unit" in record]


def weights(output: Path) -> dict[str, bytes]:
    return {name: content for name, content in files(output).items() if name.endswith(".safetensors")}


@pytest.mark.slow
def test_another_size_starts_from_the_calibration_cache_without_data(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def made(name: str, **asked: Any) -> tuple[dict[str, bytes], Counter[str]]:
        progress = Progress()
        compress(folder, output=tmp_path / name, prefer="size", bits=16, progress=progress, **asked)
        return weights(tmp_path / name), progress.calls

    first, _ = made("first", keep=0.5, effort="balanced", calibration=data(), calibration_cache=cache)
    records = units_of(cache)
    alike: tuple[dict[str, Any], ...] = ({"keep": 0.5}, {"keep": 0.6, "form": "plain"})
    for number, asked in enumerate({**each, "effort": "balanced"} for each in alike):
        found, _ = made(f"cached-{number}", calibration_cache=cache, **asked)
        expected, _ = made(f"expected-{number}", calibration=data(), **asked)
        assert found == expected
        assert (found == first) == (number == 0)
    # The moments are those of the first run, and so are the decompositions that it needed.
    units = units_of(cache)
    assert len(units) == len(set(units))
    assert not [each for each in units[len(records) :] if not each.startswith("decomposition/")]
    again, _ = made("again", keep=0.5, effort="balanced", calibration=data(), calibration_cache=cache)
    assert again == first


@pytest.mark.slow
def test_errors_of_quantized_forms_are_measured_once_for_all_sizes(folder: Path, tmp_path: Path) -> None:
    cache, asked = tmp_path / "cache", {"bits": (8, 4), "effort": "fast", "prefer": "size"}
    compress(folder, output=tmp_path / "first", keep=0.5, calibration=data(), calibration_cache=cache, **asked)
    before = units_of(cache)
    compress(folder, output=tmp_path / "cached", keep=0.3, calibration_cache=cache, **asked)
    compress(folder, output=tmp_path / "expected", keep=0.3, calibration=data(), **asked)
    assert weights(tmp_path / "cached") == weights(tmp_path / "expected") != weights(tmp_path / "first")
    assert any(unit.startswith("errors of ") for unit in before)
    assert not [unit for unit in units_of(cache)[len(before) :] if not unit.startswith("quantized/")]


@pytest.mark.slow
def test_a_model_keeps_the_examples_that_it_made(folder: Path, tmp_path: Path) -> None:
    cache, own = tmp_path / "cache", {"calibration": "self", "calibration_samples": 8}
    outputs = []
    for number, asked in enumerate(({**own, "calibration_cache": cache}, {"calibration_cache": cache}, own)):
        progress = Progress()
        output = tmp_path / str(number)
        compress(folder, output=output, prefer="size", keep=0.6, effort="fast", progress=progress, **asked)
        assert (progress.calls["generate"] == 0) == (number == 1)
        outputs.append(weights(output))
    assert outputs[0] == outputs[1] == outputs[2]
    with pytest.raises(BadInput, match="the calibration data changed"):
        compress(folder, prefer="size", bits=16, keep=0.6, effort="fast", calibration=data(), calibration_cache=cache)


WRONG: Mapping[str, tuple[dict[str, Any], str]] = {
    "other data": ({"calibration": data(seed=1)}, "the calibration data changed"),
    "its own examples": ({"calibration": "self"}, "examples that were given, and not the model's own"),
    "fewer examples": ({"calibration_samples": 3}, "holds 16 examples, and `calibration_samples` is 3"),
    "another seed": ({"seed": 1}, "`seed` was 0"),
    "other layers": ({"exclude": ("*q_proj",)}, "`exclude` was not given"),
    "no calibration": ({"calibration": "none"}, "contradict each other"),
    "another effort": ({"effort": "best"}, "`effort` was fast, the setting `holdout_every` was 16"),
}


@pytest.fixture(scope="module")
def cache(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("calibrated")
    asked: dict[str, Any] = {"keep": 0.5, "effort": "fast", "prefer": "size", "bits": 16, "calibration": data()}
    compress(folder, output=place / "output", calibration_cache=place / "cache", **asked)
    return place / "cache"


@pytest.mark.parametrize("wrong", WRONG)
def test_a_calibration_cache_of_something_else_is_refused_by_name(folder: Path, cache: Path, wrong: str) -> None:
    given, said = WRONG[wrong]
    asked: dict[str, Any] = {"keep": 0.4, "prefer": "size", "output": cache.with_name("refused"), "effort": "fast"}
    if wrong == "no calibration":
        del asked["effort"]
    with pytest.raises(BadInput, match=said):
        compress(folder, calibration_cache=cache, **{**asked, **given})
    assert not cache.with_name("refused").exists()


def test_an_empty_calibration_cache_needs_data_once(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no examples yet; pass `calibration=DATA` once"):
        compress(folder, prefer="size", max_drop=0.1, data=data()[0], calibration_cache=tmp_path / "cache")
    with pytest.raises(BadInput, match="none was asked for"):
        compress(folder, prefer="size", tolerance=0.1, calibration_cache=tmp_path / "cache")


def test_temporary_files_lie_in_the_work_folder(folder: Path, tmp_path: Path) -> None:
    seen: set[Path] = set()

    def note(*_: object) -> None:
        seen.update(path for path in (tmp_path / "work").glob("*") if is_workspace(path))

    asked: dict[str, Any] = {
        "keep": 0.5,
        "prefer": "size",
        "bits": 16,
        "calibration": data(),
        "calibration_settings": TWO_PASSES,
    }
    compress(folder, output=tmp_path / "output", work_dir=tmp_path / "work", progress=note, **asked)
    assert seen
    assert not (tmp_path / "work").exists()
