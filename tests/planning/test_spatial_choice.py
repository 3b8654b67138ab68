"""Channel or spatial: every budget takes the form that loses less for what it stores, and only where it exists."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compressor import BadInput, compress, plan
from compressor.forms import factorized_shape, pair_forms, stored_parameters
from compressor.measure import truncation_errors
from compressor.network import Layer
from compressor.planning import Budget, LayerPlan, MeasuredLayer, PlanningSettings, choose_ranks
from compressor.planning.size import plan_by_size


def convolution(name: str, sides: tuple[int, int, int, int], channel: float, *, spatial: float) -> MeasuredLayer:
    """A convolution whose two arrangements have singular values that fall by these factors."""
    shape = (sides[0], math.prod(sides[1:]))
    layer = Layer(name, name, f"{name}.weight", None, "convolution", sides, shape)
    values = {
        form: decay ** np.arange(min(factorized_shape(layer, form))) for form, decay in zip(
            [each.name for each in pair_forms(layer)], (channel, spatial), strict=False)
    }  # fmt: skip
    own = {form: each for form, each in values.items() if form != "channel"}
    return MeasuredLayer(layer, values["channel"], itemsize=4, own_values=own)


def no_files(_: object) -> int:
    raise AssertionError("the size of files was asked for")


@st.composite
def models(draw: st.DrawFn) -> list[MeasuredLayer]:
    side, kernel, decay = st.integers(1, 16), st.integers(1, 4), st.floats(0.3, 0.99)
    return [
        convolution(str(i), (draw(side), draw(side), draw(kernel), draw(kernel)), draw(decay), spatial=draw(decay))
        for i in range(draw(st.integers(1, 4)))
    ]


def possible(m: MeasuredLayer) -> list[tuple[int, float]]:
    """Size and error of all that a layer may become: a pair has to save a twentieth."""
    values = {"channel": m.singular_values, **m.own_values}
    choices = [(m.layer.parameters, 0.0)]
    for form, spectrum in values.items():
        errors = truncation_errors(spectrum)
        choices += [(stored_parameters(m.layer, form, rank), float(errors[rank])) for rank in range(1, len(errors))]
    return [choices[0], *((size, error) for size, error in choices[1:] if size <= 0.95 * m.layer.parameters)]


def as_chosen(m: MeasuredLayer, layer: LayerPlan) -> None:
    assert layer.form == "dense" or layer.form in [form.name for form in pair_forms(m.layer)]
    assert (layer.parameters, layer.error) in possible(m)


@settings(max_examples=100)
@given(models(), st.floats(0.01, 0.9))
def test_a_tolerance_holds_in_the_smallest_form(layers: list[MeasuredLayer], tolerance: float) -> None:
    for m, layer in zip(
        layers, choose_ranks(layers, Budget("tolerance", tolerance), "auto", file_bytes=no_files), strict=True
    ):
        as_chosen(m, layer)
        assert layer.parameters == min(size for size, error in possible(m) if error <= tolerance)


@settings(max_examples=100)
@given(models(), st.floats(0.1, 1.0))
def test_a_share_is_never_exceeded_and_no_layer_could_lose_less_within_it(
    layers: list[MeasuredLayer], keep: float
) -> None:
    limit = keep * sum(m.layer.parameters for m in layers)
    if sum(min(size for size, _ in possible(m)) for m in layers) > limit:
        with pytest.raises(BadInput, match="allow at least"):
            choose_ranks(layers, Budget("keep", keep), "auto", file_bytes=no_files)
        return
    chosen = choose_ranks(layers, Budget("keep", keep), "auto", file_bytes=no_files)
    left = limit - sum(layer.parameters for layer in chosen)
    assert left >= 0
    for m, layer in zip(layers, chosen, strict=True):
        as_chosen(m, layer)
        assert not any(error < layer.error for size, error in possible(m) if size <= layer.parameters + left)


@settings(max_examples=100)
@given(models(), st.floats(0.05, 1.0), st.integers(1, 6))
def test_a_cap_on_the_channel_pair_also_limits_the_size_of_a_spatial_one(
    layers: list[MeasuredLayer], keep: float, cap: int
) -> None:
    under_caps = [replace(m, rank_cap=min(cap, *m.layer.shape)) for m in layers]
    chosen = plan_by_size(under_caps, int(keep * sum(m.layer.parameters for m in layers)), "auto", unit="parameters")
    for m, layer in zip(under_caps, chosen or (), strict=chosen is not None):
        assert m.rank_cap is not None
        at_cap = m.rank_cap * sum(m.layer.shape)
        if at_cap <= 0.95 * m.layer.parameters:
            assert layer.parameters <= at_cap
            assert layer.form == "spatial" or (layer.form == "channel" and (layer.rank or 0) <= m.rank_cap)


def test_the_window_rule_takes_a_spatial_pair_where_it_is_smaller_at_its_error() -> None:
    known: dict[str, Any] = {"above_edge": 9, "surviving_share": 0.1}
    by_edge, separable = (
        convolution("a", (16, 16, 3, 3), 0.99, spatial=0.99),
        convolution("b", (16, 16, 3, 3), 0.99, spatial=0.3),
    )
    layers = [
        MeasuredLayer(m.layer, m.singular_values, 4, own_values=m.own_values, **known) for m in (by_edge, separable)
    ]
    first, second = choose_ranks(layers, Budget("window-rule"), "auto", file_bytes=no_files)
    assert (first.form, first.rank) == ("channel", 9)
    assert (second.form, second.rank) == ("spatial", 2)  # 0.3^k <= 0.1 from k = 2
    assert "relative error" in second.reason


@pytest.mark.parametrize("budget", [Budget("window-rule"), Budget("tolerance", 0.1), Budget("keep", 0.3)], ids=str)
def test_spatial_pairs_can_be_switched_off(budget: Budget) -> None:
    separable = replace(convolution("b", (16, 16, 3, 3), 0.7, spatial=0.3), above_edge=4, surviving_share=0.1)
    without = replace(separable, settings=PlanningSettings(excluded_forms=("spatial",)))
    assert [choose_ranks([m], budget, "auto", file_bytes=no_files)[0].form for m in (separable, without)] == [
        "spatial",
        "channel",
    ]


def filter_banks() -> dict[str, torch.Tensor]:
    """A kernel of three products of vertical and horizontal kernels, and one of three filters, with a little noise."""
    torch.manual_seed(0)
    separable = torch.einsum("orj,rci->ocij", torch.randn(16, 3, 3), torch.randn(3, 12, 3))
    few_filters = torch.einsum("or,rcij->ocij", torch.randn(16, 3), torch.randn(3, 12, 3, 3))
    return {
        "spatial": separable + 0.01 * torch.randn(16, 12, 3, 3),
        "channel": few_filters + 0.01 * torch.randn(16, 12, 3, 3),
    }


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("form", ["spatial", "channel"])
def test_each_filter_bank_gets_the_form_in_which_it_has_low_rank(form: str, calibrated: bool) -> None:
    dense = nn.Conv2d(12, 16, 3)
    dense.weight.data = filter_banks()[form]
    model = nn.Sequential(dense, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    batches = [torch.randn(8, 12, 6, 6) for _ in range(4)] if calibrated else None
    [layer] = plan(model, keep=0.3, calibration=batches, prefer="size", bits=16).layers
    assert (layer.form, layer.rank is not None and layer.rank >= 3) == (form, True)
    assert layer.error < 0.02
    if not calibrated:
        [layer] = plan(model, tolerance=0.05, prefer="size").layers
        assert (layer.form, layer.rank) == (form, 3)


def test_the_error_that_is_planned_without_data_is_that_of_what_is_stored() -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(8, 12, (3, 4))
    report = compress(dense, keep=0.4, prefer="size")
    [layer] = report.plan.layers
    [planned] = plan(dense, keep=0.4, prefer="size").layers
    assert layer.form == "spatial"
    assert layer.error == pytest.approx(planned.error, rel=1e-4)
    assert report.spectra[""].shape == (min(12 * 4, 8 * 3),)


@pytest.mark.parametrize(
    ("layer", "rank", "message"),
    [
        (nn.Conv2d(8, 12, 1), 2, "form 'spatial' does not exist for 0, a convolution layer of 12 x 8 x 1 x 1"),
        (nn.Conv2d(8, 12, (1, 3)), 2, "form 'spatial' does not exist"),
        (nn.Conv1d(8, 12, 3), 2, "form 'spatial' does not exist"),
        (nn.Linear(8, 12), 2, "form 'spatial' does not exist for 0, a linear layer of 12 x 8"),
        (nn.Conv2d(8, 12, 3), 25, "rank 25 of 0 does not exist: its matrix is 36 x 24"),
    ],
)
def test_a_plan_with_a_spatial_pair_that_does_not_exist_is_refused(
    layer: nn.Module, rank: int, message: str, *, tmp_path: Path
) -> None:
    model = nn.Sequential(layer)
    document = plan(model, keep=0.9, prefer="size").to_dict()
    document["layers"][0] |= {"rank": rank, "form": "spatial"}
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(BadInput) as caught:
        compress(model, plan=tmp_path / "plan.json")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
