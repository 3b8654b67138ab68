"""Evaluation data as batches for a model, always in the same order."""

from __future__ import annotations

import filecmp
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from compressor.choices import BuiltinData, Split
from compressor.data.batches import IGNORED_LABEL, Batch, NotUnderstood, as_batch
from compressor.data.builtin_data import digits, standard_library_files
from compressor.data.images import channels_of, channels_wanted, preprocess, read_images, scale, wants_size
from compressor.data.metric import CustomMetric
from compressor.data.objects import DataOption, Given, contents_of
from compressor.data.preprocessing import LONGEST_DEFAULT_WINDOW, Preprocessing
from compressor.data.readers import (
    Arrays,
    Batches,
    Contents,
    Images,
    LabeledImages,
    LabeledTexts,
    NamedArrays,
    Rows,
    TextPairs,
    Texts,
    read_contents,
)
from compressor.data.text import Corpus, documents, separator, windows
from compressor.errors import BadInput

logger = logging.getLogger(__name__)

Task = Literal[
    "image-classification", "text-classification", "classification", "language-modeling", "text-to-text", "other"
]

# Batches of several groups of positions, one after another.
ReadAll = Callable[[Sequence[Sequence[int]]], Iterator[Batch]]

BUILTINS = get_args(BuiltinData)
TOKENS = {"input_ids", "attention_mask"}
NO_LABELS = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class EvaluationData:
    """Examples in a fixed order, to be iterated over any number of times, in batches of `batch_size`.

    `count` is the number of examples: images, rows, texts, or windows of text; of batches that cannot be taken apart
    it is their number. `read` gives the batch of the examples at some positions, such as `range(32)`. `unused` says
    what was left out by a limit. `batches` are those that the data came in, if they did. `metric` is what models are
    measured by, None for accuracy or perplexity.
    """

    name: str
    task: Task
    count: int
    batch_size: int
    read: Callable[[Sequence[int]], Batch]
    unused: str = ""
    batches: tuple[Batch, ...] = ()
    metric: CustomMetric | None = None
    read_all: ReadAll | None = None

    def __iter__(self) -> Iterator[Batch]:
        starts = range(0, self.count, self.batch_size)
        groups = [range(start, min(start + self.batch_size, self.count)) for start in starts]
        return iter(self.batches) if self.batches else _read_all(self, groups)

    def in_memory(self) -> EvaluationData:
        """The same batches in memory, as another process can be given them: they cannot be taken apart any more."""
        batches = tuple(replace(batch, given=None) for batch in self)
        whole = partial(_whole_batch, batches)
        return replace(self, count=len(batches), batch_size=1, read=whole, batches=batches, read_all=None)

    def at(self, positions: Sequence[int], name: str) -> EvaluationData:
        """The examples at some positions."""

        def among(chosen: Sequence[int]) -> list[int]:
            return [positions[place] for place in chosen]

        def read(chosen: Sequence[int]) -> Batch:
            return self.read(among(chosen))

        def read_all(groups: Sequence[Sequence[int]]) -> Iterator[Batch]:
            return _read_all(self, [among(chosen) for chosen in groups])

        return replace(self, name=name, count=len(positions), read=read, batches=(), read_all=read_all)


def _whole_batch(batches: Sequence[Batch], places: Sequence[int]) -> Batch:
    return batches[places[0]]


def _read_all(data: EvaluationData | _Examples, groups: Sequence[Sequence[int]]) -> Iterator[Batch]:
    """A batch for each group of positions, read ahead where the data can do that."""
    return map(data.read, groups) if data.read_all is None else data.read_all(groups)


@dataclass(frozen=True)
class Sample:
    """Which examples of some data are used, and what for.

    `split` chooses a part of the built-in data; files have no parts. `limit` keeps at most so many examples, evenly
    spaced, or of an iterable the first ones; `default_limit` applies without it, but not to data in batches. Text must
    have `least_windows` whole windows. `option` is the one that the data were given for. With a `metric` batches are
    kept as the caller's loader makes them, understood or not.
    """

    split: Split = "test"
    limit: int | None = None
    default_limit: int | None = None
    least_windows: int | None = None
    option: DataOption = "data"
    metric: CustomMetric | None = None

    def limited(self) -> Sample:
        """The same sample with the default limit if there is no other."""
        return replace(self, limit=self.limit or self.default_limit)


def open_data(
    data: Any, preprocessing: Preprocessing | None = None, sample: Sample | None = None, *, batch_size: int = 32
) -> EvaluationData:
    """Open data for a model: a path, `builtin:digits`, `builtin:stdlib`, or an object.

    Files and folders:

    - Text (.txt, .md, .py, a folder of them; .jsonl or .csv with `text` only; `builtin:stdlib`) is for
      language modeling. A file is a document, and so is a row of .jsonl or .csv. For a model that reads `tokens`
      documents are joined by the tokenizer's end-of-text token, or by an empty line if it has none, and cut into
      windows of `sequence_length` tokens that do not overlap. Each window of L tokens scores L - 1 predictions.
      What is left over at the end is dropped, unless there is no whole window. Without `sequence_length` it is
      2048, or the tokenizer's `model_max_length` if that is less. Of a text of more than 2 MB, with a `limit`, only
      so many windows are read and tokenized. A model that reads `documents`, an encoder, gets one in a row with its
      special tokens, padded, longer ones in several rows; there a line of a .txt file is a document.
    - .jsonl or .csv with `source` and `target`, for an encoder-decoder, which reads `pairs`.
    - .jsonl or .csv with `text` and `label`: text classification, texts cut at `sequence_length` tokens.
    - .csv with columns of numbers and `label`: their classification, columns in the file's order.
    - .npz or .safetensors with inputs (`inputs`, `x`, `images`, `pixel_values`, `input_ids`) and labels
      (`labels`, `y`, `targets`): as they are, without preprocessing. `input_ids`, and integers of two bytes or more
      by any name, are token ids, and alone are windows of text. Or with
      everything that the model's forward takes, under the names `inputs` that it has there.
    - A folder of images in one subfolder per class, and `builtin:digits`: image classification. Images are
      made one or three channels and preprocessed by `image_processor`; without one they are only scaled to
      [0, 1].

    Objects, which are the same examples as a file with the same contents:

    - A tensor or array with one example in each row, a pair (inputs, labels), or a mapping of arrays, as .npz.
    - A list or another iterable of texts, or of mappings with `text`, as .jsonl.
    - A `torch.utils.data.Dataset` or a `datasets.Dataset`, whose examples are texts, PIL images, mappings, tensors,
      or pairs of one of these and a label. They are read where they are needed, and so are those behind a `DataLoader`
      with its `collate_fn`, in an order that its sampler gives.
    - Any other iterable of batches, each a tensor, a mapping of inputs and `labels`, or a pair of inputs and labels: it
      is read once and kept, to the end or up to the `limit`.

    Raises `BadInput` naming the file, and the line, or the object, where the data are bad.
    """
    preprocessing, sample = preprocessing or Preprocessing(), sample or Sample()
    _require_at_least(2, sequence_length=preprocessing.sequence_length)
    _require_at_least(1, batch_size=batch_size, limit=sample.limit, least_windows=sample.least_windows)
    if not isinstance(data, str | os.PathLike):
        given = Given(data, sample.option, preprocessing.inputs, sample.limit, sample.default_limit)
        contents = contents_of(given)
        batched = isinstance(contents, Batches) or (isinstance(contents, Rows) and contents.batch_size is not None)
        sample = sample if batched else sample.limited()
        examples = _opened(contents, _Use(given.name, preprocessing, sample))
        return replace(_in_batches(examples, batch_size, sample.limit), metric=sample.metric)
    name, sample = os.fspath(data), sample.limited()
    if name == "builtin:digits":
        examples = _digits(sample.split, preprocessing.image_processor)
    elif name == "builtin:stdlib":
        files = standard_library_files(sample.split)
        examples = _texts(Corpus(files), _Use(f"{name}, {sample.split} split", preprocessing, sample))
    elif name.startswith("builtin:"):
        raise BadInput(f"there is no built-in data {name!r}", remedy=f"use {' or '.join(BUILTINS)}")
    else:
        # Nothing is measured on calibration data.
        contents = read_contents(Path(name), preprocessing.inputs, labeled=sample.option == "data")
        examples = _opened(contents, _Use(name, preprocessing, sample))
    return replace(_in_batches(examples, batch_size, sample.limit), metric=sample.metric)


@dataclass(frozen=True)
class _Use:
    """The name of the data, their preprocessing, and which examples are used."""

    name: str
    preprocessing: Preprocessing
    sample: Sample

    def class_numbers(self, labels: Sequence[str | int], *, names_may_be_sorted: bool = False) -> Tensor:
        classes = self.preprocessing.classes
        return _class_numbers(labels, classes, self.name, names_may_be_sorted=names_may_be_sorted)


def _opened(contents: Contents, use: _Use) -> _Examples:
    match contents:
        case Texts():
            return _texts(Corpus(contents.documents, separator(use.preprocessing.tokenizer)), use)
        case TextPairs():
            return _text_pairs(contents, use)
        case NamedArrays():
            return _by_name(contents.arrays, use)
        case LabeledTexts():
            return _labeled_texts(contents.texts, use.class_numbers(contents.labels), use)
        case LabeledImages():
            labels = use.class_numbers(contents.labels, names_may_be_sorted=True)
            return _image_files(contents.paths, labels, use)
        case Images():
            return _images(contents, use)
        case Arrays(labels=None):
            if contents.inputs.is_floating_point():
                return _arrays(use.name, contents.inputs, None)
            return _array_windows(use.name, contents.inputs)
        case Arrays():
            return _arrays(use.name, contents.inputs, use.class_numbers(contents.labels or ()))
        case Rows():
            return _rows(contents, use)
        case Batches():
            return _batches(contents, use)


def has_splits(data: object) -> bool:
    """Whether the data have a training, a validation and a test split: the built-in ones do."""
    return isinstance(data, str | os.PathLike) and os.fspath(data).startswith("builtin:")


def halves(data: EvaluationData) -> tuple[EvaluationData, EvaluationData]:
    """Every second example of some data, beginning with the first, and the others.

    Raises `BadInput` for data of one example.
    """
    if data.count < 2:
        what = "one batch" if data.batches else "one example"
        raise BadInput(f"{what} cannot both decide and be measured", where=data.name, remedy="give two at least")
    first, second = range(0, data.count, 2), range(1, data.count, 2)
    return data.at(first, f"{data.name}, every second example"), data.at(second, f"{data.name}, the other examples")


def open_search_data(data: Any, preprocessing: Preprocessing, sample: Sample) -> tuple[EvaluationData, EvaluationData]:
    """Data to choose a size by, and other data to report the drop on.

    The validation and the test split of built-in data, at most the limit of examples of each; of other data two halves
    of at most so many examples together.
    """
    if has_splits(data):
        search = open_data(data, preprocessing, replace(sample, split="validation"))
        return search, open_data(data, preprocessing, replace(sample, split="test"))
    return halves(open_data(data, preprocessing, sample))


def require_apart(calibration: object, data: object) -> None:
    """Raise `BadInput` when calibration and evaluation would see the same examples.

    That is when they are the same file or folder, files of the same bytes, or one lies in the other. Built-in data are
    kept apart by their splits. The same object for both is only warned of.
    """
    if calibration is data and not isinstance(data, str | os.PathLike):
        logger.warning(
            "`calibration` and `data` are the same object: what is measured on it is better than on other data"
        )
    if not isinstance(calibration, str | os.PathLike) or not isinstance(data, str | os.PathLike):
        return
    if has_splits(calibration) or has_splits(data):
        return
    fitted, measured = Path(calibration), Path(data)
    if not fitted.exists() or not measured.exists():
        return  # said when they are opened
    same = fitted.samefile(measured) or (
        fitted.is_file() and measured.is_file() and filecmp.cmp(fitted, measured, shallow=False)
    )
    inside = measured.resolve() in fitted.resolve().parents or fitted.resolve() in measured.resolve().parents
    if same or inside:
        raise BadInput(
            f"the calibration data {'are' if same else 'overlap'} the data to measure on, and would flatter it",
            where=measured,
            remedy="split them into two files, one for `calibration` and one for `data`",
        )


@dataclass(frozen=True)
class _Examples:
    """All examples of some data; `batch_size` is None where any number of them goes into one batch."""

    name: str
    task: Task
    count: int
    read: Callable[[Sequence[int]], Batch]
    batch_size: int | None = None
    unused: str = ""
    batches: tuple[Batch, ...] = ()
    read_all: ReadAll | None = None


def _in_batches(examples: _Examples, batch_size: int, limit: int | None) -> EvaluationData:
    # What came in batches was limited when it was read.
    count = examples.count if limit is None or examples.batches else min(limit, examples.count)

    def spread(positions: Sequence[int]) -> list[int]:
        # Evenly spaced, because the first examples are often all of one class.
        return [position * examples.count // count for position in positions]

    def read(positions: Sequence[int]) -> Batch:
        return examples.read(spread(positions))

    def read_all(groups: Sequence[Sequence[int]]) -> Iterator[Batch]:
        return _read_all(examples, [spread(positions) for positions in groups])

    return EvaluationData(
        examples.name,
        examples.task,
        count,
        examples.batch_size or batch_size,
        read=read,
        unused=examples.unused
        or (f"{examples.count - count:,} of {examples.count:,} examples" if count < examples.count else ""),
        batches=examples.batches,
        read_all=read_all,
    )


def _require_at_least(least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            raise BadInput(f"{name} is {value}", remedy=f"use at least {least}")


def _class_numbers(
    labels: Sequence[str | int],
    classes: Mapping[str, int] | None,
    where: str,
    *,
    names_may_be_sorted: bool = False,
) -> Tensor:
    """The number of each label's class: by the model's class names, or else the number that the label spells."""
    names = sorted({str(label) for label in labels})
    # transformers calls the classes of a model that has no names for them LABEL_0, LABEL_1, ...
    named = classes is not None and not all(name.startswith("LABEL_") for name in classes)
    numbers: Mapping[str, int] = {name: int(name) for name in names if name.removeprefix("-").isdecimal()}
    if classes is not None and all(name in classes for name in names):
        numbers = classes
    elif len(numbers) < len(names) and names_may_be_sorted and not named:
        # what torchvision's ImageFolder does, and so what models trained on such folders expect
        numbers = {name: number for number, name in enumerate(names)}
    if not all(name in numbers for name in names):
        unknown = next(name for name in names if name not in (classes or numbers))
        raise BadInput(
            f"the model has no class {unknown!r}",
            where=where,
            remedy="label with class numbers, or with the names in the model's label2id",
        )
    return torch.tensor([numbers[str(label)] for label in labels], dtype=torch.int64)


def _arrays(name: str, inputs: Tensor, labels: Tensor | None) -> _Examples:
    input_name = "inputs"
    if not inputs.is_floating_point():
        input_name = "input_ids"
    elif inputs.ndim == 4:
        input_name = "pixel_values"

    def read(positions: Sequence[int]) -> Batch:
        return Batch({input_name: inputs[positions]}, NO_LABELS if labels is None else labels[positions])

    return _Examples(name, _classification(inputs), len(inputs), read)


def _classification(inputs: Tensor) -> Task:
    """The classification task for these inputs."""
    if not inputs.is_floating_point():
        return "text-classification"
    return "image-classification" if inputs.ndim == 4 else "classification"


def _texts(corpus: Corpus, use: _Use) -> _Examples:
    tokenizer, length = use.preprocessing.tokenizer, use.preprocessing.sequence_length
    if corpus.blank:
        raise BadInput("there is no text in it", where=use.name, remedy="pass data with text")
    if tokenizer is None:
        raise _no_tokenizer(use.name)
    if length is None:
        longest = getattr(tokenizer, "model_max_length", LONGEST_DEFAULT_WINDOW)
        length = min(LONGEST_DEFAULT_WINDOW, int(longest))
    limit, reading = use.sample.limit, use.preprocessing.reading
    if reading == "tokens":
        found = windows(corpus, tokenizer, length, limit=limit, name=use.name, least=use.sample.least_windows or 0)
        return replace(_token_windows(use.name, found.rows), unused=found.unused)
    found = documents(corpus, tokenizer, length, limit=limit, name=use.name)
    padding = getattr(tokenizer, "pad_token_id", None)
    return replace(_padded_rows(use.name, found.rows, padding, labeled=reading == "pairs"), unused=found.unused)


def _padded_rows(name: str, rows: Sequence[Tensor], padding: int | None, *, labeled: bool) -> _Examples:
    """Padded documents; with `labeled` each is also its own target, for an encoder-decoder."""

    def read(positions: Sequence[int]) -> Batch:
        chosen = [rows[position].long() for position in positions]
        token_ids = pad_sequence(chosen, batch_first=True, padding_value=padding or 0)
        mask = pad_sequence([torch.ones_like(row) for row in chosen], batch_first=True)
        labels = token_ids.masked_fill(mask == 0, IGNORED_LABEL)
        inputs = {"input_ids": token_ids, "attention_mask": mask}
        return Batch(inputs | ({"labels": labels} if labeled else {}), labels)

    task: Task = "text-to-text" if labeled else "language-modeling"
    return _Examples(name, task, len(rows), read, None if padding is not None else 1)


def _no_tokenizer(name: str) -> BadInput:
    return BadInput(
        "text needs the model's tokenizer, and there is none",
        where=name,
        remedy="pass a model folder that has its tokenizer files, or in Python a `tokenizer`",
    )


def _array_windows(name: str, windows: Tensor) -> _Examples:
    if windows.ndim != 2 or windows.shape[1] < 2:
        raise BadInput(
            f"`input_ids` without labels are of shape {tuple(windows.shape)}",
            where=name,
            remedy="give windows of at least two tokens, (windows, tokens), or labels",
        )
    return _token_windows(name, windows)


def _token_windows(name: str, windows: Sequence[Tensor] | Tensor) -> _Examples:
    def read(positions: Sequence[int]) -> Batch:
        token_ids = torch.stack([windows[position] for position in positions]).long()
        return Batch({"input_ids": token_ids}, token_ids[:, 1:])

    return _Examples(name, "language-modeling", len(windows), read)


def _labeled_texts(texts: Sequence[str], labels: Tensor, use: _Use) -> _Examples:
    tokenizer = use.preprocessing.tokenizer
    if tokenizer is None:
        raise _no_tokenizer(use.name)
    # without a padding token texts of different lengths do not go into one batch
    pads = getattr(tokenizer, "pad_token", None) is not None

    def read(positions: Sequence[int]) -> Batch:
        encoded = tokenizer(
            [texts[position] for position in positions],
            padding=pads,
            truncation=True,
            max_length=use.preprocessing.sequence_length,
            return_tensors="pt",
        )
        return Batch(dict(encoded), labels[positions])

    return _Examples(use.name, "text-classification", len(texts), read, None if pads else 1)


def _text_pairs(pairs: TextPairs, use: _Use) -> _Examples:
    tokenizer = use.preprocessing.tokenizer
    if tokenizer is None:
        raise _no_tokenizer(use.name)
    if use.preprocessing.reading != "pairs":
        raise BadInput(
            "`source` and `target` are for encoder-decoders, and the model is none",
            where=use.name,
            remedy="give texts as `text`",
        )
    pads = getattr(tokenizer, "pad_token", None) is not None
    length = use.preprocessing.sequence_length
    shape = {"padding": pads, "truncation": True, "max_length": length, "return_tensors": "pt"}

    def read(positions: Sequence[int]) -> Batch:
        encoded = tokenizer([pairs.sources[position] for position in positions], **shape)
        targets = tokenizer(text_target=[pairs.targets[position] for position in positions], **shape)
        labels = targets["input_ids"].masked_fill(targets["attention_mask"] == 0, IGNORED_LABEL)
        inputs = {key: encoded[key] for key in ("input_ids", "attention_mask")}
        return Batch({**inputs, "labels": labels}, labels)

    return _Examples(use.name, "text-to-text", len(pairs.sources), read, None if pads else 1)


def _by_name(arrays: Mapping[str, Tensor], use: _Use) -> _Examples:
    """Inputs of a forward by name; its `labels` are the next tokens, the tokens of a target, or classes."""
    inputs = {key: array for key, array in arrays.items() if key != "labels"}
    labels = arrays.get("labels")
    task, _ = _named(inputs, labels, use.preprocessing)

    def read(positions: Sequence[int]) -> Batch:
        chosen = {key: array[positions] for key, array in inputs.items()}
        return _named(chosen, None if labels is None else labels[positions], use.preprocessing)[1]

    return _Examples(use.name, task, len(next(iter(arrays.values()))), read)


def _named(inputs: Mapping[str, Tensor], labels: Tensor | None, preprocessing: Preprocessing) -> tuple[Task, Batch]:
    """Inputs by name and their labels; without labels the tokens of a text are those to predict.

    An encoder-decoder makes what its decoder is given of the labels, where it is not given that.
    """
    reading = preprocessing.reading
    if labels is None and reading == "tokens" and "input_ids" in inputs and inputs.keys() <= TOKENS:
        labels = inputs["input_ids"].masked_fill(inputs.get("attention_mask", torch.ones(())) == 0, IGNORED_LABEL)
    task: Task = "image-classification" if "pixel_values" in inputs else "text-classification"
    if labels is None:
        return task, Batch(inputs, NO_LABELS)
    if labels.ndim == 2 and reading == "pairs":
        needed = "labels" in preprocessing.inputs and "decoder_input_ids" not in inputs
        return "text-to-text", Batch({**inputs, "labels": labels} if needed else inputs, labels)
    texts = "inputs_embeds" in inputs or not all(each.is_floating_point() for each in inputs.values())
    if labels.ndim == 2 and reading == "tokens" and texts:
        return "language-modeling", Batch(inputs, labels[:, 1:])
    return task, Batch(inputs, labels)


def _rows(rows: Rows, use: _Use) -> _Examples:
    def read(positions: Sequence[int]) -> Batch:
        return _understood(rows.read(positions), use)[1]

    def read_all(groups: Sequence[Sequence[int]]) -> Iterator[Batch]:
        ahead = map(rows.read, groups) if rows.read_all is None else rows.read_all(groups)
        return (_understood(given, use)[1] for given in ahead)

    task, _ = _understood(rows.read([0]), use)
    return _Examples(use.name, task, rows.count, read, rows.batch_size, read_all=read_all)


def _batches(given: Batches, use: _Use) -> _Examples:
    """Batches, taken apart into their examples only where all of them can be, and no metric wants them whole."""
    found = [_understood(each, use) for each in given.batches]
    task, batches = found[0][0], tuple(batch for _, batch in found)
    first = batches[0]
    alike = {tuple((key, each.shape[1:], each.dtype) for key, each in _columns(batch)) for batch in batches}
    if use.sample.metric is not None or len(alike) > 1 or not all(batch.aligned for batch in batches):
        return _Examples(use.name, task, len(batches), lambda places: batches[places[0]], 1, given.unused, batches)
    places = [(batch, row) for batch in batches for row in range(batch.examples)]

    def read(positions: Sequence[int]) -> Batch:
        chosen = [(dict(_columns(batch)), row) for batch, row in (places[position] for position in positions)]
        columns = {key: torch.stack([columns[key][row] for columns, row in chosen]) for key, _ in _columns(first)}
        labels = columns.pop(None, NO_LABELS)
        return Batch({key: each for key, each in columns.items() if key is not None}, labels)

    return _Examples(use.name, task, len(places), read, first.examples, given.unused, batches)


def _columns(batch: Batch) -> list[tuple[str | None, Tensor]]:
    """The inputs of a batch by name, and its labels under none, if it has any."""
    return [*batch.inputs.items(), *([(None, batch.labels)] if batch.labels.numel() else [])]


def _understood(given: Any, use: _Use) -> tuple[Task, Batch]:
    """A batch from a loader, and its task; with a custom metric it need not be understood."""
    try:
        batch = as_batch(given)
    except NotUnderstood as error:
        if use.sample.metric is not None:
            return "other", Batch({}, NO_LABELS, given)
        words = "the calibration data yields" if use.sample.option == "calibration" else "the data yields"
        raise BadInput(f"{words} {error.what}", option=use.sample.option, remedy=error.remedy) from None
    labels = batch.labels.cpu().long() if batch.labels.numel() else None
    if batch.inputs.keys() != {"inputs"}:
        task, named = _named(batch.inputs, labels, use.preprocessing)
        return task, replace(named, given=given)
    [inputs] = batch.inputs.values()
    next_tokens = labels is not None and not inputs.is_floating_point() and labels.shape == inputs.shape
    if next_tokens and labels is not None and inputs.ndim == 2 and torch.equal(labels[:, :-1], inputs[:, 1:].cpu()):
        return "language-modeling", Batch({"input_ids": inputs}, labels[:, :-1], given)
    if labels is None and not inputs.is_floating_point() and "input_ids" in use.preprocessing.inputs:
        task, named = _named({"input_ids": inputs}, None, use.preprocessing)
        return task, replace(named, given=given)
    return _classification(inputs), replace(batch, labels=NO_LABELS if labels is None else labels)


def _digits(split: Split, image_processor: Callable[..., Any] | None) -> _Examples:
    images, labels = digits(split)
    name = f"builtin:digits, {split} split"
    if image_processor is not None:
        channels = channels_wanted(image_processor) or 1
        pixels = [image.expand(channels, -1, -1).permute(1, 2, 0).numpy() for image in images]
        # Resizing goes by way of 8-bit pixels, which would round these images even where their size is right.
        resizes = getattr(image_processor, "do_resize", False) and not wants_size(image_processor, 8, 8)
        images = preprocess(image_processor, pixels, name, do_rescale=False, do_resize=resizes)
    return _arrays(name, images, labels)


def _image_files(paths: Sequence[Path], labels: Tensor, use: _Use) -> _Examples:
    processor = use.preprocessing.image_processor
    channels = channels_of(processor, paths[0])

    def read(positions: Sequence[int]) -> Batch:
        files = [paths[position] for position in positions]
        pixels = read_images(files, channels)
        images = scale(pixels, files) if processor is None else preprocess(processor, pixels, use.name)
        return Batch({"pixel_values": images}, labels[positions])

    return _Examples(use.name, "image-classification", len(paths), read)


def _images(images: Images, use: _Use) -> _Examples:
    processor = use.preprocessing.image_processor
    channels = channels_of(processor, images.read([0])[0][0])

    def read(positions: Sequence[int]) -> Batch:
        found, labels = images.read(positions)
        pixels = read_images(found, channels)
        places = [f"{use.name}, example {position}" for position in positions]
        made = scale(pixels, places) if processor is None else preprocess(processor, pixels, use.name)
        known = [label for label in labels if label is not None]
        classes = use.class_numbers(known) if len(known) == len(labels) else NO_LABELS
        return Batch({"pixel_values": made}, classes)

    return _Examples(use.name, "image-classification", images.count, read)
