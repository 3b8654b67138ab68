"""Data sets of the `datasets` library, which nothing here imports, as data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow
from torch import nn
from transformers import PreTrainedTokenizerFast

import compressor
from compressor.data import Preprocessing, open_data
from compressor.errors import BadInput

datasets = pytest.importorskip("datasets")
TEXTS = ["abc abc abd", "bcd bcd abc", "hab cab dab"]


def table(**columns: Any) -> Any:
    return datasets.Dataset.from_dict(columns)


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
def test_columns_of_numbers_are_those_of_arrays(form: str | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    inputs, labels = torch.randn(24, 6), torch.arange(24) % 3
    given = table(id=list(range(24)), inputs=inputs.tolist(), label=labels.tolist()).with_format(form)
    expected: Any = (inputs, labels)
    found = [compressor.evaluate(model, data=data) for data in (given, expected)]
    assert found[0].compressed_loss == found[1].compressed_loss
    plans = [
        compressor.plan(model, keep=0.5, calibration=data, effort="balanced", prefer="size", bits=16)
        for data in (given, expected)
    ]
    assert plans[0].layers == plans[1].layers


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
def test_labels_go_by_the_names_that_they_have_in_a_file(form: str | None) -> None:
    given = table(x=[[1.0, 2.0], [3.0, 4.0]], y=[1, 0]).with_format(form)
    [batch] = open_data(given, Preprocessing(inputs=("input",)))
    assert batch.labels.tolist() == [1, 0]
    for targets in ([0.5, 1.5], ["a", "b"]):
        [batch] = open_data(table(x=[[1.0, 2.0], [3.0, 4.0]], targets=targets), Preprocessing(inputs=("input",)))
        assert batch.labels.numel() == 0


@pytest.mark.parametrize("streamed", [False, True])
def test_texts_are_those_of_a_list(streamed: bool, tokenizer: PreTrainedTokenizerFast) -> None:
    given = table(text=TEXTS, id=[0, 1, 2])
    preprocessing = Preprocessing(tokenizer=tokenizer, sequence_length=5)
    found = list(open_data(given.to_iterable_dataset() if streamed else given, preprocessing))
    expected = list(open_data(TEXTS, preprocessing))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.inputs["input_ids"], other.inputs["input_ids"])


@pytest.mark.parametrize("named", [False, True])
def test_labels_are_numbers_of_classes(named: bool, tokenizer: PreTrainedTokenizerFast) -> None:
    given = table(text=TEXTS, label=[0, 1, 0])
    given = given.cast_column("label", datasets.ClassLabel(names=["bad", "good"])) if named else given
    data = open_data(given.with_format("torch"), Preprocessing(tokenizer=tokenizer))
    [batch] = data
    assert data.task == "text-classification"
    assert batch.labels.tolist() == [0, 1, 0]


def test_tokens_of_different_lengths_are_padded_and_other_columns_are_left_out() -> None:
    given = table(input_ids=[[1, 2, 3], [4]], labels=[[1, 2, 3], [4]], name=["a", "b"])
    [batch] = open_data(given, Preprocessing(inputs=("input_ids", "attention_mask", "labels")))
    assert batch.inputs["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[2, 3], [-100, -100]]


def test_tokens_come_before_the_texts_that_they_were_made_of() -> None:
    given = table(text=TEXTS, input_ids=[[1, 2]] * 3, label=[0, 1, 0])
    [batch] = open_data(given, Preprocessing(inputs=("input_ids", "labels")))
    assert batch.inputs["input_ids"].tolist() == [[1, 2]] * 3


def test_images_are_those_of_a_folder(tmp_path: Path) -> None:
    images = [
        Pillow.fromarray(each) for each in np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    ]
    for number, image in enumerate(images):
        (tmp_path / str(number // 2)).mkdir(exist_ok=True)
        image.save(tmp_path / str(number // 2) / f"{number}.png")
    given = table(image=images, label=[0, 0, 1, 1]).cast_column("image", datasets.Image())
    [found], [expected] = open_data(given), open_data(tmp_path)
    assert torch.equal(found.inputs["pixel_values"], expected.inputs["pixel_values"])
    assert found.labels.tolist() == expected.labels.tolist()


def test_a_data_set_is_called_by_its_name_and_split() -> None:
    given = table(inputs=[[1.0], [2.0]], label=[0, 1])
    assert open_data(given).name == "Dataset"
    named = datasets.Dataset(given.data, info=datasets.DatasetInfo(dataset_name="imdb"), split="test")
    assert open_data(named).name == "imdb, test split"


def test_what_a_model_does_not_take_is_refused_in_one_line() -> None:
    with pytest.raises(BadInput, match="the columns are sentence, label, none of which the model takes"):
        open_data(table(sentence=TEXTS, label=[0, 1, 0]), Preprocessing(inputs=("input_ids",)))
    with pytest.raises(BadInput, match=r"it holds several data sets: train; .*`data=data\['train'\]`"):
        open_data(datasets.DatasetDict({"train": table(x=[1])}))
