"""Evaluation data: what a specification names, as batches for a model, always in the same order."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from compressor.errors import BadInput
from compressor.evaluation.builtin_data import Split, digits, standard_library_text
from compressor.evaluation.images import (
    channels_of,
    channels_wanted,
    preprocess,
    read_images,
    scale,
    wants_size,
)
from compressor.evaluation.readers import Arrays, LabelledImages, LabelledTexts, Texts, read_contents

Task = Literal["image-classification", "text-classification", "classification", "language-modeling"]

# The window of published perplexities of large language models (Frantar et al. 2023, GPTQ, section 4).
LONGEST_DEFAULT_WINDOW = 2048
BUILTINS = ("builtin:digits", "builtin:stdlib")


IGNORED_LABEL = -100  # of a position that is not to be predicted, as torch and transformers have it


@dataclass(frozen=True)
class Batch:
    """Some examples: the model's inputs by name, `(B, ...)` each, and what it should predict, as int64.

    `labels` is the class of each example, `(B,)`; or, for language modelling with windows `input_ids` of
    `(B, L)`, the next token at each position but the last: `input_ids[:, 1:]`, `(B, L - 1)`.
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
    examples at some positions, such as `range(32)`. `left_out` is the number of examples beyond a limit.
    """

    name: str
    task: Task
    count: int
    batch_size: int
    read: Callable[[Sequence[int]], Batch]
    left_out: int = 0

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
    batch_size: int = 32,
    limit: int | None = None,
    least_windows: int | None = None,
) -> EvaluationData:
    """Open the data that `spec` names: `builtin:digits`, `builtin:stdlib`, a file or a folder.

    - Text (.txt, .md, .py, a folder of them; .jsonl or .csv with `text` only; `builtin:stdlib`) is for
      language modelling: documents are joined by an empty line, tokenised as one text with the special tokens
      that the tokenizer adds to it, and cut into windows of `sequence_length` tokens that do not overlap.
      Each window of L tokens scores L - 1 predictions. What is left over at the end is dropped, unless there
      is no whole window. Without `sequence_length` it is 2048, or the tokenizer's `model_max_length` if that
      is less.
    - .jsonl or .csv with `text` and `label`: text classification, texts cut at `sequence_length` tokens.
    - .csv with columns of numbers and `label`: their classification, columns in the file's order.
    - .npz or .safetensors with inputs (`inputs`, `x`, `images`, `pixel_values`, `input_ids`) and labels
      (`labels`, `y`, `targets`): as they are, without preprocessing. `input_ids` alone are windows of text.
    - A folder of images in one subfolder per class, and `builtin:digits`: image classification. Images are
      made one or three channels and preprocessed by `image_processor`; without one they are only scaled to
      [0, 1].

    `tokenizer`, `image_processor` and `classes` (class name to number, `label2id` of its configuration) are
    the transformers model's own. `split` chooses a part of the built-in data; files have no parts. `limit`
    keeps at most so many examples, evenly spaced. Text must have `least_windows` whole windows.
    Raises `BadInput` naming the file, and the line, where the data is bad.
    """
    _require_at_least(2, sequence_length=sequence_length)
    _require_at_least(1, batch_size=batch_size, limit=limit, least_windows=least_windows)
    name = os.fspath(spec)
    if name == "builtin:digits":
        data = _digits(split, image_processor)
    elif name == "builtin:stdlib":
        text = standard_library_text(split)
        data = _language(f"{name}, {split} split", text, tokenizer, sequence_length, least_windows)
    elif name.startswith("builtin:"):
        raise BadInput(f"there is no built-in data {name!r}", remedy=f"use {' or '.join(BUILTINS)}")
    else:
        contents = read_contents(Path(name))
        match contents:
            case Texts():
                data = _language(name, "\n\n".join(contents.texts), tokenizer, sequence_length, least_windows)
            case LabelledTexts():
                labels = _class_numbers(contents.labels, classes, name)
                data = _labelled_texts(name, contents.texts, labels, tokenizer, sequence_length)
            case LabelledImages():
                labels = _class_numbers(contents.labels, classes, name, names_may_be_sorted=True)
                data = _images(name, contents.paths, labels, image_processor)
            case Arrays(labels=None):
                data = _token_windows(name, contents.inputs)
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
        left_out=examples.count - count,
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


def _language(
    name: str,
    text: str,
    tokenizer: Callable[..., Any] | None,
    sequence_length: int | None,
    least_windows: int | None,
) -> _Examples:
    if not text.strip():
        raise BadInput("there is no text in it", where=name, remedy="pass data with text")
    if tokenizer is None:
        raise _no_tokenizer(name)
    # not verbose: that the whole text is longer than the model's window is as it should be
    encoded = tokenizer(text, return_attention_mask=False, verbose=False)
    token_ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    if len(token_ids) < 2:
        raise BadInput(
            f"the text is {len(token_ids)} token long, too short to predict one from another",
            where=name,
            remedy="pass more text",
        )
    if sequence_length is None:
        longest = getattr(tokenizer, "model_max_length", LONGEST_DEFAULT_WINDOW)
        sequence_length = min(LONGEST_DEFAULT_WINDOW, int(longest))
    if least_windows is not None and len(token_ids) < least_windows * sequence_length:
        raise BadInput(
            f"the text is {len(token_ids):,} tokens long, less than {least_windows} windows of {sequence_length:,}",
            where=name,
            remedy="give more text, or ask for shorter windows with `calibration_sequence_length`",
        )
    length = min(sequence_length, len(token_ids))
    count = len(token_ids) // length
    return _token_windows(name, token_ids[: count * length].reshape(count, length))


def _no_tokenizer(name: str) -> BadInput:
    return BadInput(
        "text needs the model's tokenizer, and there is none",
        where=name,
        remedy="pass a model folder that has its tokenizer files",
    )


def _token_windows(name: str, windows: Tensor) -> _Examples:
    if windows.ndim != 2 or windows.shape[1] < 2:
        raise BadInput(
            f"`input_ids` without labels are of shape {tuple(windows.shape)}",
            where=name,
            remedy="give windows of at least two tokens, (windows, tokens), or labels",
        )

    def read(positions: Sequence[int]) -> Batch:
        token_ids = windows[positions]
        return Batch({"input_ids": token_ids}, token_ids[:, 1:])

    return _Examples(name, "language-modeling", len(windows), read)


def _labelled_texts(
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
