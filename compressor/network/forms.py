"""The forms in which a layer can be stored, and how many numbers each takes."""

from __future__ import annotations

from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

from compressor.network.layers import Layer

Form = Literal["dense", "plain", "pivoted", "channel", "spatial"]


# A rank, or an array of ranks.
Count = TypeVar("Count", int, npt.NDArray[np.int64])


def pair_forms(layer: Layer) -> tuple[Form, ...]:
    """The forms of pairs for a layer; a spatial pair needs a kernel that is wider than one in both directions."""
    if layer.kind == "embedding":
        return ("plain",)
    if len(layer.tensor_shape) == 2:
        return ("plain", "pivoted")
    two_wide_sides = len(layer.tensor_shape) == 4 and min(layer.tensor_shape[2:]) > 1
    return ("channel", "spatial") if two_wide_sides and layer.kind == "convolution" else ("channel",)


def factorized_shape(layer: Layer, form: Form) -> tuple[int, int]:
    """The shape of the matrix that a pair of this form factorizes.

    It is the layer's own `d_out x d_in`; for a spatial pair it is the `(d_out k_w) x (c k_h)` arrangement of the
    kernel.
    """
    if form != "spatial":
        return layer.shape
    d_out, c, k_h, k_w = layer.tensor_shape
    return (d_out * k_w, c * k_h)


def stored_parameters(shape: tuple[int, int], form: Form, rank: Count) -> Count:
    """Numbers that a `d_out x d_in` layer stores in a form; the order of a pivoted pair counts as `d_out` numbers.

    A plain pair and the pairs of a convolution store `r (d_out + d_in)` numbers, a pivoted pair `r (d_out + d_in - r)`
    and its order; `shape` is the `factorized_shape`. The pair of an embedding is a plain one, with or without a tied
    head.
    """
    d_out, d_in = shape
    if form == "dense":
        return d_out * d_in + 0 * rank
    if form == "pivoted":
        return rank * (d_out + d_in - rank) + d_out
    return rank * (d_out + d_in)


def stored_bytes(shape: tuple[int, int], form: Form, rank: Count, *, itemsize: int) -> Count:
    """Bytes of the numbers that `stored_parameters` counts: `itemsize` each, and int32 for the order."""
    order = shape[0] if form == "pivoted" else 0
    return (stored_parameters(shape, form, rank) - order) * itemsize + order * 4
