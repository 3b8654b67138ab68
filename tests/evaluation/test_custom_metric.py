"""The caller's own metric: measured, compared, searched by, and how sure a drop in it is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import compressor
from compressor.data import CustomMetric, Sample, halves, open_data
from compressor.errors import BadInput, QualityGateNotMet
from compressor.evaluation import compare, drop_error, measure_quality, quality_drop
from compressor.report.wording import change_words, search_rows, search_words

torch.set_num_threads(1)


def f1(model: nn.Module, batches: Iterable[Any]) -> float:
    predicted, true = [], []
    for inputs, labels in batches:
        predicted += model(inputs).argmax(-1).tolist()
        true += labels.tolist()
    return float(f1_score(true, predicted, average="macro"))


def accuracy(model: nn.Module, batches: Iterable[Any]) -> float:
    right = torch.cat([model(inputs).argmax(-1) == labels for inputs, labels in batches])
    return float(right.double().mean())


def error(model: nn.Module, batches: Iterable[Any]) -> float:
    """Lower is better."""
    batches = list(batches)
    squares = sum(float((model(inputs) - targets).square().sum()) for inputs, targets in batches)
    return squares / sum(targets.numel() for _, targets in batches)


def classifier() -> nn.Module:
    """A network with singular values that fall fast, so that its smaller version is nearly as good."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            u, _, v = torch.linalg.svd(layer.weight, full_matrices=False)
            layer.weight.copy_(3 * (u * 0.75 ** torch.arange(u.shape[1])) @ v)
    return model.eval()


def labeled(count: int, seed: int = 1) -> TensorDataset:
    """Examples with the classes that the classifier gives them, one in ten of them wrong."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 12, generator=generator)
    with torch.no_grad():
        labels = classifier()(inputs).argmax(-1)
    wrong = torch.rand(count, generator=generator) < 0.1
    return TensorDataset(inputs, torch.where(wrong, (labels + 1) % 3, labels))


def loader(count: int = 200, batch_size: int = 16) -> DataLoader[Any]:
    return DataLoader(labeled(count), batch_size=batch_size)


def smaller(keep: float = 0.5) -> nn.Module:
    model = compressor.compress(classifier(), keep=keep, prefer="size").model
    assert model is not None
    return model


def test_an_evaluation_has_the_values_of_the_metric_and_its_name() -> None:
    small, data = smaller(), loader()
    found = compressor.evaluate(small, baseline=classifier(), data=data, metric=f1)
    with torch.no_grad():
        assert found.compressed == f1(small, data)
        assert found.baseline == f1(classifier(), data)
    assert found.drop == found.baseline - found.compressed
    assert (found.metric, found.count, found.compressed_loss) == ("f1", 200, None)
    assert found.compressed_cost.macs is not None
    assert found.to_dict()["metric"] == "f1"
    assert {"f1_before", "f1_after", "drop"} <= found.metrics().keys()
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("kind", ["file", "pair", "loader", "list", "generator"])
def test_batches_are_pairs_however_the_data_are_given(kind: str, tmp_path: Path) -> None:
    inputs, labels = labeled(40).tensors
    np.savez(tmp_path / "data.npz", x=inputs.numpy(), y=labels.numpy())
    batches = list(loader(40))
    kinds = {
        "file": tmp_path / "data.npz",
        "pair": (inputs, labels),
        "loader": loader(40),
        "list": batches,
        "generator": iter(batches),
    }
    found = compressor.evaluate(classifier(), data=kinds[kind], metric=accuracy)
    assert found.compressed == compressor.evaluate(classifier(), data=(inputs, labels)).compressed
    assert found.count == 40


def test_a_transformers_model_gets_what_gives_it_a_loss(llama: Any) -> None:
    def loss(model: nn.Module, batches: Iterable[Any]) -> float:
        return float(torch.stack([model(**batch).loss for batch in batches]).mean())

    tokens = torch.randint(2, 12, (6, 10), generator=torch.Generator().manual_seed(0))
    found = compressor.evaluate(llama, data=tokens, metric=loss, higher_is_better=False)
    expected = compressor.evaluate(llama, data=tokens)
    assert found.compressed == pytest.approx(expected.compressed_loss, rel=1e-5)


def test_batches_that_only_the_metric_understands() -> None:
    """They are handed on as they are, and costs that need a forward are left out."""
    rows = [
        {"points": [torch.ones(2, 12), torch.zeros(1, 12)], "name": "a"},
        {"points": [torch.ones(3, 12)], "name": "b"},
    ]

    def mean(model: nn.Module, batches: Iterable[Any]) -> float:
        assert [batch["name"] for batch in batches] == ["a", "b"]
        return sum(float(model(torch.cat(batch["points"])).mean()) for batch in batches)

    found = compressor.evaluate(classifier(), data=rows, metric=mean)
    assert math.isfinite(found.compressed)
    assert (found.compressed_cost.macs, found.latency, found.task) == (None, (), "other")
    assert [row.label for row in _rows(found)] == ["parameters", "weights", "mean"]


def _rows(evaluation: Any) -> list[Any]:
    from compressor.report.comparison import evaluation_rows

    return evaluation_rows(evaluation)


# Budgets of quality


@pytest.mark.slow
def test_the_smallest_size_within_a_drop_in_f1() -> None:
    found = compressor.compress(classifier(), max_drop=0.1, data=loader(), metric=f1, allow_miss=True, prefer="size")
    search, evaluation = found.plan.search, found.evaluation
    assert search is not None
    assert evaluation is not None
    assert search.metric == evaluation.metric == "f1"
    assert 0 < found.plan.eligible_after < found.plan.eligible_before
    assert found.model is not None
    deciding, _ = halves(open_data(loader(), sample=Sample(metric=CustomMetric(f1))))
    before, after = (measure_quality(model, deciding).value for model in (classifier(), found.model))
    chosen = next(trial for trial in search.trials if trial.parameters == found.plan.eligible_after)
    assert chosen.drop == pytest.approx(before - after)
    assert chosen.bound <= 0.1
    assert "a drop in f1" in search_words(search)
    assert all("points" not in cell for row in search_rows(search) for cell in row)
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_metric_of_which_lower_is_better_and_a_drop_in_its_own_unit() -> None:
    torch.manual_seed(1)
    inputs = torch.randn(120, 12)
    with torch.no_grad():
        targets = classifier()(inputs) + 0.3 * torch.randn(120, 3)
    data = DataLoader(TensorDataset(inputs, targets), batch_size=10)
    options: Any = {"data": data, "metric": error, "higher_is_better": False}
    found = compressor.compress(classifier(), max_drop=2.0, prefer="size", **options)
    assert found.evaluation is not None
    assert found.evaluation.baseline is not None
    assert found.evaluation.drop == found.evaluation.compressed - found.evaluation.baseline
    assert found.evaluation.drop <= 2.0
    assert change_words("error", 0.5, higher_is_better=False) == "+0.5"
    assert change_words("error", 0.5, higher_is_better=True) == "-0.5"
    with pytest.raises(QualityGateNotMet, match="loses at most 1e-09 of error"):
        compressor.plan(classifier(), max_drop=1e-9, prefer="size", **options)


@pytest.mark.slow
def test_the_card_of_a_folder_names_the_metric(llama: Any, tmp_path: Path) -> None:
    def share(model: nn.Module, batches: Iterable[Any]) -> float:
        """Of tokens that are the likeliest."""
        return float(
            torch.stack([(model(**b).logits.argmax(-1) == b["labels"]).double().mean() for b in batches]).mean()
        )

    llama.save_pretrained(tmp_path / "model")
    tokens = torch.randint(2, 12, (6, 10), generator=torch.Generator().manual_seed(0))
    found = compressor.compress(
        tmp_path / "model",
        output=tmp_path / "small",
        keep=0.5,
        calibration="none",
        data=tokens,
        metric=share,
        prefer="size",
    )
    card = (tmp_path / "small" / "README.md").read_text()
    assert "| share |" in card
    assert "type: share" in card
    assert "6 examples" in card
    assert found.command.endswith("# and in Python metric")


# How sure a drop is


def lookup(right: Tensor) -> nn.Module:
    """A model that is right on the examples by number that it is told to be right on."""

    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.stack([~right, right], 1).float())

        def forward(self, numbers: Tensor) -> Tensor:
            return self.table[numbers.long().squeeze(-1)]

    return Lookup()


@pytest.mark.slow
def test_the_standard_error_of_accuracy_is_the_known_one() -> None:
    """The mean square of that estimated over many draws is that of the formula for a difference of paired means."""
    generator = torch.Generator().manual_seed(0)
    count, squares, known = 200, [], []
    for _ in range(40):
        before, after = (torch.rand(count, generator=generator) < share for share in (0.9, 0.8))
        numbers = torch.arange(count, dtype=torch.float32)[:, None], torch.ones(count, dtype=torch.int64)
        measured = []
        for metric in (CustomMetric(accuracy), None):
            data = open_data(numbers, sample=Sample(metric=metric))
            qualities = [measure_quality(lookup(right), data, replicates=True) for right in (before, after)]
            assert quality_drop(*qualities) == pytest.approx(float(before.double().mean() - after.double().mean()))
            measured.append(drop_error(*qualities) ** 2)
        squares.append(measured[0])
        known.append(measured[1])
    # 40 estimates of nine degrees of freedom each: one standard deviation of their mean is 7.5 %.
    assert np.mean(squares) == pytest.approx(np.mean(known), rel=0.25)


def test_an_error_is_estimated_of_a_metric_that_needs_every_class_in_order() -> None:
    """Examples in the order of their classes, as a folder has them: no part is of one class alone."""
    inputs, labels = labeled(60).tensors
    order = labels.argsort()
    data = open_data((inputs[order], labels[order]), sample=Sample(metric=CustomMetric(f1)))
    qualities = [measure_quality(model, data, replicates=True) for model in (classifier(), smaller(0.3))]
    assert len(qualities[0].replicates) == 10
    assert 0 < drop_error(*qualities) < 0.2


def test_few_batches_are_warned_of_and_one_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    batches = list(loader(60, batch_size=10))
    compressor.plan(classifier(), max_drop=0.5, data=batches, metric=f1, prefer="size")
    [warning] = [record.message for record in caplog.records if "standard error" in record.message]
    assert "has only 3" in warning
    assert "\n" not in warning
    with pytest.raises(BadInput, match="one batch cannot both decide and be measured"):
        compressor.plan(classifier(), max_drop=0.5, data=batches[:1], metric=f1, prefer="size")


def test_a_drop_of_which_a_part_has_no_value_is_never_sure() -> None:
    calls: list[int] = []

    def fragile(model: nn.Module, batches: Iterable[Any]) -> float:
        calls.append(1)
        return math.nan if len(calls) == 5 else 1.0

    data = open_data(labeled(40).tensors, sample=Sample(metric=CustomMetric(fragile)))
    qualities = [measure_quality(classifier(), data, replicates=True) for _ in range(2)]
    assert drop_error(*qualities) == math.inf


# What goes wrong


def failing(model: nn.Module, batches: Iterable[Any]) -> float:
    raise KeyError("no\nsuch key")


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (failing, "the metric failing raised KeyError: "),
        (lambda model, batches: math.nan, "the metric metric returned NaN"),
        (lambda model, batches: torch.ones(3), "the metric metric returned a Tensor"),
        (lambda model, batches: None, "the metric metric returned a NoneType"),
        (lambda model, batches: "0.5", "the metric metric returned a str"),
        ("f1", "`metric` is of type str, which cannot be called"),
    ],
)
def test_a_metric_that_fails_is_named_in_one_line(metric: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        compressor.evaluate(classifier(), data=loader(20), metric=metric)
    assert caught.value.option == "metric"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("returned", [torch.tensor(0.25), torch.tensor([0.25]), np.float32(0.25), 0.25])
def test_numbers_of_any_kind_are_values(returned: Any) -> None:
    assert compressor.evaluate(classifier(), data=loader(20), metric=lambda *_: returned).compressed == 0.25


def test_a_metric_that_is_not_a_number_for_a_smaller_model_lets_nothing_pass() -> None:
    dense = classifier()
    size = sum(each.numel() for each in dense.parameters())

    def broken(model: nn.Module, batches: Iterable[Any]) -> float:
        return 1.0 if sum(each.numel() for each in model.parameters()) >= size else math.nan

    with pytest.raises(QualityGateNotMet, match="no size was found"):
        compressor.plan(dense, max_drop=0.5, data=loader(40), metric=broken, prefer="size")


def test_a_metric_needs_data_and_a_direction_a_metric() -> None:
    with pytest.raises(BadInput, match="`metric` is measured on data"):
        compressor.plan(classifier(), keep=0.5, metric=f1)
    with pytest.raises(BadInput, match="`higher_is_better` is about `metric`"):
        compressor.evaluate(classifier(), data=loader(20), higher_is_better=False)


def test_the_name_of_a_metric() -> None:
    class Metric:
        def __call__(self, model: nn.Module, batches: Iterable[Any]) -> float:
            return 0.0

    named = [CustomMetric(each).name for each in (f1, partial(f1), Metric(), lambda *_: 0.0)]
    assert named == ["f1", "f1", "Metric", "metric"]


def test_the_model_is_left_as_it_was_found() -> None:
    def trains(model: nn.Module, batches: Iterable[Any]) -> float:
        assert not model.training
        model.train()
        return 1.0

    model = classifier()
    data = open_data(labeled(8).tensors, sample=Sample(metric=CustomMetric(trains)))
    compare(None, model, data, timing=None)
    assert not model.training
