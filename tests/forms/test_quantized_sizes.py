"""What quantized forms count: bytes at one rank or many, and numbers."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from torch import nn

from compressor.evaluation.cost import count_parameters
from compressor.forms import FORMS, StoredWeight


@pytest.mark.parametrize("name", ["plain@4g128", "pivoted@8", "plain@5", "initial+plain@4g128", "dense@4g128"])
def test_sizes_at_many_ranks_are_those_at_each(name: str) -> None:
    form, weight = FORMS[name], StoredWeight("linear", (48, 256))
    ranks = np.arange(form.least_rank, 49)
    for count in (form.parameters, partial(form.nbytes, itemsize=2)):
        np.testing.assert_array_equal(count(weight, ranks), [count(weight, int(rank)) for rank in ranks])


@pytest.mark.parametrize(
    ("name", "rank", "numbers"),
    [("plain@4g128", 3, 3 * 304), ("dense@3g128", 0, 48 * 256), ("dense@3g128", 2, 48 * 256 + 2 * 304)],
)
def test_a_quantized_number_counts_as_one(name: str, rank: int, numbers: int) -> None:
    weight = StoredWeight("linear", (48, 256))
    assert FORMS[name].numbers(weight, rank) == numbers
    dense = nn.Sequential(nn.Linear(256, 48))
    dense[0] = FORMS[name].layer(dense[0], rank)
    assert count_parameters(dense) == numbers + 48
