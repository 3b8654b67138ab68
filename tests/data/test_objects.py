"""Objects as data: the same examples are the same data, however they are given."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torch.utils.data import Dataset as TorchDataset
from transformers import PreTrainedTokenizerFast, ViTImageProcessor

import compressor
from compressor.data import Batch, EvaluationData, Preprocessing, Sample, halves, open_data, require_apart
from compressor.data.objects import Given, contents_of
from compressor.data.readers import Batches
from compressor.errors import BadInput

torch.set_num_threads(1)
INPUTS, LABELS = torch.randn(24, 6, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3


class Rows(TorchDataset[Any]):
    """Any examples by position."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


class Stream(IterableDataset[Any]):
    """Any examples one after another."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))


def pairs() -> list[Any]:
    return list(zip(INPUTS, LABELS.tolist(), strict=True))


def npz(folder: Path) -> Path:
    np.savez(folder / "data.npz", inputs=INPUTS.numpy(), labels=LABELS.numpy())
    return folder / "data.npz"


LABELED: dict[str, Callable[[], Any]] = {
    "tensors": lambda: (INPUTS, LABELS),
    "arrays": lambda: (INPUTS.numpy(), LABELS.numpy()),
    "array and list": lambda: (INPUTS.numpy(), LABELS.tolist()),
    "mapping": lambda: {"x": INPUTS.double(), "y": LABELS.numpy()},
    "torch data set": lambda: TensorDataset(INPUTS, LABELS),
    "pairs": lambda: Rows(pairs()),
    "loader": lambda: DataLoader(TensorDataset(INPUTS, LABELS), batch_size=32),
    "stream": lambda: Stream(pairs()),
}
BATCHES: dict[str, Callable[[], Any]] = {
    "list": lambda: list(DataLoader(TensorDataset(INPUTS, LABELS), batch_size=4)),
    "generator": lambda: (batch for batch in DataLoader(TensorDataset(INPUTS, LABELS), batch_size=4)),
    "arrays": lambda: [(x.numpy(), y.numpy()) for x, y in zip(INPUTS.split(4), LABELS.split(4), strict=True)],
    "mappings": lambda: [{"x": x, "label": y} for x, y in zip(INPUTS.split(4), LABELS.split(4), strict=True)],
    "loader of a stream": lambda: DataLoader(Stream(pairs()), batch_size=4),
}


def stored(data: Any) -> list[Tensor]:
    """The tensors of a model that was calibrated on some data."""
    result = compressor.compress(network(), keep=0.5, calibration=data, effort="balanced", prefer="size", bits=16)
    assert result.model is not None
    return list(result.model.state_dict().values())


def quality(data: Any) -> tuple[float, float, int]:
    found = compressor.evaluate(network(), data=data)
    return found.compressed, found.compressed_loss, found.count


@pytest.fixture(scope="module")
def from_a_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Tensor], tuple[float, float, int]]:
    path = npz(tmp_path_factory.mktemp("data"))
    return stored(path), quality(path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LABELED)
def test_the_same_examples_give_the_same_bytes_and_the_same_evaluation(
    kind: str, from_a_file: tuple[list[Tensor], tuple[float, float, int]]
) -> None:
    tensors, measured = from_a_file
    for one, other in zip(stored(LABELED[kind]()), tensors, strict=True):
        assert torch.equal(one, other)
    assert quality(LABELED[kind]()) == measured


@pytest.mark.slow
@pytest.mark.parametrize("kind", BATCHES)
def test_the_same_batches_give_the_same_bytes_and_the_evaluation_of_a_file(
    kind: str, from_a_file: tuple[list[Tensor], tuple[float, float, int]]
) -> None:
    for one, other in zip(stored(BATCHES[kind]()), stored(BATCHES["list"]()), strict=True):
        assert torch.equal(one, other)
    assert quality(BATCHES[kind]()) == pytest.approx(from_a_file[1], rel=1e-6)


@pytest.mark.parametrize("kind", LABELED)
def test_the_same_size_is_found_for_a_drop(kind: str, tmp_path: Path) -> None:
    found, expected = (
        compressor.plan(network(), max_drop=0.5, data=data, prefer="size") for data in (LABELED[kind](), npz(tmp_path))
    )
    assert found.search is not None
    assert expected.search is not None
    assert found.search.trials == expected.search.trials


@pytest.mark.slow
def test_the_other_verbs_take_the_same_objects(tmp_path: Path) -> None:
    path = npz(tmp_path)
    found, expected = (compressor.diagnose(network(), data=data) for data in ((INPUTS, LABELS), path))
    assert found.predictions is not None
    assert expected.predictions is not None
    assert (found.predictions.value, found.predictions.loss) == (expected.predictions.value, expected.predictions.loss)
    parts = [tmp_path / "a.pt", tmp_path / "b.pt"]
    for part in parts:
        torch.save(network().state_dict(), part)
    loader = DataLoader(TensorDataset(INPUTS, LABELS), batch_size=8)
    options: Any = {"output": tmp_path / "merged.safetensors", "mode": "concat", "factory": network}
    merged = compressor.merge(parts, data=[loader, path], **options)
    tasks = [(task.alone, task.merged, task.count) for task in merged.tasks]
    assert tasks[0] == tasks[1]


def rows_of(data: EvaluationData) -> list[float]:
    return [float(row[0]) for batch in data for row in next(iter(batch.inputs.values()))]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 30))
def test_halves_of_batches_have_every_example_once(sizes: list[int], limit: int) -> None:
    numbers = count()
    batches = [torch.tensor([[float(next(numbers))] for _ in range(size)]) for size in sizes]
    data = open_data(iter(batches), sample=Sample(limit=limit))
    used = rows_of(data)
    assert len(used) == min(limit, sum(sizes))
    if data.count > 1:
        assert sorted(row for half in halves(data) for row in rows_of(half)) == used


def test_batches_of_different_shapes_are_kept_whole() -> None:
    batches = [{"input_ids": torch.ones(2, length, dtype=torch.int64)} for length in (3, 4, 3, 5)]
    data = open_data(batches)
    assert (data.count, data.batch_size) == (4, 1)
    assert [batch.inputs["input_ids"].shape[1] for half in halves(data) for batch in half] == [3, 3, 4, 5]


def test_a_shuffled_loader_is_read_in_one_order_every_time() -> None:
    data = open_data(DataLoader(TensorDataset(INPUTS, LABELS), batch_size=5, shuffle=True))
    assert rows_of(data) == rows_of(data)
    assert sorted(rows_of(data)) == sorted(INPUTS[:, 0].tolist())
    assert data.batch_size == 5


def test_the_workers_of_a_loader_read_ahead() -> None:
    class Process(TorchDataset[Any]):
        """Tells which process reads it."""

        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            return torch.tensor([float(index)]), torch.tensor(os.getpid())

    data = open_data(DataLoader(Process(), batch_size=4, num_workers=1), sample=Sample(limit=6))
    assert rows_of(data) == [0, 2, 4, 6, 8, 10]
    for part in (data, *halves(data)):
        assert {int(each) for batch in part for each in batch.labels}.isdisjoint({os.getpid()})


def test_the_function_of_a_loader_makes_its_batches() -> None:
    def collate(rows: list[Any]) -> dict[str, Tensor]:
        return {"x": torch.stack([x for x, _ in rows]) + 1, "labels": torch.tensor([y for _, y in rows])}

    [batch] = open_data(DataLoader(TensorDataset(INPUTS, LABELS), batch_size=24, collate_fn=collate))
    assert torch.equal(batch.inputs["x"], INPUTS + 1)
    assert torch.equal(batch.labels, LABELS)


def test_images_without_labels_calibrate() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    images = torch.randn(12, 3, 6, 6)
    found = compressor.plan(model, keep=0.6, calibration=images, effort="balanced", prefer="size", bits=16).calibration
    assert found is not None
    assert (found.examples, found.holdout) == (9, 3)
    with pytest.raises(BadInput, match="no labels to measure by"):
        compressor.evaluate(model, data=images)


@pytest.mark.slow
def test_of_examples_128_are_used_by_default_and_of_batches_all() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    inputs = torch.randn(300, 6)
    for data, used in ((inputs, 128), (TensorDataset(inputs), 128), (list(inputs.split(50)), 300)):
        found = compressor.plan(
            model, keep=0.5, calibration=data, effort="balanced", prefer="size", bits=16
        ).calibration
        assert found is not None
        assert found.examples + found.holdout == used
    part = compressor.plan(
        model, keep=0.5, calibration=inputs, calibration_samples=16, effort="balanced", prefer="size", bits=16
    ).calibration
    assert part is not None
    assert part.examples + part.holdout == 16


# Texts


TEXTS = ["abc abc abd", "bcd bcd abc", "hab cab dab"]


def text_rows(data: Any, tokenizer: PreTrainedTokenizerFast, **options: Any) -> list[Batch]:
    return list(open_data(data, Preprocessing(tokenizer=tokenizer, **options)))


@pytest.mark.parametrize(
    "data",
    [
        TEXTS,
        iter(TEXTS),
        Rows(TEXTS),
        Stream(TEXTS),
        {"text": TEXTS},
        [{"text": text} for text in TEXTS],
    ],
    ids=["list", "iterator", "data set", "stream", "columns", "rows"],
)
def test_texts_are_those_of_a_file(data: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS))
    found, expected = (text_rows(each, tokenizer, sequence_length=5) for each in (data, path))
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.inputs["input_ids"], other.inputs["input_ids"])


@pytest.mark.parametrize(
    "data",
    [
        (TEXTS, [0, 1, 0]),
        {"text": TEXTS, "label": np.array([0, 1, 0])},
        Rows(list(zip(TEXTS, [0, 1, 0], strict=True))),
    ],
    ids=["pair", "columns", "data set"],
)
def test_labeled_texts_are_classified(data: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    opened = open_data(data, Preprocessing(tokenizer=tokenizer))
    [batch] = opened
    assert opened.task == "text-classification"
    assert batch.labels.tolist() == [0, 1, 0]
    assert batch.inputs["input_ids"].shape == (3, 11)


def test_token_ids_of_different_lengths_are_padded_and_masked() -> None:
    rows = Rows([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4], "labels": [4]}])
    [batch] = open_data(rows, Preprocessing(inputs=("input_ids", "attention_mask", "labels")))
    assert batch.inputs["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[2, 3], [-100, -100]]


def test_labels_of_padded_texts_are_as_they_were() -> None:
    rows = Rows([{"input_ids": [1, 2, 3], "label": 1}, {"input_ids": [4], "label": 0}])
    [batch] = open_data(rows)
    assert batch.labels.tolist() == [1, 0]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_a_label_for_every_frame_is_not_shifted() -> None:
    labels = torch.arange(20).view(2, 10) % 3
    data = open_data([{"frames": torch.randn(2, 10, 4), "labels": labels}])
    [batch] = data
    assert data.task == "text-classification"
    assert torch.equal(batch.labels, labels)


def test_shifted_tokens_are_language_modeling() -> None:
    tokens = torch.arange(20).view(2, 10)
    data = open_data([(tokens[:, :-1], tokens[:, 1:])])
    [batch] = data
    assert data.task == "language-modeling"
    assert torch.equal(batch.labels, tokens[:, 1:-1])


# Images


def test_images_in_memory_are_those_of_a_folder(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    images = [Pillow.fromarray(each) for each in pixels]
    for number, image in enumerate(images):
        folder = tmp_path / str(number % 2)
        folder.mkdir(exist_ok=True)
        image.save(folder / f"{number // 2}.png")
    order, labels = [0, 2, 1, 3], [0, 0, 1, 1]
    ordered = [images[number] for number in order]
    given = (Rows(list(zip(ordered, labels, strict=True))), Stream(list(zip(ordered, labels, strict=True))))
    for processor in (
        None,
        ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.25] * 3),
    ):
        [expected] = open_data(tmp_path, Preprocessing(image_processor=processor))
        for data in given:
            [batch] = open_data(data, Preprocessing(image_processor=processor))
            assert torch.equal(batch.inputs["pixel_values"], expected.inputs["pixel_values"])
            assert batch.labels.tolist() == expected.labels.tolist() == labels
    for images in (Rows(ordered), ordered, iter(ordered)):
        [unlabeled] = open_data(images)
        assert unlabeled.labels.numel() == 0
        assert unlabeled.examples == len(ordered)


def test_arrays_of_either_byte_order_are_the_same_numbers() -> None:
    for order in "<>":
        array = INPUTS.numpy().astype(np.dtype(np.float32).newbyteorder(order))
        [batch] = open_data(array)
        assert torch.equal(batch.inputs["inputs"], INPUTS)


# What is no data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (42, "`data` is of type int"),
        (nn.Linear(2, 2), "`data` is of type Linear"),
        ([], "the data yields 0 batches"),
        ([[]], "the data yields list"),
        (list(zip(INPUTS, LABELS, strict=True)), "yields single examples; yield batches of them, or give a `Dataset`"),
        (DataLoader(TensorDataset(INPUTS, LABELS), batch_size=None), "yields single examples"),
        (Rows([]), "there is no example"),
        ((INPUTS, INPUTS), "may be two batches; give a list of batches"),
        ((INPUTS, "labels"), "are not inputs and their labels"),
        ((INPUTS, LABELS[:5]), r"`labels` is of shape \(5,\) for 24 inputs"),
        ({"text": TEXTS, "label": [0]}, "its columns differ in length: text 3, label 1"),
        ({"x": INPUTS, "y": ["a"] * 24}, "`y` is of type list"),
        ({"nothing": INPUTS}, "it holds nothing, where exactly one of inputs"),
        (torch.ones(3, 2, dtype=torch.uint8), "is of uint8; store it as the floats"),
        (torch.ones(3, 2, device="meta"), "is on the meta device"),
        (torch.full((3, 2), np.nan), "has NaN or Inf in it"),
        ([__file__], "is the path of a file; give `data` one path"),
        ([Path(__file__)], "the data yields PosixPath"),
        (Rows([torch.ones(2), torch.ones(3)]), "the examples do not go into one batch"),
        (DataLoader(TensorDataset(INPUTS[:3]), batch_size=4, drop_last=True), "the data yields 0 batches"),
        (Stream(torch.ones(1) for _ in count()), "no length, and go on .*`data_samples`"),
    ],
)
def test_what_is_no_data_is_refused_in_one_line(data: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        list(open_data(data))
    assert "\n" not in str(caught.value)


def test_what_can_be_read_once_is_kept_only_as_far_as_it_fits() -> None:
    batches = [torch.ones(4, 100) for _ in range(3)]
    assert isinstance(contents_of(Given(batches, "data", most_bytes=1000)), Batches)
    with pytest.raises(BadInput, match=r"can be read only once, and has more than .*`data_samples`"):
        contents_of(Given(iter(batches), "data", most_bytes=1000))


def test_the_same_object_for_calibration_and_measuring_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    require_apart(INPUTS, INPUTS)
    assert "the same object" in caplog.text
