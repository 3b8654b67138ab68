"""The contents of a data file or folder: texts, labeled texts, arrays or labeled images, before preprocessing."""

from __future__ import annotations

import csv
import math
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.data.text import Document
from compressor.documents import bounded_json
from compressor.errors import BadInput

TEXT_SUFFIXES = (".txt", ".md", ".py")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
PAIR = ("source", "target")
INPUT_NAMES = ("inputs", "x", "images", "pixel_values", "input_ids")
LABEL_NAMES = ("labels", "y", "targets")
COLUMNS = "use the columns `text`, or `text` and `label`, or `source` and `target`, or (csv) numbers and `label`"


@dataclass(frozen=True)
class Texts:
    """Documents without labels, in order: texts, or files that are read later."""

    documents: tuple[Document, ...]


@dataclass(frozen=True)
class LabeledTexts:
    """One text and one class, by name or number, per example."""

    texts: tuple[str, ...]
    labels: tuple[str | int, ...]


@dataclass(frozen=True)
class TextPairs:
    """A source text and a target text for each example."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]


@dataclass(frozen=True)
class NamedArrays:
    """All arguments of a model's forward by name, `(N, ...)` each, float32 or int64."""

    arrays: Mapping[str, Tensor]


@dataclass(frozen=True)
class Arrays:
    """Inputs `(N, ...)`, float32 or (token ids) int64; and the class of each, None without labels."""

    inputs: Tensor
    labels: tuple[str | int, ...] | None


@dataclass(frozen=True)
class LabeledImages:
    """One image file and one class, the name of its folder, per example."""

    paths: tuple[Path, ...]
    labels: tuple[str | int, ...]


@dataclass(frozen=True)
class Images:
    """Images in memory: `read` gives those at some positions as PIL images, and the class of each or None."""

    count: int
    read: Callable[[Sequence[int]], tuple[list[Any], list[Any]]]


@dataclass(frozen=True)
class Rows:
    """Examples read by position: `read` returns a batch, as a loader does. `batch_size` is None for any size.

    `read_all` gives a batch for each of several groups, read ahead by a loader's workers, if it has any.
    """

    count: int
    read: Callable[[Sequence[int]], Any]
    batch_size: int | None = None
    read_all: Callable[[Sequence[Sequence[int]]], Iterator[Any]] | None = None


@dataclass(frozen=True)
class Batches:
    """Batches as an iterable yields them; `unused` says which more it has."""

    batches: tuple[Any, ...]
    unused: str = ""


Contents = Texts | LabeledTexts | TextPairs | Arrays | NamedArrays | LabeledImages | Images | Rows | Batches


def read_contents(path: Path, inputs: Collection[str] = (), *, labeled: bool = True) -> Contents:
    """Read a text, .jsonl, .csv, .npz or .safetensors file, or a folder of texts or of images by class.

    Files of a folder come in the order of their paths. Files of text and images are listed, not yet opened. `inputs`
    are the names that the model's forward has, by which arrays may go. Unless `labeled`, arrays may have no labels.
    Raises `BadInput` when the path is missing, empty, of another kind, or holds what cannot be used.
    """
    if not path.exists():
        raise BadInput("there is no such data file or folder", where=path, remedy="check the path")
    if path.is_dir():
        return _read_folder(path)
    suffix = path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        return Texts((path,))
    if suffix == ".jsonl":
        return _read_jsonl(path)
    if suffix == ".csv":
        return _read_csv(path)
    if suffix in {".npz", ".safetensors"}:
        return _read_arrays(path, inputs, labeled=labeled)
    raise BadInput(
        f"data of the kind {suffix or 'without a suffix'} cannot be read",
        where=path,
        remedy=f"use {', '.join(TEXT_SUFFIXES)}, .jsonl, .csv, .npz, .safetensors or a folder",
    )


def _read_folder(folder: Path) -> Texts | LabeledImages:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if images:
        for path in images:
            if path.parent.parent != folder:
                raise BadInput(
                    "an image must lie in its class's folder, one level below the data folder",
                    where=path,
                    remedy="arrange the images as DATA/CLASS/IMAGE, and pass DATA",
                )
        return LabeledImages(tuple(images), tuple(path.parent.name for path in images))
    texts = [path for path in files if path.suffix.lower() in TEXT_SUFFIXES]
    if texts:
        return Texts(tuple(texts))
    raise BadInput(
        "the folder holds neither images in class subfolders nor texts",
        where=folder,
        remedy=f"put {', '.join(TEXT_SUFFIXES)} files, or DATA/CLASS/IMAGE, there",
    )


def _read_text(path: Path) -> str:
    try:
        # the signature that some editors put first is no text
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(
            f"not UTF-8 text, at byte {error.start}", where=path, remedy="convert the file to UTF-8"
        ) from None


def _read_jsonl(path: Path) -> Texts | LabeledTexts | TextPairs:
    rows: list[tuple[str, Mapping[str, Any]]] = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = bounded_json(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"not JSON: {error}", where=where, remedy="write one object per line") from None
        if not isinstance(row, dict):
            raise BadInput("not a JSON object", where=where, remedy="write one object per line")
        rows.append((where, row))
    return texts_in_rows(rows, path)


def _read_csv(path: Path) -> Texts | LabeledTexts | TextPairs | Arrays:
    lines = _csv_lines(path)
    _, header = next(lines, (0, []))
    names = [name.strip() for name in header]
    rows: list[tuple[str, Mapping[str, str]]] = []
    for number, cells in lines:
        where = f"{path}, line {number}"
        if len(cells) != len(names):
            raise BadInput(f"{len(cells)} cells under {len(names)} column names", where=where, remedy="mend the row")
        rows.append((where, dict(zip(names, cells, strict=True))))
    if not rows or "text" in names or all(name in names for name in PAIR):
        return texts_in_rows(rows, path)
    if "label" not in names or len(names) < 2:
        raise BadInput(f"the columns are {', '.join(names)}", where=path, remedy=COLUMNS)
    features = [name for name in names if name != "label"]
    inputs = torch.tensor(
        [[_csv_number(row[name], name, where) for name in features] for where, row in rows],
        dtype=torch.float32,
    )
    return Arrays(inputs, tuple(_label(row, where) for where, row in rows))


def _csv_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(_read_text(path).splitlines(keepends=True), strict=True)
    try:
        for cells in reader:
            if cells:
                yield reader.line_num, cells
    except csv.Error as error:
        raise BadInput(
            f"not a table: {error}", where=f"{path}, line {reader.line_num}", remedy="mend it, or use .jsonl"
        ) from None


def _csv_number(cell: str, name: str, where: str) -> float:
    try:
        number = float(cell)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise BadInput(f"{cell!r} in column {name} is not a finite number", where=where, remedy=COLUMNS)
    return number


def texts_in_rows(rows: Sequence[tuple[str, Mapping[str, Any]]], where: str | Path) -> Texts | LabeledTexts | TextPairs:
    """The texts of rows with named columns; each row comes with its place, for messages."""
    if not rows:
        what = "the file is empty" if isinstance(where, Path) else "there is no example"
        raise BadInput(what, where=where, remedy="give at least one example")
    if all(name in rows[0][1] for name in PAIR):
        for place, row in rows:
            if not all(isinstance(row.get(name), str) for name in PAIR):
                raise BadInput("there is no `source` and `target` with a string", where=place, remedy=COLUMNS)
        return TextPairs(*(tuple(row[name] for _, row in rows) for name in PAIR))
    for place, row in rows:
        if not isinstance(row.get("text"), str):
            raise BadInput("there is no `text` with a string", where=place, remedy=COLUMNS)
    texts = tuple(row["text"] for _, row in rows)
    if not any("label" in row for _, row in rows):
        return Texts(texts)
    return LabeledTexts(texts, tuple(_label(row, place) for place, row in rows))


def _label(row: Mapping[str, Any], where: str) -> str | int:
    label = row.get("label")
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise BadInput("there is no `label` with a class's number or name", where=where, remedy="label every example")
    return label


def _read_arrays(path: Path, inputs: Collection[str], *, labeled: bool) -> Arrays | NamedArrays:
    arrays = _read_npz(path) if path.suffix.lower() == ".npz" else _read_safetensors(path)
    return in_arrays(arrays, path, inputs, labeled=labeled)


def in_arrays(
    arrays: Mapping[str, Tensor], path: str | Path, inputs: Collection[str], *, labeled: bool = True
) -> Arrays | NamedArrays:
    """Check arrays by name; unless `labeled`, inputs that are not text may have no labels."""
    if _go_by_name(arrays, inputs):
        return _named_arrays(arrays, path)
    input_name = _only_name(arrays, INPUT_NAMES, path, inputs=inputs)
    tokens = input_name == "input_ids" or arrays[input_name].dtype in _TOKEN_IDS
    label_name = None
    if (labeled and not tokens) or any(name in arrays for name in LABEL_NAMES):
        label_name = _only_name(arrays, LABEL_NAMES, path, inputs=inputs)
    values = arrays[input_name]
    if values.ndim < 2 or values.numel() == 0:
        raise BadInput(
            f"`{input_name}` is of shape {tuple(values.shape)}",
            where=path,
            remedy="give it one row per example, (examples, ...), and at least one",
        )
    if tokens:
        values = _integers(values, input_name, path)
    elif not values.is_floating_point():
        raise BadInput(
            f"`{input_name}` is of {str(values.dtype).removeprefix('torch.')}",
            where=path,
            remedy="store it as the floats that the model was trained on (pixels scaled and normalized)",
        )
    else:
        values = values.to(torch.float32)
        if not bool(values.isfinite().all()):
            raise BadInput(f"`{input_name}` has NaN or Inf in it", where=path, remedy="repair or remove them")
    if label_name is None:
        return Arrays(values, None)
    labels = _integers(arrays[label_name], label_name, path)
    if labels.shape != values.shape[:1]:
        raise BadInput(
            f"`{label_name}` is of shape {tuple(labels.shape)} for {len(values)} inputs",
            where=path,
            remedy="give each input one class number",
        )
    return Arrays(values, tuple(int(label) for label in labels))


# Integers of one byte are unscaled pixels.
_TOKEN_IDS = (torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32)


def _go_by_name(arrays: Mapping[str, Tensor], inputs: Collection[str]) -> bool:
    """Whether the arrays are named inputs of a forward, and not one array with a class for each row."""
    if not inputs or not arrays or not all(name in inputs or name == "labels" for name in arrays):
        return False
    plain = len(arrays.keys() & set(INPUT_NAMES)) == 1 and len(arrays.keys() - {"labels"}) == 1
    return not plain or ("labels" in arrays and arrays["labels"].ndim > 1)


def _named_arrays(arrays: Mapping[str, Tensor], path: str | Path) -> NamedArrays:
    found = {}
    examples = len(next(iter(arrays.values()))) if next(iter(arrays.values())).ndim else 0
    for name, array in arrays.items():
        if array.ndim == 0 or array.numel() == 0 or len(array) != examples:
            shapes = ", ".join(f"{key} {tuple(each.shape)}" for key, each in arrays.items())
            raise BadInput(
                f"the arrays do not have one row for each example: {shapes}",
                where=path,
                remedy="give all of them the same first dimension",
            )
        if array.is_complex():
            raise BadInput(f"`{name}` is complex", where=path, remedy="store real numbers")
        if array.is_floating_point() and not bool(array.isfinite().all()):
            raise BadInput(f"`{name}` has NaN or Inf in it", where=path, remedy="repair or remove them")
        found[name] = array.to(torch.float32 if array.is_floating_point() else torch.int64)
    if "labels" in found:
        found["labels"] = _integers(arrays["labels"], "labels", path)
    return NamedArrays(found)


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise BadInput(
            f"not a readable .npz of numbers: {error}", where=path, remedy="write it with numpy.savez"
        ) from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise BadInput(
            f"not a readable .safetensors: {error}", where=path, remedy="write it with safetensors"
        ) from None


def _only_name(
    arrays: Mapping[str, Tensor], known: tuple[str, ...], path: str | Path, *, inputs: Collection[str] = ()
) -> str:
    found = [name for name in known if name in arrays]
    if len(found) != 1:
        held = ", ".join(arrays) or "nothing"
        raise BadInput(
            f"it holds {held}, where exactly one of {', '.join(known)} is needed",
            where=path,
            remedy="rename or remove arrays"
            + (f", or give those of the model's forward alone: {', '.join(inputs)}" if inputs else ""),
        )
    return found[0]


def _integers(array: Tensor, name: str, path: str | Path) -> Tensor:
    integers = array.to(torch.int64)
    if array.dtype == torch.bool or array.is_complex() or not bool((integers == array).all()):
        raise BadInput(f"`{name}` has values that are not whole numbers", where=path, remedy="store integers")
    return integers
