"""Which of the examples given for calibration are used, and what their loss is called."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from itertools import count, islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import compressor
from compressor.calibration import CalibrationData, split_examples
from compressor.data import Batch, Sample, open_data
from compressor.data.objects import MOST_WITHOUT_LENGTH
from compressor.planning import CalibrationResult
from compressor.report.wording import calibration_words, loss_name

torch.set_num_threads(1)


def images(sizes: Iterable[int]) -> list[Tensor]:
    numbers = count()
    return [torch.tensor([[float(next(numbers))] for _ in range(size)]) for size in sizes]


def used(data: CalibrationData) -> list[float]:
    return sorted(x for batch in (*data.fit, *data.holdout) for x in batch.inputs["inputs"].flatten().tolist())


def split(data: Any, samples: int | None = None) -> CalibrationData:
    return split_examples(open_data(data, sample=Sample(limit=samples, option="calibration")))


@given(st.lists(st.integers(1, 90), min_size=2, max_size=9))
def test_batches_that_were_made_by_the_user_are_used_whole(sizes: list[int]) -> None:
    for data in (images(sizes), iter(images(sizes))):
        found = split(data)
        assert used(found) == list(range(sum(sizes)))
        assert found.unused == ""


@given(st.lists(st.integers(1, 90), min_size=2, max_size=9), st.integers(2, 300))
def test_as_many_examples_are_used_as_were_asked_for(sizes: list[int], samples: int) -> None:
    found = split(images(sizes), samples)
    taken = used(found)
    assert len(taken) <= samples
    assert len(taken) == samples or len(found.fit) + len(found.holdout) == len(sizes)
    assert bool(found.unused) == (len(taken) < sum(sizes))


@pytest.mark.parametrize(
    ("sizes", "samples", "unused"),
    [
        ((500, 500), 128, "872 examples of batches used in part"),
        ((400, 400, 400), 128, "672 examples of batches used in part, and 1 of 3 batches"),
        ((64, 64, 64), 128, "1 of 3 batches"),
    ],
)
def test_what_a_batch_has_more_than_was_used_of_it_is_counted(
    sizes: tuple[int, ...], samples: int, unused: str
) -> None:
    assert split(images(sizes), samples).unused == unused


def endless(size: int = 64) -> Iterator[Tensor]:
    for _ in count():
        yield torch.zeros(size, 1)


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return (torch.zeros(1) for _ in count())


@pytest.mark.parametrize("data", [endless(), DataLoader(Stream(), batch_size=64)])
def test_what_may_never_end_is_refused_until_a_limit_is_given(data: Iterable[Any]) -> None:
    with pytest.raises(compressor.BadInput, match=r"no length.*calibration_samples"):
        split(data)
    assert len(used(split(data, 100))) == 100


def test_an_iterator_that_ends_is_used_whole() -> None:
    assert len(used(split(islice(endless(), MOST_WITHOUT_LENGTH // 64)))) == MOST_WITHOUT_LENGTH


def test_a_loader_of_500_images_is_used_whole_and_less_is_said(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
    loader = DataLoader(TensorDataset(torch.randn(500, 8), torch.randint(0, 5, (500,))), batch_size=64)
    with caplog.at_level(logging.INFO, "compressor.calibration.examples"):
        whole = compressor.plan(
            model, keep=0.5, calibration=loader, effort="balanced", prefer="size", bits=16
        ).calibration
        part = compressor.plan(
            model, keep=0.5, calibration=loader, calibration_samples=128, effort="balanced", prefer="size", bits=16
        ).calibration
    assert whole is not None
    assert part is not None
    assert (whole.examples + whole.holdout, whole.unused) == (500, "")
    assert (part.examples, part.holdout, part.unused) == (96, 32, "372 of 500 examples")
    assert "not used: 372 of 500 examples" in calibration_words(part)
    assert [record.message.rpartition("; ")[2] for record in caplog.records] == [
        "not used: nothing",
        "not used: 372 of 500 examples",
    ]


def test_of_named_data_128_examples_are_used_and_the_rest_is_said() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    found = compressor.plan(
        model, keep=0.5, calibration="builtin:digits", effort="balanced", prefer="size", bits=16
    ).calibration
    assert found is not None
    assert (found.examples + found.holdout, found.unused) == (128, "950 of 1,078 examples")


@pytest.mark.parametrize("labeled", [True, False])
def test_a_calibrated_loss_has_its_own_unit_wherever_it_is_told(labeled: bool) -> None:
    """A model with labels predicts; without any it is not known to, and its outputs are what changes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5))
    inputs, labels = torch.randn(6, 8, 8), torch.randint(0, 5, (6, 8))
    batches = list(zip(inputs, labels, strict=True)) if labeled else list(inputs)
    found = compressor.compress(model, keep=0.5, calibration=batches, effort="balanced", prefer="size", bits=16)
    calibration = found.plan.calibration
    assert calibration is not None
    assert found.curve is not None
    unit = "nats per prediction" if labeled else "half the squared change of the outputs"
    assert calibration.unit == found.curve.unit == found.to_dict()["calibration"]["unit"] == unit
    assert unit in calibration_words(calibration)
    assert ("nats" in calibration_words(calibration)) == labeled
    assert ("nats" in loss_name(found.curve.unit)) == labeled
    named = {"predicted_loss", "holdout_loss"} if labeled else {"predicted_output_change", "holdout_output_change"}
    assert {name for name in found.metrics() if name.startswith(("predicted", "holdout"))} == named


def test_what_was_not_used_is_said_only_where_something_was_not() -> None:
    assert "not used" not in calibration_words(CalibrationResult(96, 32, 1.0, 0.01, 0.02))


@pytest.mark.parametrize(
    ("every", "backward_every", "backward"),
    [(1, 4, [0, 4, 8]), (2, 4, [0, 4, 8]), (3, 4, [0, 6]), (3, 3, [0, 3, 6, 9]), (3, 1, [0, 3, 6, 9])],
)
def test_of_some_batches_about_as_many_are_run_backward_as_of_all(
    every: int, backward_every: int, backward: list[int]
) -> None:
    batches = tuple(Batch({"inputs": torch.zeros(1, 2)}, torch.empty(0)) for _ in range(12))
    slices = CalibrationData(batches, batches[:1], labeled=False).slices(2, backward_every=backward_every, every=every)
    assert [chunk.batch for each in slices for chunk in each.chunks] == list(range(0, 12, every))
    assert [chunk.batch for each in slices for chunk in each.backward] == backward
