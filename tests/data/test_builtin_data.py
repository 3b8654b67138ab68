from __future__ import annotations

import ast
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from compressor.data.builtin_data import Split, digits, standard_library_files, standard_library_text
from compressor.errors import BadInput

SPLITS = get_args(Split)


def test_digits_splits_partition_the_original_data() -> None:
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    pixels, labels = load_digits(return_X_y=True)
    original = sorted((*map(int, row), int(label)) for row, label in zip(pixels, labels, strict=True))
    collected = []
    for split in SPLITS:
        images, targets = digits(split)
        rows = (images.reshape(len(images), -1) * 16).to(torch.int64).tolist()
        collected += [(*row, int(target)) for row, target in zip(rows, targets, strict=True)]
    # as multisets: nothing is lost, nothing is repeated, every image kept its label
    assert sorted(collected) == original


def test_no_image_is_in_two_digits_splits() -> None:
    images = [{image.numpy().tobytes() for image in digits(split)[0]} for split in SPLITS]
    assert images[0].isdisjoint(images[1])
    assert images[0].isdisjoint(images[2])
    assert images[1].isdisjoint(images[2])


@pytest.mark.parametrize("split", SPLITS)
def test_digits_shapes_types_and_ranges(split: Split) -> None:
    images, labels = digits(split)
    assert images.shape == (len(labels), 1, 8, 8)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert float(images.min()) == 0.0
    assert float(images.max()) == 1.0
    assert set(labels.tolist()) == set(range(10))


def test_digits_split_sizes_are_60_20_20_percent() -> None:
    assert [len(digits(split)[1]) for split in ("train", "validation", "test")] == [1078, 360, 359]


def test_digits_permutation_never_changes() -> None:
    # every reference model was trained on this split: another order would leak test images into training
    labels = bytes(int(label) for split in ("train", "validation", "test") for label in digits(split)[1])
    assert hashlib.sha256(labels).hexdigest() == "0f9ffd7948cafb397f7a000b667568d2e6ff757cc70e9e96e7ac289f51898d6f"


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(BadInput, match=r"pip install 'compressor\[data\]'"):
        digits("test")


def test_no_standard_library_file_is_in_two_splits() -> None:
    files = [set(standard_library_files(split)) for split in SPLITS]
    assert all(files)
    assert files[0].isdisjoint(files[1] | files[2])
    assert files[1].isdisjoint(files[2])


@pytest.mark.parametrize("split", SPLITS)
def test_standard_library_text_is_its_files_in_order(split: Split) -> None:
    files = standard_library_files(split)
    assert list(files) == sorted(files, key=lambda path: path.as_posix())
    text = standard_library_text(split)
    position = 0
    for path in files:
        source = path.read_text(encoding="utf-8")
        assert text.startswith(source, position)
        position += len(source)
    assert position == len(text)


def test_most_of_the_standard_library_is_for_training() -> None:
    sizes = {split: len(standard_library_text(split)) for split in SPLITS}
    assert sizes["train"] > 0.6 * sum(sizes.values())
    assert min(sizes.values()) > 100_000


@pytest.mark.parametrize("split", SPLITS)
def test_standard_library_files_are_python_and_not_tests_or_installed_packages(split: Split) -> None:
    for path in standard_library_files(split):
        assert not {"test", "tests", "site-packages", "idlelib", "lib2to3", "__pycache__"} & set(path.parts)
        assert not path.name.startswith("_sysconfigdata")
    smallest = min(standard_library_files(split), key=lambda path: path.stat().st_size)
    ast.parse(smallest.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_standard_library_text_is_the_same_in_another_process() -> None:
    program = (
        "import hashlib, json; from compressor.data.builtin_data import standard_library_text as text;"
        "print(json.dumps([hashlib.sha256(text(s).encode()).hexdigest() for s in"
        " ('train', 'validation', 'test')]))"
    )
    # another hash seed: an order that came from a set would differ
    answer = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONHASHSEED": "7"},
        capture_output=True,
        check=True,
        text=True,
    )
    here = [
        hashlib.sha256(standard_library_text(split).encode()).hexdigest() for split in ("train", "validation", "test")
    ]
    assert json.loads(answer.stdout) == here


def test_a_python_without_source_files_is_bad_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(BadInput, match="no standard library source"):
        standard_library_text("train")


@pytest.mark.parametrize("function", [digits, standard_library_files, standard_library_text])
def test_an_unknown_split_is_bad_input(function) -> None:
    with pytest.raises(BadInput, match="no split 'dev'"):
        function("dev")
