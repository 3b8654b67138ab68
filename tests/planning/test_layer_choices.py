"""The choices of one layer: what each costs and loses, and how the loss of truncation is penalized."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from compressor.forms import DENSE
from compressor.planning.layer_choices import layer_choices
from tests.planning.test_plan import measured

LAYER = replace(measured("layer", 12, 20), weighted_values=np.geomspace(1.0, 1e-3, 12))


@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_a_penalty_multiplies_the_loss_of_every_pair_and_of_nothing_else(exponent: float) -> None:
    free, penalized = (
        layer_choices(replace(LAYER, truncation_penalty=penalty), "auto", "bytes", exponent=exponent)
        for penalty in (1.0, 4.0)
    )
    assert penalized.forms == free.forms
    assert DENSE in free.forms
    np.testing.assert_array_equal(penalized.choices.cost, free.choices.cost)
    np.testing.assert_array_equal(penalized.errors, free.errors)
    np.testing.assert_allclose(penalized.choices.loss, 4 * free.choices.loss)
    assert free.choices.loss.max() > 0


def test_an_infinite_penalty_leaves_no_pair() -> None:
    found = layer_choices(replace(LAYER, truncation_penalty=math.inf), "auto", "parameters")
    assert found.forms == [DENSE]
    assert found.choices.loss.tolist() == [0.0]
