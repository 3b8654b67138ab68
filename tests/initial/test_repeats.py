"""Sequences that repeat."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from compressor.initial.repeats import Repeat, repeats_of


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=30), st.integers(1, 5), st.integers(0, 2))
def test_what_repeats_is_what_was_there(block, times, by):
    items = [(key, number + time * by) for time in range(times) for key, number in block] + block
    keys, numbers = [key for key, _ in items], [(number,) for _, number in items]
    again = []
    for found in repeats_of(keys, numbers):
        own = items[found.place : found.place + found.length]
        strides = [stride for (stride,) in found.strides] or [0] * found.length
        again += [
            (key, number + time * stride)
            for time in range(found.times)
            for (key, number), stride in zip(own, strides, strict=True)
        ]
    assert again == items


def test_blocks_that_advance_are_one():
    keys = ["start", *(["weight", "bias"] * 5), "end"]
    numbers = [(0,), *((1 + 2 * block + own, 7) for block in range(5) for own in range(2)), ()]
    assert list(repeats_of(keys, numbers)) == [
        Repeat(0, 1, 1, ()),
        Repeat(1, 2, 5, ((2, 0), (2, 0))),
        Repeat(11, 1, 1, ()),
    ]
