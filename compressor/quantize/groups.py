"""How many inputs share a scale where a group size does not divide them all.

It imports nothing: its source is copied into exported folders.
"""

from __future__ import annotations


def fitted_group(size: int | None, inputs: int, *, smallest: int, largest: int) -> int | None:
    """The group size nearest to `size`, from the smallest to the largest, that divides the inputs; None for rows."""
    if size is None or (size < inputs and inputs % size == 0):
        return size
    divisors = [each for each in range(smallest, min(largest, inputs - 1) + 1) if inputs % each == 0]
    if size >= inputs or not divisors:
        return None
    return min(divisors, key=lambda each: max(each, size) / min(each, size))
