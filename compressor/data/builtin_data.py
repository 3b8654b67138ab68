"""Data that need no download: scanned digits, and the source of Python's standard library."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from compressor.choices import Split
from compressor.errors import BadInput

if TYPE_CHECKING:
    import torch


DIGITS_SEED = 0
DIGITS_TRAIN, DIGITS_VALIDATION = 0.6, 0.2

# Folders of the standard library that are not its source (what pip installed, compiled files), or that some
# distributions of Python install and others do not (its test suites, its editor, the tool for Python 2).
LEFT_OUT_FOLDERS = frozenset({"__pycache__", "dist-packages", "idlelib", "lib2to3", "site-packages", "test", "tests"})
# Written when the interpreter is built, and full of that machine's compiler flags and paths.
GENERATED = ("_sysconfigdata", "config-")


def digits(split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one split of the 1797 handwritten digits of the UCI repository (Alpaydin & Kaynak, 1998).

    The images are float32 of shape `(N, 1, 8, 8)` in [0, 1], the labels int64 of shape `(N,)` in 0..9. A
    fixed permutation puts 60 % into "train", 20 % into "validation" and 20 % into "test"; writers are not
    kept apart. Raises `BadInput` for another split, or when scikit-learn, which carries the data, is missing.
    """
    _require_split(split)
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise BadInput(
            "the digits come with scikit-learn, which is not installed",
            where="builtin:digits",
            remedy="pip install 'compressor[data]'",
        ) from None
    import numpy
    import torch

    pixels, labels = load_digits(return_X_y=True)
    # The legacy generator: its stream is frozen for good (NEP 19), that of default_rng is not.
    order = numpy.random.RandomState(DIGITS_SEED).permutation(len(labels))
    first, second = (
        round(len(order) * DIGITS_TRAIN),
        round(len(order) * (DIGITS_TRAIN + DIGITS_VALIDATION)),
    )
    chosen = {"train": order[:first], "validation": order[first:second], "test": order[second:]}[split]
    images = torch.from_numpy(pixels[chosen]).to(torch.float32).reshape(-1, 1, 8, 8) / 16
    return images, torch.from_numpy(labels[chosen]).to(torch.int64)


def standard_library_files(split: Split) -> tuple[Path, ...]:
    """Return the source files of the interpreter's standard library that make up one split, in a fixed order.

    A file's split is decided by the SHA-256 of its path below the library's folder, modulo 10: 0 is "test",
    1 is "validation", the rest is "train". So a file stays in its split from one Python version to the next.
    Raises `BadInput` for another split, or when this Python keeps its library without the source.
    """
    _require_split(split)
    library = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path.relative_to(library).as_posix() for path in _source_files(library))
    chosen = tuple(library / path for path in paths if _split_of(path) == split)
    if not chosen:
        raise BadInput(
            f"this Python has no standard library source in {library}",
            where="builtin:stdlib",
            remedy="use a Python that was installed with its .py files, or pass a text file",
        )
    return chosen


def standard_library_text(split: Split) -> str:
    """Return the text of one split of the running interpreter's standard library, its files joined in order.

    The text depends on the Python version: name it beside any figure that was measured on it. Raises
    `BadInput` as `standard_library_files` does.
    """
    return "".join(path.read_text(encoding="utf-8") for path in standard_library_files(split))


def _require_split(split: str) -> None:
    if split not in get_args(Split):
        raise BadInput(f"there is no split {split!r}", remedy=f"use one of {', '.join(get_args(Split))}")


def _source_files(library: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(library):
        # pruned in place, so that site-packages, often larger than the library, is not walked
        subfolders[:] = [name for name in subfolders if name not in LEFT_OUT_FOLDERS and not name.startswith(GENERATED)]
        for name in names:
            if name.endswith(".py") and not name.startswith(GENERATED):
                yield Path(folder, name)


def _split_of(path: str) -> Split:
    remainder = int(hashlib.sha256(path.encode()).hexdigest(), 16) % 10
    return "test" if remainder == 0 else "validation" if remainder == 1 else "train"
