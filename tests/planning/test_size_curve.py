"""The curve of loss over size: what the allocation itself would lose at every one of its sizes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compressor import compress
from compressor.network import Layer
from compressor.planning import MeasuredLayer, plan_loss, predicted_loss, size_curve, smallest_size
from compressor.planning.size import plan_by_size


def measured(index: int, d_out: int, d_in: int, *, calibrated: bool, **known: Any) -> MeasuredLayer:
    draw = np.random.default_rng((index, d_out, d_in))
    layer = Layer(str(index), str(index), f"{index}.weight", None, "linear", (d_out, d_in), (d_out, d_in))
    spectra = [np.sort(draw.lognormal(0, 2, min(d_out, d_in)))[::-1] for _ in range(2)]
    weighted = {"weighted_values": 1e-2 * spectra[1], "uses": float(draw.integers(1, 5))} if calibrated else {}
    return MeasuredLayer(layer, spectra[0], itemsize=4, **weighted, **known)


SIZES = st.lists(st.tuples(st.integers(2, 24), st.integers(2, 24)), min_size=1, max_size=4)


@settings(max_examples=25)
@given(
    shapes=SIZES,
    calibrated=st.booleans(),
    exponent=st.sampled_from([0.0, 0.5, 1.0]),
    form=st.sampled_from(["auto", "plain"]),
)
def test_every_point_is_what_the_allocation_loses_at_that_size(
    shapes: list[tuple[int, int]], calibrated: bool, exponent: float, *, form: Any
) -> None:
    layers = [measured(i, *shape, calibrated=calibrated) for i, shape in enumerate(shapes)]
    curve = size_curve(layers, form, exponent=exponent)
    assert curve.losses[-1] == 0
    assert curve.parameters[-1] == sum(m.layer.parameters for m in layers)
    assert list(curve.parameters) == sorted(set(curve.parameters))
    assert curve.parameters[0] == smallest_size(layers, form, "parameters")
    assert curve.unit == ("nats per prediction" if calibrated else "relative error")
    for size, loss in zip(curve.parameters, curve.losses, strict=True):
        plans = plan_by_size(layers, size, form, unit="parameters", exponent=exponent)
        assert plans is not None
        assert sum(plan.parameters for plan in plans) <= size
        predicted = predicted_loss(layers, plans) if calibrated else None
        assert plan_loss(curve, plans, predicted) == pytest.approx(loss, rel=1e-6, abs=1e-12)
    for size, stored in zip(curve.parameters, curve.layers, strict=True):
        numbers = (int(m.numbers(each.form, each.rank)) for m, each in zip(layers, stored, strict=True))
        assert sum(numbers) == size if calibrated else sum(numbers) <= size
    for of_layer in zip(*curve.layers, strict=True):  # one object for all sizes at which a layer is the same
        assert len(set(map(id, of_layer))) == len(set(of_layer))


@settings(max_examples=30)
@given(SIZES)
def test_a_larger_size_never_loses_more_where_the_loss_itself_is_allocated(shapes: list[tuple[int, int]]) -> None:
    layers = [measured(i, *shape, calibrated=True) for i, shape in enumerate(shapes)]
    losses = size_curve(layers, "auto", exponent=0.0).losses
    assert all(before >= after for before, after in pairwise(losses))


def test_layers_that_stay_dense_leave_one_point() -> None:
    layers = [measured(0, 8, 8, calibrated=True, stays_dense="it was asked for")]
    curve = size_curve(layers, "auto")
    assert (curve.parameters, curve.losses) == ((64,), (0.0,))


def test_a_curve_is_computed_where_it_is_shown_and_not_before() -> None:
    compression = compress(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)), keep=0.7, prefer="size")
    assert compression.metrics()
    assert "curve" not in vars(compression)
    assert compression.to_dict()["curve"]["parameters"] == list(
        compression.curve.parameters if compression.curve else ()
    )
    assert vars(compression)["curve"] is compression.curve


def test_there_are_no_more_points_than_a_figure_can_show() -> None:
    for calibrated, least in ((True, 50), (False, 20)):
        curve = size_curve([measured(i, 300, 200, calibrated=calibrated) for i in range(8)], "auto")
        assert least < len(curve.parameters) <= 120
    assert curve.to_dict()["parameters"] == list(curve.parameters)
