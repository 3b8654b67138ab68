"""The benchmark of quality: sizes counted from tensors, parts that are really switched off, results that merge."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor import CalibrationSettings, inspect
from compressor.data import Batch, EvaluationData

pytestmark = pytest.mark.slow

KEEP = 0.5


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import quality  # type: ignore[import-not-found]

    yield quality
    for name in ("quality", "baselines"):
        sys.modules.pop(name, None)


def cell(quality: ModuleType) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 10)).eval()
    for layer, decay in zip(model[::2], (0.5, 0.9, 1.0), strict=True):  # what an input counts for differs by layer
        layer.weight.data *= decay ** torch.arange(layer.in_features)
    mixing = torch.randn(24, 24)
    layers = tuple(each.layer for each in inspect(model).layers if each.layer.eligible)
    left_dense = 10 * 40
    eligible = sum(layer.parameters for layer in layers)
    return quality.Cell(
        model=model,
        layers=layers,
        published={name: model.get_submodule(name) for name in ("0", "2")},
        batches=[{"inputs": torch.randn(32, 24) @ mixing} for _ in range(8)],
        keep=KEEP,
        seed=0,
        room=int(KEEP * eligible) - left_dense,
    )


def test_all_methods_store_what_was_asked_for_and_differ(quality: ModuleType) -> None:
    given = cell(quality)
    x = torch.randn(100, 24)
    outputs: dict[str, Tensor] = {}
    for name, method in quality.METHODS.items():
        small = method(given)
        # One rank of the largest layer, which is large in a model as small as this one.
        assert KEEP * given.eligible - 80 <= small.stored <= KEEP * given.eligible, name
        outputs[name] = small.model(x)
    pairs = [(a, b) for a in outputs for b in outputs if a < b]
    same = {pair for pair in pairs if torch.equal(outputs[pair[0]], outputs[pair[1]])}
    # What is kept only where it lowers the holdout loss may not have been kept; and no layer is a convolution.
    optional = {"ours", "ours without refinement", "ours without refinement, with one allocation (p = 1)"}
    optional |= {"ours without refinement and compensation", "ours without refinement and stages"}
    optional |= {"ours without refinement, with channel pairs"}
    assert all(set(pair) <= optional for pair in same)
    assert all(not torch.equal(output, given.model(x)) for output in outputs.values())


def test_every_setting_that_switches_a_part_off_changes_the_search(quality: ModuleType) -> None:
    """Where no prediction is trusted, so that there is a round of recalibration."""
    given = cell(quality)
    switched = {
        name: method.keywords["settings"]
        for name, method in quality.OURS.items()
        if isinstance(method, partial) and method.keywords.get("settings", quality.UNREFINED) != quality.UNREFINED
    }
    assert len(switched) == 4

    def steps(settings: CalibrationSettings) -> list[tuple[Any, ...]]:
        seen: list[tuple[Any, ...]] = []
        settings = replace(settings, trust_factor=1.0)
        quality.ours(given, settings=settings, progress=lambda *event: seen.append(event))
        return seen

    whole = steps(quality.UNREFINED)
    for name, settings in switched.items():
        # The metric is another one in the same steps.
        assert (steps(settings) == whole) == ("moment" in name), name


def test_tied_tensors_are_counted_once(quality: ModuleType) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    assert quality.numbers(model) == 32
    model[1].weight = model[0].weight
    assert quality.numbers(model) == 16


def test_the_token_left_out_is_the_most_frequent_that_half_of_the_windows_lack(quality: ModuleType) -> None:
    windows = torch.tensor([[0, 1, 2, 2], [0, 1, 3, 3], [0, 1, 3, 3], [0, 4, 2, 2]])
    assert quality.left_out(windows) == 2  # 0 and 1 are in more than half of them; 2 and 3 are as frequent, in half


def test_the_loss_after_a_token_is_of_the_predictions_with_it_in_their_recent_past(
    quality: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(quality, "REACH", 3)
    windows = torch.randint(0, 6, (5, 12))
    table = nn.Embedding(6, 6)

    def read(positions: Any) -> Batch:
        chosen = windows[list(positions)]
        return Batch({"input_ids": chosen}, chosen[:, 1:])

    found = quality.loss_after(table, EvaluationData("", "language-modeling", 5, 2, read), 4)
    losses = []
    for window in windows.tolist():
        for position in range(1, len(window)):
            if 4 in window[max(0, position - 3) : position]:
                scores = table(torch.tensor(window[position - 1])).double()
                losses.append(-float(scores.detach().log_softmax(-1)[window[position]]))
    assert found == pytest.approx(sum(losses) / len(losses))


@pytest.mark.parametrize("text", [False, True])
def test_the_error_of_a_change_in_loss_is_over_the_examples(quality: ModuleType, text: bool) -> None:
    torch.manual_seed(0)
    dense, other = nn.Embedding(6, 6), nn.Embedding(6, 6)
    windows = torch.randint(0, 6, (9, 12) if text else (9, 2))

    def read(positions: Any) -> Batch:
        chosen = windows[list(positions)]
        return Batch({"inputs": chosen} if text else {"inputs": chosen[:, 0]}, chosen[:, 1:] if text else chosen[:, 1])

    def losses(model: nn.Embedding) -> list[float]:
        chances = model.weight.detach().double().log_softmax(-1)
        return [
            -statistics.mean(float(chances[a, b]) for a, b in itertools.pairwise(window)) for window in windows.tolist()
        ]

    data = EvaluationData("", "language-modeling" if text else "image-classification", 9, 2, read)
    changes = [after - before for before, after in zip(losses(dense), losses(other), strict=True)]
    expected = statistics.stdev(changes) / 3
    assert quality.error_and_divergence(dense, other, data)[0] == pytest.approx(expected)
    assert quality.error_and_divergence(dense, dense, data) == (0, 0)


def test_a_cell_measured_again_replaces_itself_and_leaves_the_others(
    quality: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(quality, "RESULTS", tmp_path)

    def row(method: str, keep: float, loss: float) -> dict[str, Any]:
        about = {"model": "digits-vit", "condition": quality.TEST, "keep": keep, "seed": 0, "method": method}
        return about | {"kept": keep, "loss_increase": loss}

    quality.merged("digits-vit", [row("ours", 0.4, 0.3), row("SVD-LLM", 0.4, 0.5), row("ours", 0.8, 0.1)])
    rows = quality.merged("digits-vit", [row("ours", 0.4, 0.2)])
    written = json.loads((tmp_path / "quality-digits-vit.json").read_text())["rows"]
    assert rows == written == [row("ours", 0.8, 0.1), row("SVD-LLM", 0.4, 0.5), row("ours", 0.4, 0.2)]
    assert "| ours | 0.100 (0.100 to 0.100) | 0.200 (0.200 to 0.200) |" in quality.table(rows)
