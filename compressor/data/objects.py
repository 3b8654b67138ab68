"""Data in memory, as the contents that a file would have.

Examples that can be read by position stay where they are: those of a `Dataset`, also one behind a `DataLoader`, are
read whenever they are needed, always in the same order. Any other iterable is read once and kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from compressor.data.batches import IGNORED_LABEL, LABELS, as_tensor, count_bytes, count_examples, first_examples
from compressor.data.readers import (
    INPUT_NAMES,
    LABEL_NAMES,
    PAIR,
    Batches,
    Contents,
    Images,
    Rows,
    in_arrays,
    texts_in_rows,
)
from compressor.errors import BadInput, first_line
from compressor.torch_state import caller_defaults

DataOption = Literal["data", "calibration"]

# Every fourth batch of calibration data chooses, so that a limit leaves room for two at least.
PARTS = 4

# Examples that are read of an iterable that has no length, and may never end, before a limit is asked for.
MOST_WITHOUT_LENGTH = 4096

# Bytes of an iterable that are kept in memory; those of a list are there already.
MOST_BYTES = 2**32

LONGEST_PATH = 256
TEXT_COLUMNS = ("text", "label", *PAIR)


@dataclass(frozen=True)
class Given:
    """An object given for an option, the names of the model's inputs, and how many examples are used at most.

    `default_limit` is how many of what does not come in batches, without a `limit`. What can be read only once may have
    `most_bytes`.
    """

    data: Any
    option: DataOption
    inputs: Collection[str] = ()
    limit: int | None = None
    default_limit: int | None = None
    most_bytes: int = MOST_BYTES

    @property
    def name(self) -> str:
        """The name of the data: name and split of a Hugging Face data set, else the type of the object."""
        known = [getattr(getattr(self.data, "info", None), "dataset_name", None), getattr(self.data, "split", None)]
        return f"{known[0]}, {known[1]} split" if all(known) else type(self.data).__name__

    def bad(self, what: str, remedy: str) -> BadInput:
        return BadInput(what, where=self.name, option=self.option, remedy=remedy)

    def yields(self, what: str, remedy: str) -> BadInput:
        words = "the calibration data yields" if self.option == "calibration" else "the data yields"
        return BadInput(f"{words} {what}", option=self.option, remedy=remedy)


def contents_of(given: Given) -> Contents:
    """The contents of an object: arrays, texts, images, rows, or batches.

    Raises `BadInput` for an object that is not data, and for an iterable that is too large to keep or may never end.
    """
    data = given.data
    tabular = hasattr(data, "column_names") and hasattr(data, "features")  # of Hugging Face
    with caller_defaults():
        if isinstance(data, Tensor | np.ndarray):
            return _arrays({"inputs": data}, given)
        if isinstance(data, DataLoader):
            return _loader(data, given)
        if isinstance(data, Mapping):
            return _columns(data, given)
        if isinstance(data, tuple) and len(data) == 2:
            return _pair(*data, given)
        if tabular and isinstance(data, Sized):
            return _table(data, given)
        if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
            return _examples(_Examples(data, _length(data) or 0), given)
        if isinstance(data, Iterable) and not isinstance(data, nn.Module) and not hasattr(data, "columns"):
            return _iterated(data, given, single=tabular or isinstance(data, IterableDataset))
    remedy = "give a path, tensors or arrays, a data set, texts, or an iterable of batches"
    raise given.bad(f"`{given.option}` is of type {type(data).__name__}", remedy)


# Objects that are there as a whole


def _arrays(arrays: Mapping[str, object], given: Given) -> Contents:
    found = {}
    for name, array in arrays.items():
        tensor = as_tensor(_as_array(array))
        if tensor is None:
            remedy = "give tensors or arrays of numbers, or lists of texts under `text`"
            raise given.bad(f"`{name}` is of type {type(array).__name__}", remedy)
        if tensor.is_meta:
            raise given.bad(f"`{name}` is on the meta device, which holds no values", "make it on the CPU")
        found[name] = tensor.cpu()
    return in_arrays(found, given.name, given.inputs, labeled=False)


def _columns(data: Mapping[str, Any], given: Given) -> Contents:
    """A mapping of arrays, as an .npz file holds them, or of lists with texts."""
    if any(hasattr(each, "column_names") for each in data.values()):
        what = f"it holds several data sets: {', '.join(map(str, data))}"
        raise given.bad(what, f"give one of them, such as `{given.option}=data['{next(iter(data))}']`")
    if not any(name in data for name in ("text", *PAIR)):
        return _arrays(data, given)
    columns = {name: list(data[name]) for name in TEXT_COLUMNS if name in data}
    if len({len(column) for column in columns.values()}) > 1:
        lengths = ", ".join(f"{name} {len(column)}" for name, column in columns.items())
        raise given.bad(f"its columns differ in length: {lengths}", "give each example one value of each")
    return _texts([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)], given)


def _pair(inputs: Any, labels: Any, given: Given) -> Contents:
    """Inputs and labels, a class number or name for each."""
    if isinstance(inputs, list | tuple) and inputs and isinstance(inputs[0], str):
        return _columns({"text": inputs, "label": labels}, given)
    if isinstance(inputs, Mapping):
        return _columns({**inputs, "label" if "text" in inputs else "labels": labels}, given)
    values, classes = as_tensor(inputs), as_tensor(_as_array(labels))
    if values is None or classes is None:
        what = f"{type(inputs).__name__} and {type(labels).__name__} are not inputs and their labels"
        raise given.bad(what, "give (inputs, labels) as tensors or arrays, or a list of batches")
    if not classes.is_floating_point():
        return _arrays({"inputs": inputs, "labels": classes}, given)
    if classes.shape == values.shape:
        raise given.bad("a pair is (inputs, labels), and this one may be two batches", "give a list of batches")
    return _arrays({"inputs": inputs}, given)  # the targets of a regression, which nothing here compares with


def _texts(rows: Sequence[Mapping[str, Any]], given: Given) -> Contents:
    first = rows[0].get("text", "") if rows else ""
    if isinstance(first, str) and len(first) < LONGEST_PATH and Path(first).is_file():
        raise given.bad(f"{first!r} is the path of a file", f"give `{given.option}` one path, of a file or folder")
    plain = [{**row, **({"label": _plain(row["label"])} if "label" in row else {})} for row in rows]
    return texts_in_rows([(f"{given.name}, example {number}", row) for number, row in enumerate(plain)], given.name)


def _as_array(value: Any) -> Any:
    """A list of numbers, or of equally long lists of them, as an array; anything else as it is."""
    if not isinstance(value, list | tuple):
        return value
    try:
        return np.asarray(value)
    except ValueError:
        return value


def _plain(label: Any) -> Any:
    """A class's number or name, taken out of a tensor or array."""
    return label.item() if isinstance(label, Tensor | np.generic | np.ndarray) and label.ndim == 0 else label


# Objects that are read by position


@dataclass(frozen=True)
class _Examples:
    """The examples of a data set; of those that are mappings all names are read, or `names` alone."""

    data: Any
    count: int
    names: Collection[str] | None = None

    def read(self, positions: Sequence[int]) -> list[Any]:
        with caller_defaults():
            together = getattr(self.data, "__getitems__", None)
            found = [self.data[place] for place in positions] if together is None else together(list(positions))
        return [each if self.names is None else {name: each[name] for name in self.names} for each in found]


def _examples(examples: _Examples, given: Given) -> Contents:
    """Examples one by one: a text, an image, a mapping, a tensor, or a pair of one of these and a label."""
    if examples.count == 0:
        raise given.bad("there is no example", "give one at least")
    [first] = examples.read([0])
    if _text_row(first) is not None:
        rows = [_text_row(each) for each in examples.read(range(examples.count))]
        return _texts([row or {} for row in rows], given)
    if _image(first) is not None:

        def images(positions: Sequence[int]) -> tuple[list[Any], list[Any]]:
            found = examples.read(positions)
            return [_image(each) for each in found], [_plain(_label(each)) for each in found]

        return Images(examples.count, images)
    return Rows(examples.count, lambda positions: _collated(examples.read(positions), given))


def _table(data: Any, given: Given) -> Contents:
    """A Hugging Face data set: of its columns the texts, the image, or those that the model's forward takes.

    Where it takes none of them, the one with the name that inputs have in a file; so with labels.
    """
    columns = list(data.column_names)
    tokenized = "input_ids" in columns and "input_ids" in given.inputs
    if not tokenized and ("text" in columns or all(name in columns for name in PAIR)):
        names = [name for name in TEXT_COLUMNS if name in columns]
        plain = data.select_columns(names) if hasattr(data, "select_columns") else data
        plain = plain.with_format(None) if hasattr(plain, "with_format") else plain
        return _examples(_Examples(plain, len(plain), names), given)
    label = next((name for name in (*LABELS, *LABEL_NAMES) if name in columns), None)
    if label not in (None, *LABELS, *given.inputs) and len(data) and isinstance(_plain(data[0][label]), int):
        columns[columns.index(label)], data = LABELS[0], data.rename_column(label, LABELS[0])
    examples = _Examples(data, len(data))
    if examples.count and _image(examples.read([0])[0]) is None and given.inputs:
        known = [name for name in columns if name in given.inputs and name not in LABELS]
        known = known or [name for name in INPUT_NAMES if name in columns][:1]
        names = [*known, *(name for name in columns if name in LABELS)]
        if not known:
            what = f"the columns are {', '.join(columns)}, none of which the model takes"
            raise given.bad(what, "call the texts `text` with `rename_column`, or map them to the model's inputs")
        examples = _Examples(data, len(data), names)
    return _examples(examples, given)


def _loader(loader: DataLoader[Any], given: Given) -> Contents:
    """The examples behind a loader, in the order of one pass; its batches if it has no single examples."""
    sampler, length = loader.batch_sampler, _length(loader)
    own = type(loader).__iter__ is not DataLoader.__iter__
    if own or sampler is None or length is None or isinstance(loader.dataset, IterableDataset):
        return _iterated(loader, given)
    order = [position for batch in islice(sampler, length) for position in batch]
    if not order:
        raise given.yields("0 batches", "give one at least")
    examples, collate = _Examples(loader.dataset, len(order)), loader.collate_fn

    def read(positions: Sequence[int]) -> Any:
        found = examples.read([order[position] for position in positions])
        with caller_defaults():
            return collate(found)

    def read_all(groups: Sequence[Sequence[int]]) -> Iterator[Any]:
        anew: DataLoader[Any] = DataLoader(
            loader.dataset,
            batch_sampler=[[order[position] for position in positions] for positions in groups],
            collate_fn=collate,
            num_workers=loader.num_workers,
            prefetch_factor=loader.prefetch_factor,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
        )
        return iter(anew)

    batch_size = loader.batch_size or -(-len(order) // length)
    return Rows(len(order), read, batch_size, read_all if loader.num_workers else None)


def _image(example: Any) -> Any:
    """The PIL image in an example, None where there is none."""
    parts = example.values() if isinstance(example, Mapping) else example if isinstance(example, tuple) else (example,)
    return next((each for each in parts if hasattr(each, "getbands") and hasattr(each, "convert")), None)


def _label(example: Any) -> Any:
    """The label in an example, None where there is none."""
    if isinstance(example, Mapping):
        return next((example[name] for name in LABELS if name in example), None)
    return example[1] if isinstance(example, tuple) and len(example) > 1 else None


def _text_row(example: Any) -> Mapping[str, Any] | None:
    """An example with a text as a row with named columns; None if there is no text."""
    if isinstance(example, str):
        return {"text": example}
    if isinstance(example, Mapping) and any(isinstance(example.get(name), str) for name in ("text", *PAIR)):
        return {name: example[name] for name in TEXT_COLUMNS if name in example}
    if isinstance(example, tuple) and len(example) == 2 and isinstance(example[0], str):
        return {"text": example[0], "label": example[1]}
    return None


def _collated(examples: Sequence[Any], given: Given) -> Any:
    """Collate examples as PyTorch does; token ids of different lengths are padded, and the padding is masked."""
    tables = [
        {name: torch.as_tensor(value) if isinstance(value, list) else value for name, value in each.items()}
        if isinstance(each, Mapping)
        else each
        for each in examples
    ]
    if isinstance(tables[0], dict) and isinstance(tables[0].get("input_ids"), Tensor):
        tables = _padded(tables)
    try:
        with caller_defaults():
            return default_collate(tables)
    except (RuntimeError, TypeError, KeyError, ValueError) as error:
        what = f"the examples do not go into one batch: {first_line(error)}"
        raise given.bad(what, "give a DataLoader whose `collate_fn` makes a batch of them") from error


def _padded(examples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    lengths = [len(each["input_ids"]) for each in examples]
    if len(set(lengths)) == 1:
        return list(examples)
    padded: list[Mapping[str, Any]] = []
    for example, length in zip(examples, lengths, strict=True):
        columns: dict[str, Any] = {"attention_mask": torch.ones(length, dtype=torch.int64), **example}
        missing = max(lengths) - length
        padded.append(
            {
                name: nn.functional.pad(each, (0, missing), value=IGNORED_LABEL if name in LABELS else 0)
                if isinstance(each, Tensor) and each.shape == (length,)
                else each
                for name, each in columns.items()
            }
        )
    return padded


# Objects that are read once


def _iterated(data: Iterable[Any], given: Given, *, single: bool = False) -> Contents:
    """Texts or images, batches, or with `single` examples one by one."""
    iterator = iter(data)
    nothing = object()
    first = next(iterator, nothing)
    if first is nothing:
        raise given.yields("0 batches", "give one at least")
    items = chain((first,), iterator)
    if single or _text_row(first) is not None or _image(first) is not None:
        # A limit counts windows of text, and so does not say how many texts are needed.
        texts = _text_row(first) is not None
        limit = None if texts else given.limit or given.default_limit
        most = MOST_WITHOUT_LENGTH if limit is None and not texts and _length(data) is None else None
        kept = list(islice(_bounded(items, data, given), limit if most is None else most + 1))
        if most is not None and len(kept) > most:
            raise _without_end(given, most)
        return _examples(_Examples(kept, len(kept)), given)
    return _batches(items, data, given)


def _batches(items: Iterable[Any], data: Iterable[Any], given: Given) -> Batches:
    batches: list[Any] = []
    taken, cut, follows, samples = 0, 0, "", given.limit
    most = samples
    if samples is not None and given.option == "calibration":  # which needs two batches
        most = max(1, samples - max(1, samples // PARTS))
    for batch in _bounded(items, data, given):
        if samples is not None and taken >= samples:
            length = _length(data)
            follows = f"what follows {len(batches):,} batches"
            if length is not None:
                follows = f"{length - len(batches):,} of {length:,} batches"
            break
        if samples is None and _length(data) is None and taken >= MOST_WITHOUT_LENGTH:
            raise _without_end(given, taken)
        examples = count_examples(batch)
        room = examples if samples is None or most is None else min(most, samples - taken, examples)
        batches.append(first_examples(batch, room, examples))
        taken += room
        cut += examples - room
    said = (f"{cut:,} examples of batches used in part" if cut else "", follows)
    return Batches(tuple(batches), ", and ".join(words for words in said if words))


def _without_end(given: Given, examples: int) -> BadInput:
    what = f"the data have no length, and go on after {examples:,} examples"
    return given.bad(what, f"say how many to use with `{given.option}_samples`")


def _bounded(items: Iterable[Any], data: Iterable[Any], given: Given) -> Iterator[Any]:
    """The items, as long as they are few enough to be kept in memory."""
    held = 0
    for item in items:
        yield item
        held += 0 if isinstance(data, list | tuple) else count_bytes(item)
        if held > given.most_bytes:
            raise given.bad(
                f"it can be read only once, and has more than {given.most_bytes / 2**30:.3g} GiB",
                f"give less with `{given.option}_samples`, or a data set, which is read where it is needed",
            )


def _length(data: object) -> int | None:
    """The number of items; None where it is not known, as of a `DataLoader` of a data set without a length."""
    try:
        return len(data) if isinstance(data, Sized) else None
    except TypeError:
        return None
