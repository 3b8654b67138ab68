"""Every kind of data: what was written is what is read, in order, any number of times; and all that can be wrong."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import ViTImageProcessor

from compressor.data import Batch, EvaluationData, Preprocessing, Sample, open_data
from compressor.data.builtin_data import digits, standard_library_text
from compressor.errors import BadInput
from compressor.evaluation import measure_quality


def inputs_of(data: EvaluationData) -> Tensor:
    return torch.cat([next(iter(batch.inputs.values())) for batch in data])


def labels_of(data: EvaluationData) -> list[int]:
    return torch.cat([batch.labels for batch in data]).tolist()


def vit_processor(**changes: object) -> ViTImageProcessor:
    settings = {"size": {"height": 8, "width": 8}, "image_mean": [0.5], "image_std": [0.25], **changes}
    return ViTImageProcessor(**settings)


def save_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three gray images of 6 x 5 pixels in each of the classes cat, dog and eel."""
    generator = np.random.default_rng(0)
    for name in ("dog", "cat", "eel"):
        for number in range(3):
            pixels = generator.integers(0, 256, (5, 6), dtype=np.uint8)
            save_image(tmp_path / "images" / name / f"{number}.png", pixels)
    return tmp_path / "images"


# Batches


@settings(max_examples=25)
@given(count=st.integers(1, 20), batch_size=st.integers(1, 9), limit=st.none() | st.integers(1, 25))
def test_batches_hold_every_example_once_in_order_every_time(tmp_path_factory, count, batch_size, *, limit):
    path = tmp_path_factory.mktemp("arrays") / "data.npz"
    np.savez(path, x=np.arange(count, dtype=np.float32)[:, None], y=np.arange(count))
    data = open_data(path, sample=Sample(limit=limit), batch_size=batch_size)

    kept = count if limit is None else min(limit, count)
    assert data.count == kept
    assert [len(batch.labels) for batch in data][:-1] == [batch_size] * ((kept - 1) // batch_size)
    labels = labels_of(data)
    assert len(labels) == kept
    assert labels == labels_of(data)
    assert labels == inputs_of(data).flatten().tolist()
    # evenly spaced: strictly increasing from the first on, by the same step to within one
    steps = np.diff([*labels, count])
    assert labels[0] == 0
    assert max(steps) - min(steps) <= 1
    assert min(steps) >= 1


def test_data_in_memory_can_be_given_to_another_process(tmp_path):
    np.savez(tmp_path / "data.npz", x=np.arange(7, dtype=np.float32)[:, None], y=np.arange(7))
    data = open_data(tmp_path / "data.npz", batch_size=3)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(data)
    held = pickle.loads(pickle.dumps(data.in_memory()))
    assert [batch.labels.tolist() for batch in held] == [[0, 1, 2], [3, 4, 5], [6]]
    assert inputs_of(held).tolist() == inputs_of(data).tolist()
    assert (held.name, held.task, held.count) == (data.name, data.task, 3)
    assert held.read([1]).labels.tolist() == [3, 4, 5]


@pytest.mark.parametrize(("option", "value"), [("limit", 0), ("limit", -1), ("batch_size", 0), ("sequence_length", 1)])
def test_impossible_numbers_are_bad_input(option, value):
    preprocessing = Preprocessing(sequence_length=value) if option == "sequence_length" else None
    sample = Sample(limit=value) if option == "limit" else None
    with pytest.raises(BadInput, match=f"{option} is {value}"):
        open_data("builtin:digits", preprocessing, sample, batch_size=value if option == "batch_size" else 32)


# Language modeling


@settings(max_examples=25)
@given(length=st.integers(2, 60), window=st.integers(2, 70))
def test_windows_are_the_text_cut_without_overlap(tmp_path_factory, tokenizer, length, *, window):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(("abcdefgh" * 10)[:length])
    data = open_data(path, Preprocessing(tokenizer=tokenizer, sequence_length=window), batch_size=3)
    ids = torch.tensor(tokenizer(path.read_text())["input_ids"])

    assert data.task == "language-modeling"
    size = min(window, length)
    assert data.count == length // size
    windows = inputs_of(data)
    assert torch.equal(windows.flatten(), ids[: data.count * size])
    assert torch.equal(torch.cat([batch.labels for batch in data]), windows[:, 1:])


def test_documents_of_a_folder_are_joined_in_the_order_of_their_paths(tmp_path, tokenizer):
    for name, text in (("b.md", "bb"), ("sub/c.py", "cc"), ("a.txt", "aa"), ("ignored.log", "dd")):
        path = tmp_path / "texts" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    (tmp_path / "whole.txt").write_text("aa\n\nbb\n\ncc")
    (tmp_path / "lines.jsonl").write_text('{"text": "aa"}\n\n{"text": "bb"}\n{"text": "cc"}\n')
    (tmp_path / "rows.csv").write_text("id,text\n1,aa\n2,bb\n3,cc\n")
    whole = inputs_of(open_data(tmp_path / "whole.txt", Preprocessing(tokenizer=tokenizer)))
    for name in ("texts", "lines.jsonl", "rows.csv"):
        data = open_data(tmp_path / name, Preprocessing(tokenizer=tokenizer))
        assert data.task == "language-modeling"
        assert torch.equal(inputs_of(data), whole)


def test_without_a_length_the_window_is_the_tokenizers_longest_up_to_2048(tmp_path, tokenizer, caplog):
    path = tmp_path / "text.txt"
    path.write_text("abcd" * 1500)
    assert inputs_of(open_data(path, Preprocessing(tokenizer=tokenizer))).shape == (2, 2048)
    longest = tokenizer.model_max_length
    tokenizer.model_max_length = 100
    try:
        assert inputs_of(open_data(path, Preprocessing(tokenizer=tokenizer))).shape == (60, 100)
    finally:
        tokenizer.model_max_length = longest
    assert caplog.text == ""


def test_the_standard_library_is_text():
    def code_points(text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}

    data = open_data(
        "builtin:stdlib", Preprocessing(tokenizer=code_points, sequence_length=64), Sample(split="validation", limit=3)
    )
    windows = inputs_of(data)
    text = standard_library_text("validation")
    third = len(text) // 64 // 3 * 64
    assert windows.shape == (3, 64)
    assert "".join(map(chr, windows[0])) == text[:64]
    assert "".join(map(chr, windows[1])) == text[third : third + 64]
    assert data.name == "builtin:stdlib, validation split"


def test_token_ids_alone_are_windows(tmp_path):
    windows = np.arange(24).reshape(4, 6)
    np.savez(tmp_path / "ids.npz", input_ids=windows)
    data = open_data(tmp_path / "ids.npz")
    assert data.task == "language-modeling"
    assert inputs_of(data).tolist() == windows.tolist()
    np.savez(tmp_path / "short.npz", input_ids=windows[:, :1])
    with pytest.raises(BadInput, match=r"without labels are of shape \(4, 1\)"):
        open_data(tmp_path / "short.npz")


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no text in it"), (" \n\n", "no text in it"), ("a", "1 token long, too short")],
)
def test_text_without_a_prediction_is_bad_input(tmp_path, tokenizer, text, *, message):
    path = tmp_path / "text.txt"
    path.write_text(text)
    with pytest.raises(BadInput, match=message):
        open_data(path, Preprocessing(tokenizer=tokenizer))


@pytest.mark.parametrize(
    ("name", "text"), [("a.txt", "abc"), ("a.jsonl", '{"text": "abc", "label": 0}'), ("a.csv", "text\nabc\n")]
)
def test_text_without_a_tokenizer_is_bad_input(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match="needs the model's tokenizer"):
        open_data(tmp_path / name)


def test_text_that_is_not_utf8_is_bad_input(tmp_path, tokenizer):
    (tmp_path / "latin.txt").write_bytes("abc é".encode("latin-1"))
    with pytest.raises(BadInput, match="not UTF-8 text, at byte 4"):
        open_data(tmp_path / "latin.txt", Preprocessing(tokenizer=tokenizer))


# Text classification


def test_labeled_texts_round_trip(tmp_path, tokenizer):
    rows = [("ab", 1), ("cde fgh", 0), ('a "b",\nc', 2)]
    jsonl, table = tmp_path / "texts.jsonl", tmp_path / "texts.csv"
    jsonl.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in rows))
    table.write_text('label,text\n1,ab\n0,cde fgh\n2,"a ""b"",\nc"\n')
    expected = tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")
    for path in (jsonl, table):
        data = open_data(path, Preprocessing(tokenizer=tokenizer))
        assert data.task == "text-classification"
        (batch,) = data
        assert batch.labels.tolist() == [1, 0, 2]
        assert set(batch.inputs) == set(expected)
        assert all(torch.equal(batch.inputs[name], expected[name]) for name in expected)


def test_long_texts_are_cut(tmp_path, tokenizer):
    (tmp_path / "texts.jsonl").write_text('{"text": "abcdef", "label": 0}')
    (batch,) = open_data(tmp_path / "texts.jsonl", Preprocessing(tokenizer=tokenizer, sequence_length=4))
    assert batch.inputs["input_ids"].tolist() == [tokenizer("abcd")["input_ids"]]


def test_without_a_padding_token_texts_come_one_by_one(tmp_path, tokenizer):
    (tmp_path / "texts.jsonl").write_text('{"text": "abcdef", "label": 0}\n{"text": "a", "label": 1}')
    tokenizer.pad_token = None
    try:
        data = open_data(tmp_path / "texts.jsonl", Preprocessing(tokenizer=tokenizer), batch_size=8)
        assert [tuple(batch.inputs["input_ids"].shape) for batch in data] == [(1, 6), (1, 1)]
    finally:
        tokenizer.pad_token = "<pad>"


@pytest.mark.parametrize(
    ("classes", "labels", "numbers"),
    [
        ({"bad": 0, "good": 1}, ["good", "bad"], [1, 0]),
        ({"zero": 0, "one": 1}, ["1", 0], [1, 0]),
        ({"1": 0, "2": 1}, ["1", "2"], [0, 1]),
        ({"LABEL_0": 0, "LABEL_1": 1}, ["LABEL_1", "LABEL_0"], [1, 0]),
        (None, ["3", 2], [3, 2]),
        ({"bad": 0, "good": 1}, ["good", "awful"], None),
        ({"awful": 0, "good": 1}, ["good", "bad", "1"], None),
        ({"LABEL_0": 0, "LABEL_1": 1}, ["good", "bad"], None),
        (None, ["good", "bad"], None),
        (None, ["1", "bad"], None),
    ],
)
def test_labels_are_the_models_class_names_or_numbers(tmp_path, tokenizer, classes, *, labels, numbers):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": "a", "label": label}) for label in labels))
    if numbers is None:
        with pytest.raises(BadInput, match=r"the model has no class '(1|awful|bad)'"):
            open_data(path, Preprocessing(tokenizer=tokenizer, classes=classes))
    else:
        assert labels_of(open_data(path, Preprocessing(tokenizer=tokenizer, classes=classes))) == numbers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("\n\n", "the file is empty"),
        ('{"text": "a"}\n{"text"', "line 2: not JSON"),
        ('{"text": "a"}\n["a"]', "line 2: not a JSON object"),
        ('{"text": "a"}\n{"label": 0}', "line 2: there is no `text`"),
        ('{"text": 3}', "line 1: there is no `text`"),
        ('{"text": "a", "label": 0}\n\n{"text": "b"}', "line 3: there is no `label`"),
        ('{"text": "a", "label": null}', "line 1: there is no `label`"),
        ('{"text": "a", "label": true}', "line 1: there is no `label`"),
        ('{"text": "a", "label": 0.5}', "line 1: there is no `label`"),
    ],
)
def test_bad_jsonl(tmp_path, tokenizer, text, *, message):
    (tmp_path / "texts.jsonl").write_text(text)
    with pytest.raises(BadInput, match=message) as raised:
        open_data(tmp_path / "texts.jsonl", Preprocessing(tokenizer=tokenizer))
    assert "\n" not in str(raised.value)


# Arrays


@settings(max_examples=25)
@given(
    st.lists(
        st.tuples(
            st.floats(-1e6, 1e6, width=32), st.floats(-1e6, 1e6, width=32), st.integers(min_value=0, max_value=9)
        ),
        min_size=1,
        max_size=10,
    )
)
def test_a_table_of_numbers_round_trips(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "data.csv"
    path.write_text("width,label,height\n" + "".join(f"{a!r},{label},{b!r}\n" for a, b, label in rows))
    data = open_data(path)
    assert data.task == "classification"
    assert inputs_of(data).tolist() == [[a, b] for a, b, _ in rows]
    assert labels_of(data) == [label for *_, label in rows]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("a,label\n", "the file is empty"),
        ("a,b\n1,2\n", "the columns are a, b"),
        ("label\n1\n", "the columns are label"),
        ("a,label\n1,0\n2\n", "line 3: 1 cells under 2 column names"),
        ("a,label\n1,0\nx,1\n", "line 3: 'x' in column a is not a finite number"),
        ("a,label\nnan,0\n", "line 2: 'nan' in column a is not a finite number"),
        ("a,label\n1,0.5\n", "the model has no class '0.5'"),
        ("a,label\n1,\n", "line 2: there is no `label`"),
        ('a,label\n"1,0\n', "line 2: not a table"),
    ],
)
def test_bad_csv(tmp_path, text, message):
    (tmp_path / "data.csv").write_text(text)
    with pytest.raises(BadInput, match=message):
        open_data(tmp_path / "data.csv")


@pytest.mark.parametrize("names", [("inputs", "labels"), ("x", "y"), ("images", "targets"), ("pixel_values", "y")])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_arrays_round_trip(tmp_path, names, suffix):
    inputs = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([2, 0, 1, 1, 0])
    path = tmp_path / f"data{suffix}"
    if suffix == ".npz":
        np.savez(path, **{names[0]: inputs.numpy(), names[1]: labels.numpy()})
    else:
        save_file({names[0]: inputs, names[1]: labels}, path)
    data = open_data(path, batch_size=2)
    assert data.task == "image-classification"
    assert torch.equal(inputs_of(data), inputs)
    assert labels_of(data) == labels.tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_arrays_become_float32(tmp_path, dtype):
    save_file({"x": torch.ones(2, 3, dtype=dtype), "y": torch.zeros(2)}, tmp_path / "data.safetensors")
    data = open_data(tmp_path / "data.safetensors")
    assert data.task == "classification"
    assert inputs_of(data).dtype == torch.float32
    assert labels_of(data) == [0, 0]


def test_labeled_token_ids_are_text_classification(tmp_path):
    np.savez(tmp_path / "data.npz", input_ids=np.ones((3, 4), dtype=np.int32), labels=np.array([0, 1, 0]))
    data = open_data(tmp_path / "data.npz")
    (batch,) = data
    assert data.task == "text-classification"
    assert set(batch.inputs) == {"input_ids"}
    assert batch.inputs["input_ids"].dtype == torch.int64


def test_arrays_that_calibrate_need_no_labels(tmp_path):
    images = torch.rand(2, 3, 4, 4)
    save_file({"pixel_values": images}, tmp_path / "data.safetensors")
    data = open_data(tmp_path / "data.safetensors", sample=Sample(option="calibration"))
    assert torch.equal(inputs_of(data), images)
    with pytest.raises(BadInput, match="exactly one of labels, y, targets is needed"):
        open_data(tmp_path / "data.safetensors", sample=Sample(option="data"))


X, Y = np.ones((2, 3), dtype=np.float32), np.array([0, 1])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "it holds nothing, where exactly one of inputs"),
        ({"x": X}, "it holds x, where exactly one of labels, y, targets is needed"),
        ({"y": Y}, "it holds y, where exactly one of inputs"),
        ({"x": X, "images": X, "y": Y}, "it holds x, images, y, where exactly one of inputs"),
        ({"x": X, "y": np.array([0])}, r"`y` is of shape \(1,\) for 2 inputs"),
        ({"x": X, "y": np.eye(2)}, r"`y` is of shape \(2, 2\) for 2 inputs"),
        ({"x": X, "y": np.array([0.5, 1])}, "`y` has values that are not whole numbers"),
        ({"x": X, "y": np.array([np.nan, 1])}, "`y` has values that are not whole numbers"),
        ({"x": X, "y": np.array([True, False])}, "`y` has values that are not whole numbers"),
        ({"x": X * np.nan, "y": Y}, "`x` has NaN or Inf in it"),
        ({"x": X * np.inf, "y": Y}, "`x` has NaN or Inf in it"),
        ({"x": X[:0], "y": Y[:0]}, r"`x` is of shape \(0, 3\)"),
        ({"x": X[:, 0], "y": Y}, r"`x` is of shape \(2,\)"),
        ({"x": X.astype(np.uint8), "y": Y}, "`x` is of uint8"),
        ({"input_ids": X + 0.5, "y": Y}, "`input_ids` has values that are not whole numbers"),
        ({"x": np.array(["a", "b"]), "y": Y}, "not a readable .npz of numbers"),
        ({"x": np.array([{}, {}]), "y": Y}, "not a readable .npz of numbers"),
    ],
)
def test_bad_arrays(tmp_path, arrays, message):
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(BadInput, match=message):
        open_data(tmp_path / "data.npz")


@settings(max_examples=40)
@given(cut=st.integers(0, 400), suffix=st.sampled_from([".npz", ".safetensors"]))
def test_a_truncated_file_of_arrays_is_bad_input(tmp_path_factory, cut, suffix):
    path = tmp_path_factory.mktemp("cut") / f"data{suffix}"
    if suffix == ".npz":
        np.savez(path, x=X, y=Y)
    else:
        save_file({"x": torch.ones(30, 3), "y": torch.zeros(30)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: min(cut, len(whole) - 1)])
    with pytest.raises(BadInput, match="not a readable"):
        open_data(path)


# Images


def test_images_of_a_folder_are_in_order_with_sorted_classes(images):
    data = open_data(images, batch_size=4)
    assert data.task == "image-classification"
    assert labels_of(data) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    paths = [images / name / f"{number}.png" for name in ("cat", "dog", "eel") for number in range(3)]
    expected = np.stack([np.asarray(Image.open(path)) for path in paths])[:, None] / np.float32(255)
    assert torch.equal(inputs_of(data), torch.from_numpy(expected))


def test_a_limit_keeps_some_of_each_class(images):
    assert labels_of(open_data(images, sample=Sample(limit=3))) == [0, 1, 2]


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        ({"eel": 0, "cat": 2, "dog": 1}, [2, 2, 2, 1, 1, 1, 0, 0, 0]),
        ({"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}, [0, 0, 0, 1, 1, 1, 2, 2, 2]),
    ],
)
def test_classes_are_the_models(images, classes, expected):
    assert labels_of(open_data(images, Preprocessing(classes=classes))) == expected


def test_a_folder_that_the_model_has_no_class_for_is_bad_input(images):
    with pytest.raises(BadInput, match="the model has no class 'eel'"):
        open_data(images, Preprocessing(classes={"cat": 0, "dog": 1}))


def test_folders_named_by_numbers_are_those_classes(images):
    for name, number in (("cat", 7), ("dog", 10), ("eel", 2)):
        (images / name).rename(images / str(number))
    assert sorted(set(labels_of(open_data(images)))) == [2, 7, 10]


def test_images_are_preprocessed_as_the_model_says(images):
    """Bilinear to 8 x 8, scaled, normalized: the same by hand, on Pillow's own resizing."""
    data = open_data(images, Preprocessing(image_processor=vit_processor()), batch_size=2)
    path = images / "cat" / "0.png"
    resized = np.asarray(Image.open(path).resize((8, 8), Image.Resampling.BILINEAR), dtype=np.float32)
    expected = torch.from_numpy((resized / 255 - 0.5) / 0.25)
    assert inputs_of(data).shape == (9, 1, 8, 8)
    torch.testing.assert_close(inputs_of(data)[0, 0], expected, rtol=0, atol=1e-6)


def test_images_get_the_channels_that_the_model_wants(images):
    color = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    save_image(images / "cat" / "0.png", color)
    three = vit_processor(image_mean=[0.1, 0.2, 0.3], image_std=[1.0, 1.0, 1.0])
    assert inputs_of(open_data(images, Preprocessing(image_processor=three))).shape == (9, 3, 8, 8)
    assert inputs_of(open_data(images, Preprocessing(image_processor=vit_processor()))).shape == (9, 1, 8, 8)
    assert inputs_of(open_data(images)).shape == (9, 3, 5, 6), "as the first image has them"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_8_bit_mode_is_read(tmp_path, mode):
    path = tmp_path / "data" / "a" / "image.tiff"
    path.parent.mkdir(parents=True)
    Image.new(mode, (3, 2)).save(path)
    assert inputs_of(open_data(tmp_path / "data")).shape == (1, 1 if mode in {"1", "L", "LA"} else 3, 2, 3)


def test_the_unreadable_image_is_named(images):
    (images / "dog" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n but then nothing")
    with pytest.raises(BadInput, match=r"dog/1\.png: the image is unreadable"):
        list(open_data(images))
    whole = (images / "dog" / "0.png").read_bytes()
    (images / "dog" / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match=r"dog/1\.png: the image is unreadable"):
        list(open_data(images))


def test_the_image_of_another_size_is_named(images):
    save_image(images / "eel" / "2.png", np.zeros((4, 4), dtype=np.uint8))
    with pytest.raises(BadInput, match=r"eel/2\.png: the image is of 4 x 4 pixels, others are of 6 x 5"):
        list(open_data(images))
    assert inputs_of(open_data(images, Preprocessing(image_processor=vit_processor()))).shape == (9, 1, 8, 8)


def test_images_of_16_bits_are_bad_input(images):
    save_image(images / "cat" / "0.png", np.zeros((5, 6), dtype=np.uint16))
    with pytest.raises(BadInput, match=r"cat/0\.png: the image has pixels of mode I;16"):
        open_data(images)


def test_images_at_another_level_are_bad_input(images):
    with pytest.raises(BadInput, match="must lie in its class's folder"):
        open_data(images / "cat")
    with pytest.raises(BadInput, match="must lie in its class's folder"):
        open_data(images.parent)


def test_an_image_processor_that_does_not_fit_is_bad_input(images):
    processor = vit_processor(image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5])
    with pytest.raises(BadInput, match="image processor does not take these images"):
        list(open_data(images, Preprocessing(image_processor=processor)))


def test_without_pillow_the_remedy_is_said(images, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(BadInput, match=r"pip install 'compressor\[data\]'"):
        open_data(images)


# Digits


def test_digits_are_the_digits():
    data = open_data("builtin:digits", sample=Sample(split="validation"))
    pixels, labels = digits("validation")
    assert data.task == "image-classification"
    assert data.name == "builtin:digits, validation split"
    assert torch.equal(inputs_of(data), pixels)
    assert labels_of(data) == labels.tolist()


def test_digits_are_normalized_without_being_rounded():
    pixels, _ = digits("test")
    data = open_data("builtin:digits", Preprocessing(image_processor=vit_processor()))
    torch.testing.assert_close(inputs_of(data), (pixels - 0.5) / 0.25, rtol=0, atol=1e-6)


def test_digits_are_resized_and_given_channels_as_the_model_says():
    processor = vit_processor(size={"height": 16, "width": 12}, image_mean=[0.0, 0.5, 1.0], image_std=[1.0] * 3)
    pixels = inputs_of(open_data("builtin:digits", Preprocessing(image_processor=processor), Sample(limit=5)))
    assert pixels.shape == (5, 3, 16, 12)
    torch.testing.assert_close(pixels[:, 0], pixels[:, 1] + 0.5)
    torch.testing.assert_close(pixels[:, 0], pixels[:, 2] + 1.0)
    assert pixels[:, 0].min() >= 0
    assert 0.9 < pixels[:, 0].max() <= 1


# What is no data


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("builtin:letters", "no built-in data 'builtin:letters'; use builtin:digits or builtin:stdlib"),
        ("missing.txt", "no such data file or folder"),
        ("data.parquet", "data of the kind .parquet cannot be read"),
        ("data", "data of the kind without a suffix cannot be read"),
        ("empty", "holds neither images in class subfolders nor texts"),
    ],
)
def test_what_is_no_data_is_bad_input(tmp_path, monkeypatch, name, *, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.parquet").touch()
    (tmp_path / "data").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=message):
        open_data(name)


def test_some_examples_of_a_batch_keep_whole_what_has_no_row_for_each() -> None:
    inputs = {"input_ids": torch.arange(12).view(4, 3), "position_ids": torch.arange(3)[None], "scale": torch.tensor(2)}
    batch = Batch(inputs, torch.arange(4))
    some = batch[slice(1, 3)]
    assert (batch.examples, some.examples) == (4, 2)
    assert some.inputs["input_ids"].tolist() == [[3, 4, 5], [6, 7, 8]]
    assert some.inputs["position_ids"].tolist() == [[0, 1, 2]]
    assert some.inputs["scale"].tolist() == 2
    assert some.labels.tolist() == [1, 2]
    assert Batch(inputs, torch.empty(0))[slice(1, 3)].labels.numel() == 0


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64])
@pytest.mark.parametrize("name", ["inputs", "x", "input_ids"])
def test_whole_numbers_are_token_ids_by_any_name(tmp_path, name, dtype):
    ids = np.arange(24, dtype=dtype).reshape(4, 6)
    np.savez(tmp_path / "classes.npz", **{name: ids, "labels": np.array([0, 1, 0, 1])})
    np.savez(tmp_path / "windows.npz", **{name: ids})
    classes, windows = (open_data(tmp_path / f"{kind}.npz").read(range(4)) for kind in ("classes", "windows"))
    for batch in (classes, windows):
        assert torch.equal(batch.inputs["input_ids"], torch.arange(24).reshape(4, 6))
    assert classes.labels.tolist() == [0, 1, 0, 1]
    assert torch.equal(windows.labels, torch.arange(24).reshape(4, 6)[:, 1:])


def test_pixels_of_a_byte_are_not_token_ids(tmp_path):
    np.savez(tmp_path / "pixels.npz", x=np.zeros((4, 6), dtype=np.uint8), y=np.zeros(4, dtype=np.int64))
    with pytest.raises(BadInput, match="is of uint8; store it as the floats"):
        open_data(tmp_path / "pixels.npz")


def test_a_network_of_ones_own_is_measured_on_token_ids(tmp_path):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(24, 8), nn.Flatten(), nn.Linear(48, 2))
    np.savez(tmp_path / "ids.npz", x=np.arange(24).reshape(4, 6), y=np.array([0, 1, 0, 1]))
    quality = measure_quality(network, open_data(tmp_path / "ids.npz"), device="cpu")
    expected = network(torch.arange(24).reshape(4, 6)).argmax(1).eq(torch.tensor([0, 1, 0, 1])).double().mean()
    assert quality.value == pytest.approx(float(expected))
