"""What a fine-tune changed: two checkpoints of one architecture, compared and subtracted one tensor at a time."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from compressor.errors import BadInput
from compressor.initial import fitted_share, share_left
from compressor.io import Checkpoint, TensorInfo, refuse_adapter, refuse_fp8, require_finite
from compressor.io.tensors import StoredTensor
from compressor.measure.rounding import Rounding, rounding
from compressor.progress import Progress
from compressor.recipe import TrainingRecipe


@dataclass(frozen=True, eq=False)
class _Subtracted:
    """`tuned - share * base` of one tensor, in float64; the dtype is that in which it will be stored."""

    tuned: Checkpoint
    base: Checkpoint
    name: str
    share: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tuned.tensors[self.name].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.tuned.tensors[self.name].dtype

    @property
    def region(self) -> Hashable:
        return self

    def read(self) -> Tensor:
        tuned, base = (checkpoint.read(self.name).to(torch.float64) for checkpoint in (self.tuned, self.base))
        return tuned.sub_(base, alpha=self.share)


@dataclass(frozen=True, eq=False)
class _Extended:
    """A tensor of the base with rows of zeros behind its own: those of tokens that the fine-tune has added."""

    stored: StoredTensor
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.stored.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    @property
    def region(self) -> Hashable:
        return self

    def read(self) -> Tensor:
        known = self.stored.read()
        return torch.cat([known, known.new_zeros(self.rows - len(known), *known.shape[1:])])


@dataclass(frozen=True)
class Vocabulary:
    """How many tokens the base has and the fine-tune, and the tensors that have a row for each."""

    before: int
    after: int
    tensors: frozenset[str]


@dataclass(frozen=True)
class BaseShare:
    """How much of the base is left in a matrix of its fine-tune: `W_T = share * W_0 + what fine-tuning wrote`.

    Attributes:
        predicted: The share that weight decay left by the matrix's own recipe, exp(-K); None where that is not known.
        fitted: The share by least squares.
        share: The one that is used: predicted where that makes the rest smaller, else one, as in every adapter.
    """

    predicted: float | None
    fitted: float
    share: float


@dataclass(frozen=True)
class Difference:
    """A fine-tune, the model that it started from, and the names of the tensors in which they differ.

    `checkpoint` holds the differences of the floating-point tensors under the fine-tune's names: `W_T - share * W_0`,
    where `shares` says how much of the base is left in each changed matrix, if that is not all zeros. `rounding` says
    for each changed matrix what of the difference is the rounding of the fine-tune to the dtype that it is stored in.
    Of a fine-tune with more tokens than its base, `vocabulary` names the tensors that have more rows.
    """

    tuned: Checkpoint
    base: Checkpoint
    changed: frozenset[str]
    shares: Mapping[str, BaseShare]
    checkpoint: Checkpoint
    rounding: Mapping[str, Rounding] = field(default_factory=dict)
    vocabulary: Vocabulary | None = None

    @property
    def extended(self) -> frozenset[str]:
        """The tensors that have more rows than in the base; a pair cannot stand for what is added to nothing."""
        return frozenset() if self.vocabulary is None else self.vocabulary.tensors

    def share(self, name: str) -> float:
        """The share of the base that a tensor's difference is to: one of all that are no changed matrix."""
        return self.shares[name].share if name in self.shares else 1.0

    def rounding_share(self, tensors: Iterable[str]) -> float:
        """How much of the difference of some matrices together is rounding, in the Frobenius norm."""
        found = [self.rounding[name] for name in tensors if name in self.rounding]
        total = sum(each.size**2 for each in found)
        return (sum((each.share * each.size) ** 2 for each in found) / total) ** 0.5 if total > 0 else 0.0


def compare_checkpoints(
    tuned: Checkpoint,
    base: Checkpoint,
    recipe: TrainingRecipe,
    *,
    to_all: bool = False,
    progress: Progress | None = None,
) -> Difference:
    """Compare a fine-tune with its base, tensor by tensor.

    Each matrix gets the share of the base that weight decay has left in it, `p_T` of
    `compressor.measure.memory_window`, if the `recipe` tells it and the rest is smaller for it: then only
    `W_T - p_T W_0` is of the rank that training wrote. With `to_all` the differences are to all of the base.
    Tensors may have more rows than in the base, the same number all: those of tokens that were added. Raises `BadInput`
    when both are not of one architecture, or hold NaN.
    """
    refuse_adapter(tuned)
    refuse_adapter(base)
    refuse_fp8(base)
    vocabulary = _require_one_architecture(tuned, base)
    base = _extended(base, vocabulary)
    _require_same_ties(tuned, base)
    changed: set[str] = set()
    shares: dict[str, BaseShare] = {}
    rounded: dict[str, Rounding] = {}
    stored: dict[str, StoredTensor] = {}
    extended = frozenset[str]() if vocabulary is None else vocabulary.tensors
    for done, (name, info) in enumerate(tuned.tensors.items(), start=1):
        if tuned.stored(name) is base.stored(name):  # it lacks the tensor, and has that of the base
            continue
        found = compare_tensors(tuned, base, name, recipe=recipe, to_all=to_all, extended=name in extended)
        if found is not None:
            changed.add(name)
            rounded |= {} if found.rounding is None else {name: found.rounding}
            shares |= {} if found.share is None else {name: found.share}
        if info.dtype.is_floating_point:
            stored[name] = _Subtracted(tuned, base, name, shares[name].share if name in shares else 1.0)
        if progress:
            progress("compare", done, len(tuned.tensors))
    if not changed:
        raise BadInput("does not differ from its base", where=tuned.source, remedy="give the model that was fine-tuned")
    tensors = {name: tuned.tensors[name] for name in stored}
    differences = replace(tuned, tensors=tensors, metadata={}, _stored=stored)
    return Difference(tuned, base, frozenset(changed), shares, differences, rounded, vocabulary)


@dataclass(frozen=True)
class TensorChange:
    """What is left of the base in a matrix that changed, and what of the change is rounding; None of other tensors."""

    share: BaseShare | None = None
    rounding: Rounding | None = None


def compare_tensors(
    tuned: Checkpoint, base: Checkpoint, name: str, *, recipe: TrainingRecipe, to_all: bool, extended: bool = False
) -> TensorChange | None:
    """What became of one tensor; None where it is as it was. Raises `BadInput` where it is not finite."""
    new, old = tuned.read(name), base.read(name)
    require_finite(name, new, tuned.source)
    require_finite(name, old, base.source)
    if torch.equal(new.to(torch.float64), old.to(torch.float64)):
        return None
    if not new.dtype.is_floating_point or new.dim() < 2 or extended:
        return TensorChange()
    share = _base_share(new, old, recipe.of_parameter(name), to_all=to_all)
    return TensorChange(share, rounding(new, _subtracted(new, old, 1.0 if share is None else share.share)))


def _extended(base: Checkpoint, vocabulary: Vocabulary | None) -> Checkpoint:
    """The base with as many tokens as the fine-tune."""
    if vocabulary is None:
        return base
    names = {base.aliases.get(name, name) for name in vocabulary.tensors}
    return base.changed({name: _Extended(base.stored(name), vocabulary.after) for name in names})


def _base_share(new: Tensor, old: Tensor, recipe: TrainingRecipe, *, to_all: bool) -> BaseShare | None:
    """What of a matrix's base is left by its recipe and by the weights; None of a base of zeros."""
    if not old.any():
        return None
    predicted, fitted = share_left(recipe), fitted_share(new.to(torch.float64), old.to(torch.float64))
    share = 1.0
    if not to_all and predicted is not None and _norm(new, old, predicted) < _norm(new, old, 1.0):
        share = predicted
    return BaseShare(predicted, fitted, share)


def _subtracted(new: Tensor, old: Tensor, share: float) -> Tensor:
    return new.to(torch.float64, copy=True).sub_(old.to(torch.float64), alpha=share)


def _norm(new: Tensor, old: Tensor, share: float) -> float:
    return float(_subtracted(new, old, share).norm())


def _require_one_architecture(tuned: Checkpoint, base: Checkpoint) -> Vocabulary | None:
    """How the vocabulary was extended, if it was; `BadInput` where anything else is not as it is in the base."""
    remedy = "give the model that the fine-tuning started from, saved with the same head"
    for key in ("model_type", "architectures"):
        said = [(checkpoint.config or {}).get(key) for checkpoint in (tuned, base)]
        if tuned.folder is not None and base.folder is not None and said[0] != said[1]:
            words = [", ".join(value) if isinstance(value, list) else str(value) for value in said]
            raise BadInput(f"is a {words[0]}, and its base a {words[1]}", where=tuned.source, remedy=remedy)
    names = [_shapes(checkpoint) for checkpoint in (tuned, base)]
    for ours, theirs, what in ((names[0], names[1], "the base lacks"), (names[1], names[0], "lacks its base's")):
        if missing := [name for name in ours if name not in theirs]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise BadInput(f"{what} {missing[0]}{more}", where=tuned.source, remedy=remedy)
    vocabulary = _vocabulary(*names)
    for name, info in names[0].items():
        other = names[1][name]
        if info.shape != other.shape and (vocabulary is None or name not in vocabulary.tensors):
            sides = [" x ".join(map(str, each.shape)) or "one number" for each in (info, other)]
            rows = len(info.shape) == 2 == len(other.shape) and info.shape[1] == other.shape[1]
            raise BadInput(
                f"{name} is {sides[0]}, and in its base {sides[1]}",
                where=tuned.source,
                remedy="save the fine-tune with the vocabulary of its base (resize_token_embeddings)"
                if rows and info.shape[0] < other.shape[0]
                else remedy,
            )
        if info.dtype.is_floating_point != other.dtype.is_floating_point:
            raise BadInput(f"{name} is of another kind of numbers in its base", where=tuned.source, remedy=remedy)
    return vocabulary


def _vocabulary(tuned: Mapping[str, TensorInfo], base: Mapping[str, TensorInfo]) -> Vocabulary | None:
    """Where tensors have more rows than in the base, as many each, and are as wide; None where any other one differs.

    One of them at least is a matrix: the embedding.
    """
    other = {name: info for name, info in tuned.items() if info.shape != base[name].shape}
    shapes = [(info.shape, base[name].shape) for name, info in other.items()]
    if not any(len(ours) == 2 for ours, _ in shapes) or any(not ours or not theirs for ours, theirs in shapes):
        return None
    rows = {(theirs[0], ours[0]) for ours, theirs in shapes}
    if len(rows) > 1 or any(ours[1:] != theirs[1:] for ours, theirs in shapes):
        return None
    [(before, after)] = rows
    return Vocabulary(before, after, frozenset(other)) if after > before else None


def _require_same_ties(tuned: Checkpoint, base: Checkpoint) -> None:
    """What is one tensor in one of the two has to be one, or two of the same values, in the other."""
    for one, other, words in ((tuned, base, "two in its base"), (base, tuned, "one in its base")):
        for alias, name in one.aliases.items():
            if other.aliases.get(alias, alias) == other.aliases.get(name, name):
                continue
            if not torch.equal(other.read(alias), other.read(name)):
                number = "one tensor" if one is tuned else "two tensors"
                raise BadInput(
                    f"{alias} and {name} are {number} in it, and {words}",
                    where=tuned.source,
                    remedy="save both with the same tie_word_embeddings, or compress the fine-tune itself",
                )


def _shapes(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """Shape and dtype of each tensor by all of its names."""
    return dict(checkpoint.tensors) | {alias: checkpoint.tensors[name] for alias, name in checkpoint.aliases.items()}
