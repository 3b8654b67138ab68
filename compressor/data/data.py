"""Evaluation data: what a specification names, as batches for a model, always in the same order."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from compressor.choices import Split
from compressor.data.builtin_data import digits, standard_library_files
from compressor.data.images import channels_of, channels_wanted, preprocess, read_images, scale, wants_size
from compressor.data.readers import Arrays, LabeledImages, LabeledTexts, NamedArrays, TextPairs, Texts, read_contents
from compressor.data.text import Corpus, documents, separator, windows
from compressor.errors import BadInput

Task = Literal["image-classification", "text-classification", "classification", "language-modeling", "text-to-text"]

# How a model reads text: on from token to token; a document at a time; or one text, of which it makes another.
Reading = Literal["tokens", "documents", "pairs"]

# The window of published perplexities of large language models (Frantar et al. 2023, GPTQ, section 4).
LONGEST_DEFAULT_WINDOW = 2048
BUILTINS = ("builtin:digits", "builtin:stdlib")


IGNORED_LABEL = -100  # of a position that is not to be predicted, as torch and transformers have it


@dataclass(frozen=True)
class Batch:
    """Some examples: the model's inputs by name, `(B, ...)` each, and what it should predict, as int64.

    `labels` is the class of each example, `(B,)`; or, for language modeling with windows `input_ids` of
    `(B, L)`, the next token at each position but the last: `input_ids[:, 1:]`, `(B, L - 1)`; or the token at each
    position of the outputs, `(B, L)`. -100 is not to be predicted. There are none, `(0,)`, in data without labels.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor

    def __getitem__(self, rows: slice) -> Batch:
        """Some of the examples; what has not a row for each stays whole."""
        inputs = {name: each[rows] if self._has_row_for_each(each) else each for name, each in self.inputs.items()}
        return Batch(inputs, self.labels[rows] if self._has_row_for_each(self.labels) else self.labels)

    def _has_row_for_each(self, tensor: Tensor) -> bool:
        """Whether a tensor has one row for each of the examples."""
        return tensor.shape[:1] == (self.examples,)

    @property
    def examples(self) -> int:
        return len(next(iter(self.inputs.values())))

    @property
    def masks(self) -> tuple[Tensor, ...]:
        """What is false on padding, `(B, L)` each: of what a decoder is given, then of the encoder's or only text."""
        decoder, labels = self.inputs.get("decoder_attention_mask"), self.inputs.get("labels")
        if decoder is None and labels is not None:
            decoder = labels != IGNORED_LABEL
        return tuple(mask for mask in (decoder, self.inputs.get("attention_mask")) if mask is not None)


@dataclass(frozen=True)
class EvaluationData:
    """Examples in a fixed order, to be iterated over any number of times, in batches of `batch_size`.

    `count` is the number of examples: images, rows, texts, or windows of text. `read` gives the batch of the
    examples at some positions, such as `range(32)`. `unused` says what was left out by a limit.
    """

    name: str
    task: Task
    count: int
    batch_size: int
    read: Callable[[Sequence[int]], Batch]
    unused: str = ""

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, self.count, self.batch_size):
            yield self.read(range(start, min(start + self.batch_size, self.count)))


def open_data(
    spec: str | os.PathLike[str],
    *,
    split: Split = "test",
    tokenizer: Callable[..., Any] | None = None,
    image_processor: Callable[..., Any] | None = None,
    classes: Mapping[str, int] | None = None,
    sequence_length: int | None = None,
    reading: Reading = "tokens",
    inputs: Collection[str] = (),
    batch_size: int = 32,
    limit: int | None = None,
    least_windows: int | None = None,
) -> EvaluationData:
    """Open the data that `spec` names: `builtin:digits`, `builtin:stdlib`, a file or a folder.

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

    `tokenizer`, `image_processor`, `classes` (class name to number, `label2id` of its configuration), `reading` and
    `inputs` are the transformers model's own. `split` chooses a part of the built-in data; files have no parts. `limit`
    keeps at most so many examples, evenly spaced. Text must have `least_windows` whole windows.
    Raises `BadInput` naming the file, and the line, where the data is bad.
    """
    _require_at_least(2, sequence_length=sequence_length)
    _require_at_least(1, batch_size=batch_size, limit=limit, least_windows=least_windows)
    name = os.fspath(spec)
    if name == "builtin:digits":
        data = _digits(split, image_processor)
    elif name == "builtin:stdlib":
        files = standard_library_files(split)
        reader = _TextReader(f"{name}, {split} split", tokenizer, sequence_length, reading, limit, least_windows)
        data = reader.examples(Corpus(files))
    elif name.startswith("builtin:"):
        raise BadInput(f"there is no built-in data {name!r}", remedy=f"use {' or '.join(BUILTINS)}")
    else:
        contents = read_contents(Path(name), inputs)
        match contents:
            case Texts():
                reader = _TextReader(name, tokenizer, sequence_length, reading, limit, least_windows)
                data = reader.examples(Corpus(contents.documents, separator(tokenizer)))
            case TextPairs():
                data = _text_pairs(name, contents, tokenizer, sequence_length, reading)
            case NamedArrays():
                data = _by_name(name, contents.arrays, reading, inputs)
            case LabeledTexts():
                labels = _class_numbers(contents.labels, classes, name)
                data = _labeled_texts(name, contents.texts, labels, tokenizer, sequence_length)
            case LabeledImages():
                labels = _class_numbers(contents.labels, classes, name, names_may_be_sorted=True)
                data = _images(name, contents.paths, labels, image_processor)
            case Arrays(labels=None):
                data = _array_windows(name, contents.inputs)
            case Arrays():
                data = _arrays(name, contents.inputs, _class_numbers(contents.labels or (), classes, name))
    return _in_batches(data, batch_size, limit)


def has_splits(spec: str | os.PathLike[str]) -> bool:
    """Whether the data have a training, a validation and a test split: the built-in ones do."""
    return os.fspath(spec).startswith("builtin:")


def halves(data: EvaluationData) -> tuple[EvaluationData, EvaluationData]:
    """Every second example of some data, beginning with the first, and the others.

    Raises `BadInput` for data of one example.
    """
    if data.count < 2:
        raise BadInput(
            "one example cannot both decide and be measured", where=data.name, remedy="give two examples at least"
        )

    def half(first: int, name: str) -> EvaluationData:
        def read(positions: Sequence[int]) -> Batch:
            return data.read([first + 2 * position for position in positions])

        return replace(data, name=f"{data.name}, {name}", count=len(range(first, data.count, 2)), read=read)

    return half(0, "every second example"), half(1, "the other examples")


def require_apart(calibration: str | os.PathLike[str], data: str | os.PathLike[str]) -> None:
    """Raise `BadInput` when calibration and evaluation would see the same examples.

    That is when they are the same file or folder, files of the same bytes, or one lies in the other. Built-in data are
    kept apart by their splits.
    """
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
    """All examples of some data; `stacks` says whether several of them go into one batch."""

    name: str
    task: Task
    count: int
    read: Callable[[Sequence[int]], Batch]
    stacks: bool = True
    unused: str = ""


def _in_batches(examples: _Examples, batch_size: int, limit: int | None) -> EvaluationData:
    count = examples.count if limit is None else min(limit, examples.count)

    def read(positions: Sequence[int]) -> Batch:
        # Spread over all, because the first ones are often all of one class.
        return examples.read([position * examples.count // count for position in positions])

    return EvaluationData(
        examples.name,
        examples.task,
        count,
        batch_size if examples.stacks else 1,
        read=read,
        unused=examples.unused
        or (f"{examples.count - count:,} of {examples.count:,} examples" if count < examples.count else ""),
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
    """Number each label's class: by the model's names for its classes, else as the number that it spells."""
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


def _arrays(name: str, inputs: Tensor, labels: Tensor) -> _Examples:
    task: Task = "classification"
    input_name = "inputs"
    if not inputs.is_floating_point():
        task, input_name = "text-classification", "input_ids"
    elif inputs.ndim == 4:
        task, input_name = "image-classification", "pixel_values"

    def read(positions: Sequence[int]) -> Batch:
        return Batch({input_name: inputs[positions]}, labels[positions])

    return _Examples(name, task, len(inputs), read)


@dataclass(frozen=True)
class _TextReader:
    """How texts become rows of tokens for a model."""

    name: str
    tokenizer: Callable[..., Any] | None
    sequence_length: int | None
    reading: Reading
    limit: int | None
    least_windows: int | None

    def examples(self, corpus: Corpus) -> _Examples:
        if corpus.blank:
            raise BadInput("there is no text in it", where=self.name, remedy="pass data with text")
        if self.tokenizer is None:
            raise _no_tokenizer(self.name)
        length = self.sequence_length
        if length is None:
            longest = getattr(self.tokenizer, "model_max_length", LONGEST_DEFAULT_WINDOW)
            length = min(LONGEST_DEFAULT_WINDOW, int(longest))
        if self.reading == "tokens":
            found = windows(corpus, self.tokenizer, length, self.limit, self.name, self.least_windows or 0)
            return replace(_token_windows(self.name, found.rows), unused=found.unused)
        found = documents(corpus, self.tokenizer, length, self.limit, self.name)
        padding = getattr(self.tokenizer, "pad_token_id", None)
        return replace(
            _padded_rows(self.name, found.rows, padding, labeled=self.reading == "pairs"), unused=found.unused
        )


def _padded_rows(name: str, rows: Sequence[Tensor], padding: int | None, *, labeled: bool) -> _Examples:
    """Documents; an encoder-decoder (`labeled`) is to make each of itself."""

    def read(positions: Sequence[int]) -> Batch:
        chosen = [rows[position].long() for position in positions]
        token_ids = pad_sequence(chosen, batch_first=True, padding_value=padding or 0)
        mask = pad_sequence([torch.ones_like(row) for row in chosen], batch_first=True)
        labels = token_ids.masked_fill(mask == 0, IGNORED_LABEL)
        inputs = {"input_ids": token_ids, "attention_mask": mask}
        return Batch(inputs | ({"labels": labels} if labeled else {}), labels)

    task: Task = "text-to-text" if labeled else "language-modeling"
    return _Examples(name, task, len(rows), read, stacks=padding is not None)


def _no_tokenizer(name: str) -> BadInput:
    return BadInput(
        "text needs the model's tokenizer, and there is none",
        where=name,
        remedy="pass a model folder that has its tokenizer files",
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


def _labeled_texts(
    name: str,
    texts: Sequence[str],
    labels: Tensor,
    tokenizer: Callable[..., Any] | None,
    sequence_length: int | None,
) -> _Examples:
    if tokenizer is None:
        raise _no_tokenizer(name)
    # without a padding token texts of different lengths do not go into one batch
    pads = getattr(tokenizer, "pad_token", None) is not None

    def read(positions: Sequence[int]) -> Batch:
        encoded = tokenizer(
            [texts[position] for position in positions],
            padding=pads,
            truncation=True,
            max_length=sequence_length,
            return_tensors="pt",
        )
        return Batch(dict(encoded), labels[positions])

    return _Examples(name, "text-classification", len(texts), read, stacks=pads)


def _text_pairs(
    name: str,
    pairs: TextPairs,
    tokenizer: Callable[..., Any] | None,
    sequence_length: int | None,
    reading: Reading,
) -> _Examples:
    if tokenizer is None:
        raise _no_tokenizer(name)
    if reading != "pairs":
        raise BadInput(
            "`source` and `target` are for encoder-decoders, and the model is none",
            where=name,
            remedy="give texts as `text`",
        )
    pads = getattr(tokenizer, "pad_token", None) is not None
    shape = {"padding": pads, "truncation": True, "max_length": sequence_length, "return_tensors": "pt"}

    def read(positions: Sequence[int]) -> Batch:
        encoded = tokenizer([pairs.sources[position] for position in positions], **shape)
        targets = tokenizer(text_target=[pairs.targets[position] for position in positions], **shape)
        labels = targets["input_ids"].masked_fill(targets["attention_mask"] == 0, IGNORED_LABEL)
        inputs = {key: encoded[key] for key in ("input_ids", "attention_mask")}
        return Batch({**inputs, "labels": labels}, labels)

    return _Examples(name, "text-to-text", len(pairs.sources), read, stacks=pads)


def _by_name(name: str, arrays: Mapping[str, Tensor], reading: Reading, known: Collection[str]) -> _Examples:
    """What a forward is given; its `labels` are the next tokens, those of a target, or classes.

    An encoder-decoder makes what its decoder is given of the labels, where it is not given that.
    """
    labels = arrays.get("labels")
    others = {key: array for key, array in arrays.items() if key != "labels"}
    task: Task = "image-classification" if "pixel_values" in arrays else "text-classification"
    if labels is None and reading == "tokens" and others.keys() <= {"input_ids", "attention_mask"}:
        labels = arrays["input_ids"].masked_fill(others.get("attention_mask", torch.ones(())) == 0, IGNORED_LABEL)
    if labels is not None and labels.ndim == 2 and reading == "pairs":
        task = "text-to-text"
    elif labels is not None and labels.ndim == 2 and reading == "tokens":
        task = "language-modeling"

    def read(positions: Sequence[int]) -> Batch:
        inputs = {key: array[positions] for key, array in others.items()}
        if labels is None:
            return Batch(inputs, torch.empty(0, dtype=torch.int64))
        if task == "text-to-text":
            needed = "labels" in known and "decoder_input_ids" not in inputs
            return Batch(inputs | ({"labels": labels[positions]} if needed else {}), labels[positions])
        return Batch(inputs, labels[positions][:, 1:] if task == "language-modeling" else labels[positions])

    return _Examples(name, task, len(next(iter(arrays.values()))), read)


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


def _images(name: str, paths: Sequence[Path], labels: Tensor, image_processor: Callable[..., Any] | None) -> _Examples:
    channels = channels_of(image_processor, paths[0])

    def read(positions: Sequence[int]) -> Batch:
        files = [paths[position] for position in positions]
        pixels = read_images(files, channels)
        images = scale(pixels, files) if image_processor is None else preprocess(image_processor, pixels, name)
        return Batch({"pixel_values": images}, labels[positions])

    return _Examples(name, "image-classification", len(paths), read)
