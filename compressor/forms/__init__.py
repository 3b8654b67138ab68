"""The forms in which a low-rank layer can be stored, a module each; `FORMS` is where they are registered."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from compressor.forms.channel import CHANNEL, LowRankConvolution, LowRankTransposedConvolution
from compressor.forms.layers import MARKERS
from compressor.forms.pair_form import (
    TRANSPOSED,
    Count,
    DenseWeight,
    MatrixPair,
    PairForm,
    StoredPairShape,
    StoredWeight,
)
from compressor.forms.pivoted import PIVOTED, PivotedLinear
from compressor.forms.plain import PLAIN, LowRankEmbedding, LowRankLinear
from compressor.forms.spatial import SPATIAL, SpatialConvolution
from compressor.network import Kind

# Of two that are as small as each other the planner takes the first.
FORMS: dict[str, PairForm] = {form.name: form for form in (PLAIN, PIVOTED, CHANNEL, SPATIAL)}

# What a plan says of a layer that stays as it is.
DENSE = "dense"


def pair_forms(weight: DenseWeight) -> tuple[PairForm, ...]:
    """The forms of the pairs that a layer can become."""
    return tuple(form for form in FORMS.values() if form.takes(weight))


def layer_builder(form: str) -> Callable[[nn.Module, int], nn.Module]:
    """What builds the unfilled layer of a form in place of a dense one, from this one and a rank."""
    if form not in FORMS:
        raise ValueError(f"there is no low-rank form {form!r}")
    return FORMS[form].layer


def has_own_errors(form: str) -> bool:
    """Whether a layer's errors in a form differ from those of the truncated SVD of its own matrix."""
    return form != DENSE and FORMS[form].has_own_errors


def factorized_shape(weight: DenseWeight, form: str) -> tuple[int, int]:
    """The sides of the matrix that a pair of this form factorizes; of a dense layer its own."""
    return weight.shape if form == DENSE else FORMS[form].sides(weight)


def stored_parameters(sides: tuple[int, int], form: str, rank: Count) -> Count:
    """Numbers in the file for a layer in a form, from the sides that `factorized_shape` gives."""
    return sides[0] * sides[1] + 0 * rank if form == DENSE else FORMS[form].parameters(sides, rank)


def stored_bytes(sides: tuple[int, int], form: str, rank: Count, *, itemsize: int) -> Count:
    """Bytes of the tensors counted by `stored_parameters`, with `itemsize` bytes a number of the dense weight."""
    if form == DENSE:
        return stored_parameters(sides, form, rank) * itemsize
    return FORMS[form].nbytes(sides, rank, itemsize)


def recognized(kind: Kind, shapes: Mapping[str, tuple[int, ...]]) -> PairForm | None:
    """The form of the tensors below a layer, given by name; None where they are no pair."""
    known = {name for form in FORMS.values() for name in form.names}
    present = known & shapes.keys()
    alike = (form for form in FORMS.values() if present == set(form.names))
    return next((form for form in alike if form.recognizes(kind, shapes)), None)


__all__ = [
    "CHANNEL",
    "DENSE",
    "FORMS",
    "MARKERS",
    "PIVOTED",
    "PLAIN",
    "SPATIAL",
    "TRANSPOSED",
    "Count",
    "DenseWeight",
    "LowRankConvolution",
    "LowRankEmbedding",
    "LowRankLinear",
    "LowRankTransposedConvolution",
    "MatrixPair",
    "PairForm",
    "PivotedLinear",
    "SpatialConvolution",
    "StoredPairShape",
    "StoredWeight",
    "factorized_shape",
    "has_own_errors",
    "layer_builder",
    "pair_forms",
    "recognized",
    "stored_bytes",
    "stored_parameters",
]
