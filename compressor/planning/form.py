"""The forms in which a layer can be stored, and what each costs in numbers."""

from __future__ import annotations

from typing import Literal

Form = Literal["dense", "plain", "pivoted", "channel"]


def stored_parameters(shape: tuple[int, int], form: Form, rank: int) -> int:
    """Numbers in the file for a `d_out x d_in` layer in a form; the index of a pivoted pair counts as `d_out` of them.

    A plain pair and the channel pair of a convolution store `r (d_out + d_in)` numbers, a pivoted pair
    `r (d_out + d_in - r)` and its order. The pair of an embedding is a plain one, whether a head is tied to it or not.
    """
    d_out, d_in = shape
    if form == "dense":
        return d_out * d_in
    if form == "pivoted":
        return rank * (d_out + d_in - rank) + d_out
    return rank * (d_out + d_in)


def stored_bytes(shape: tuple[int, int], form: Form, rank: int, itemsize: int) -> int:
    """Bytes of the tensors counted by `stored_parameters`, with `itemsize` bytes a number and int32 for the order."""
    order = shape[0] if form == "pivoted" else 0
    return (stored_parameters(shape, form, rank) - order) * itemsize + order * 4
