"""Uniform quantizations beside a compressed model: which is better, by the best measure of the model."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from compressor.evaluation import Losses, UniformQuantization, better_uniform

INT8 = UniformQuantization(8, "GPTQ", parameters=500, bytes=1000, holdout_loss=0.001, loss=2.01, value=0.9)
INT4 = UniformQuantization(4, "GPTQ", parameters=250, bytes=500, holdout_loss=0.02, loss=2.05, value=0.8)
NONE = Losses(on_data=None, data="", on_holdout=None, unit="", error=None, dense_loss=None)
HOLDOUT = replace(NONE, on_holdout=0.03, unit="nats per prediction")


def test_the_smallest_that_loses_no_more() -> None:
    found = better_uniform([INT8, INT4], HOLDOUT, size=1200)
    assert found is not None
    assert found.uniform == INT4
    assert str(found) == (
        "int4 of all its layers (GPTQ) is smaller, 500 bytes, and loses no more: 0.02 on the holdout beside 0.03 nats"
        " per prediction"
    )
    found = better_uniform([INT8, INT4], replace(HOLDOUT, on_holdout=0.01), size=1200)
    assert found is not None
    assert found.uniform == INT8
    assert better_uniform([INT8, INT4], replace(HOLDOUT, on_holdout=0.01), size=1000) is None
    assert better_uniform([], HOLDOUT, size=1200) is None


def test_data_that_did_not_decide_are_compared_first() -> None:
    on_data = replace(HOLDOUT, on_data=0.04, data="test", dense_loss=2.0)
    found = better_uniform([INT4, INT8], on_data, size=1200)
    assert found is not None
    assert found.uniform == INT8  # int4 loses .05 there
    assert found.to_dict() == {
        "bits": 8,
        "method": "GPTQ",
        "bytes": 1000,
        "loss": 2.01 - 2.0,
        "loss_of_this": 0.04,
        "unit": "nats per prediction",
        "on": "test",
        "words": str(found),
    }


def test_what_was_not_measured_on_the_data_is_not_compared_on_the_holdout_instead() -> None:
    rounded = replace(INT4, method="round to nearest", loss=None, value=None)
    on_data = replace(HOLDOUT, on_data=0.03, data="test", dense_loss=2.0)
    assert better_uniform([rounded], HOLDOUT, size=1200) is not None
    assert better_uniform([rounded, INT4], on_data, size=1200) is None  # GPTQ loses .05 there
    found = better_uniform([rounded, replace(INT4, loss=2.029)], on_data, size=1200)
    assert found is not None
    assert found.uniform.method == "GPTQ"


def test_without_data_it_is_the_error() -> None:
    rounded = replace(INT8, method="round to nearest", error=0.01, holdout_loss=None, loss=None, value=None)
    found = better_uniform([rounded], replace(NONE, error=0.2), size=1200)
    assert found is not None
    assert "0.01 beside 0.2 relative error" in str(found)
    assert better_uniform([rounded], replace(NONE, error=0.005), size=1200) is None
    assert better_uniform([rounded], HOLDOUT, size=1200) is None  # the two have no measure in common


@given(st.tuples(st.floats(), st.floats()), st.tuples(st.integers(0, 10), st.integers(0, 10)))
def test_what_is_named_is_smaller_and_loses_no_more(losses: tuple[float, float], sizes: tuple[int, int]) -> None:
    (own, other), (size, of_other) = losses, sizes
    uniform = replace(INT8, bytes=of_other, holdout_loss=other, loss=None)
    found = better_uniform([uniform], replace(HOLDOUT, on_holdout=own), size=size)
    assert (found is not None) == (of_other < size and other <= own)


def test_as_json() -> None:
    document = replace(INT8, holdout_loss=math.inf).to_dict()
    assert document["holdout_loss"] == "infinity"
    assert document["bits"] == 8
    assert document["error"] is None
    assert INT8.name == "int8"
