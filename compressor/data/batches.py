"""Batches: what a model is given and should predict, and the forms in which a loader gives them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORED_LABEL = -100  # of a position that is not to be predicted, as torch and transformers have it
LABELS = ("labels", "label")


@dataclass(frozen=True)
class Batch:
    """Some examples: the model's inputs by name, `(B, ...)` each, and what it should predict, as int64.

    `labels` is the class of each example, `(B,)`; or, for language modeling with windows `input_ids` of
    `(B, L)`, the next token at each position but the last: `input_ids[:, 1:]`, `(B, L - 1)`; or the token at each
    position of the outputs, `(B, L)`. -100 is not to be predicted. There are none, `(0,)`, in data without labels.
    `given` is the batch as the caller's loader made it, None of other data; what is not understood has nothing else.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor
    given: Any = field(default=None, repr=False, compare=False)

    def __getitem__(self, rows: slice) -> Batch:
        """Some of the examples; tensors without one row per example stay whole."""
        inputs = {name: each[rows] if self._has_row_for_each(each) else each for name, each in self.inputs.items()}
        return Batch(inputs, self.labels[rows] if self._has_row_for_each(self.labels) else self.labels)

    def _has_row_for_each(self, tensor: Tensor) -> bool:
        """Whether a tensor has one row for each of the examples."""
        return tensor.shape[:1] == (self.examples,)

    @property
    def aligned(self) -> bool:
        """Whether every input, and the labels if there are any, have one row for each of the examples."""
        tensors = (*self.inputs.values(), *((self.labels,) if self.labels.numel() else ()))
        return all(map(self._has_row_for_each, tensors))

    @property
    def examples(self) -> int:
        return len(next(iter(self.inputs.values())))

    def bare(self) -> Batch:
        """The same for another process: without what a loader gave, which may be anything."""
        return Batch(self.inputs, self.labels)

    @property
    def masks(self) -> tuple[Tensor, ...]:
        """Masks that are false on padding, `(B, L)` each: of the decoder, then of the encoder or only text."""
        decoder, labels = self.inputs.get("decoder_attention_mask"), self.inputs.get("labels")
        if decoder is None and labels is not None:
            decoder = labels != IGNORED_LABEL
        return tuple(mask for mask in (decoder, self.inputs.get("attention_mask")) if mask is not None)


class NotUnderstood(Exception):  # noqa: N818 - it names the batch's state
    """The batch cannot be read as inputs and labels: what it is, and what to do about it."""

    def __init__(self, what: str, remedy: str) -> None:
        self.what, self.remedy = what, remedy
        super().__init__(what)


def as_tensor(value: object) -> Tensor | None:
    """A tensor, or an array of numbers, as a tensor outside of any graph; None for anything else."""
    if isinstance(value, Tensor):
        # Nothing can be differentiated through what was made under `torch.inference_mode`.
        return value.clone() if value.is_inference() else value.detach()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        native = value.astype(value.dtype.newbyteorder("="), copy=False)
        return torch.from_numpy(native if native.flags.writeable else native.copy())
    return None


def as_batch(given: Any) -> Batch:
    """Inputs and labels from what a loader yields: inputs, a mapping of inputs, or a pair of these and labels.

    Labels that are not whole numbers are left out. Raises `NotUnderstood` for anything else.
    """
    pair = isinstance(given, list | tuple) and len(given) > 0
    inputs, labels = given[0] if pair else given, given[1] if pair and len(given) > 1 else None
    named = inputs if isinstance(inputs, Mapping) else {"inputs": inputs}
    tensors = {str(name): as_tensor(each) for name, each in named.items()}
    known = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if not known or len(known) < len(tensors):
        raise NotUnderstood(type(given).__name__, "yield tensors, pairs, or mappings of tensors")
    if any(tensor.is_meta for tensor in known.values()):
        what = "tensors on the meta device, which have no values"
        raise NotUnderstood(what, "make them on the CPU: torch.set_default_device or torch.device was in force")
    classes = next((known[name] for name in LABELS if name in known), as_tensor(labels))
    known = {name: tensor for name, tensor in known.items() if name not in LABELS}
    if classes is not None and classes.ndim == 0:
        raise NotUnderstood("single examples", "yield batches of them, or give a `Dataset`")
    if not known or any(tensor.numel() == 0 for tensor in known.values()):
        raise NotUnderstood("an empty batch", "leave it out")
    if classes is None or classes.is_floating_point() or classes.is_complex():
        classes = torch.empty(0, device="cpu")
    return Batch(known, classes, given)


# Batches as a loader gives them


def parts_of(batch: Any) -> list[Any]:
    """What a batch is made of: tensors, arrays, texts, and whatever else a loader may give."""
    if isinstance(batch, Mapping):
        return [part for each in batch.values() for part in parts_of(each)]
    if isinstance(batch, list | tuple):
        return [part for each in batch for part in parts_of(each)]
    return [batch]


def count_bytes(batch: Any) -> int:
    """The bytes of a batch's tensors, arrays and texts."""
    return sum(
        part.nbytes if isinstance(part, Tensor | np.ndarray) else len(part) if isinstance(part, str | bytes) else 0
        for part in parts_of(batch)
    )


def count_examples(batch: Any) -> int:
    """The number of examples in a batch: the rows of its first tensor, else one."""
    return next((len(part) for part in parts_of(batch) if isinstance(part, Tensor | np.ndarray) and part.ndim), 1)


def first_examples(batch: Any, count: int, of: int) -> Any:
    """The first `count` `of` the examples of a batch; what does not have a row for each of them stays whole."""
    if count == of:
        return batch
    if isinstance(batch, Tensor | np.ndarray):
        return batch[:count] if batch.shape[:1] == (of,) else batch
    if isinstance(batch, Mapping):
        return {name: first_examples(each, count, of) for name, each in batch.items()}
    if isinstance(batch, list | tuple):
        if any(isinstance(each, Tensor | np.ndarray | Mapping | list | tuple) for each in batch):
            return _same_kind(batch, [first_examples(each, count, of) for each in batch])
        return batch[:count] if len(batch) == of else batch
    return batch


def placed(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device; what else can be moved with `to` is moved too."""
    if isinstance(batch, Mapping):
        moved = {name: placed(each, device) for name, each in batch.items()}
        if type(batch) is dict or not hasattr(batch, "__setitem__"):
            return moved
        like: Any = copy.copy(batch)  # such as transformers' BatchEncoding
        for name, each in moved.items():
            like[name] = each
        return like
    if isinstance(batch, list | tuple):
        return _same_kind(batch, [placed(each, device) for each in batch])
    return batch.to(device) if hasattr(batch, "to") else batch


def _same_kind(batch: Any, parts: list[Any]) -> Any:
    """Parts in a list, tuple or named tuple like that of a batch."""
    return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
