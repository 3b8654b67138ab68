"""Bits are choices like ranks: the least loss for the bytes, whatever they are spent on."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import BadInput
from compressor.measure import truncation_errors
from compressor.planning import Budget, LayerPlan, MeasuredLayer, Plan, apply_edits, choose_ranks, read_plan, size_curve
from compressor.planning.allocation import undominated
from compressor.planning.layer_choices import layer_choices
from compressor.planning.size import plan_by_file_size, plan_by_size
from tests.planning.quantized_layers import nbytes, quantized, rounding

SIDES = st.sampled_from([(1, 40), (40, 1), (9, 32), (20, 26)])


def no_files(_: object) -> int:
    raise AssertionError("the size of files was asked for")


def chosen(layers: list[MeasuredLayer], budget: Budget, **options: Any) -> tuple[LayerPlan, ...]:
    return choose_ranks(layers, budget, "auto", file_bytes=no_files, **options)


def test_one_width_is_that_of_every_layer_without_a_pair() -> None:
    layers = [quantized("a", widths=(4,)), quantized("b", (128, 256), widths=(4,))]
    plans = chosen(layers, Budget("bits", 4))
    assert [plan.form for plan in plans] == ["dense@4", "dense@4g128"]
    assert [(plan.rank, plan.bits, plan.error) for plan in plans] == [(0, 4, rounding(4))] * 2


def test_a_layer_without_a_form_of_the_width_stays_as_it_is() -> None:
    layers = [quantized("a", widths=(4,)), replace(quantized("b", widths=(4,)), stays_dense="nothing reaches it")]
    plans = chosen(layers, Budget("bits", 3))
    assert [(plan.form, plan.rank, plan.bits) for plan in plans] == [("dense", None, 16)] * 2
    assert [plan.reason for plan in plans] == ["a layer of 96 inputs has no form in 3 bits", "nothing reaches it"]


@settings(max_examples=25)
@given(
    sides=st.lists(SIDES, min_size=1, max_size=3),
    keep=st.floats(0.1, 1.0),
    decay=st.floats(0.5, 1.0),
    calibrated=st.booleans(),
)
def test_bits_and_ranks_lose_no_more_than_either_alone(
    sides: list[tuple[int, int]], *, keep: float, decay: float, calibrated: bool
) -> None:
    layers = [quantized(str(i), each, decay=decay) for i, each in enumerate(sides)]
    if calibrated:  # losses add up, so that fewer choices cannot lose less
        layers = [replace(m, weighted_values=m.singular_values) for m in layers]
    alone = [
        [replace(m, quantized=()) for m in layers],
        [replace(m, truncation_penalty=np.inf) for m in layers],
    ]
    budget = int(keep * sum(m.layer.parameters for m in layers))
    both, ranks, bits = (
        plan_by_size(each, budget, "auto", unit="parameters", exponent=0.0) for each in (layers, *alone)
    )
    for other in (ranks, bits):
        assert other is None or both is not None
    if both is None:
        return
    assert sum(plan.parameters for plan in both) <= budget
    if len(layers) == 1:
        for other in (ranks, bits):
            assert other is None or both[0].error <= other[0].error


@settings(max_examples=25)
@given(st.lists(SIDES, min_size=1, max_size=3), st.integers(100, 9_000), st.integers(0, 2000))
def test_a_size_counts_bytes_whatever_they_are(sides: list[tuple[int, int]], limit: int, header: int) -> None:
    layers = [quantized(str(i), each) for i, each in enumerate(sides)]

    def file_bytes(plans: tuple[LayerPlan, ...]) -> int:
        return header + sum(nbytes(m, plan.form, plan.rank or 0) for m, plan in zip(layers, plans, strict=True))

    plans = plan_by_file_size(layers, limit, "auto", file_bytes=file_bytes)
    smallest = header + sum(int(layer_choices(m, "auto", "bytes").choices.cost.min()) for m in layers)
    assert (plans is None) == (smallest > limit)
    assert plans is None or file_bytes(plans) <= limit


@pytest.mark.parametrize(("tolerance", "bits"), [(0.3, 2), (0.07, 4), (0.02, 6), (0.005, 8)])
def test_a_tolerance_takes_the_fewest_bytes_that_keep_it(tolerance: float, bits: int) -> None:
    m = quantized(decay=1.0)  # of full rank, so that no pair is any good
    (plan,) = chosen([m], Budget("tolerance", tolerance))
    assert (plan.bits, plan.rank) == (bits, 0)
    assert plan.error <= tolerance
    low = quantized(decay=0.3)
    (plan,) = chosen([low], Budget("tolerance", tolerance))
    assert plan.truncated_to is not None
    assert plan.error <= tolerance
    fewest = nbytes(low, plan.form, plan.rank or 0)
    every = layer_choices(low, "auto", "bytes")
    assert fewest <= every.choices.cost[every.errors <= tolerance].min()


def test_without_an_error_a_form_is_no_choice() -> None:
    m = replace(quantized(), own_errors={})
    assert {form.partition("@")[1] for form in layer_choices(m, "auto", "bytes").forms} == {""}


def test_a_form_that_is_asked_for_is_that_of_quantized_pairs_too() -> None:
    forms = {form.partition("@")[0] for form in layer_choices(quantized(decay=0.6), "plain", "bytes").forms}
    assert forms == {"plain", "dense"}


@given(st.integers(2, 4), st.integers(1, 60), st.integers(0, 10**6))
def test_what_nothing_is_better_than_is_left(rows: int, count: int, seed: int) -> None:
    rated = np.random.default_rng(seed).integers(0, 6, (rows, count)).astype(np.float64)
    kept = rated[:, undominated(rated)]
    expected = {
        tuple(own) for own in rated.T if not any((other <= own).all() and (other < own).any() for other in rated.T)
    }
    assert sorted(map(tuple, kept.T)) == sorted(expected)
    assert (np.diff(kept[0]) >= 0).all()


def test_wide_factors_have_ranks_that_kernels_take() -> None:
    m = quantized("a", (512, 1024), widths=(8, 4), decay=0.99)
    ranks = {}
    for form in ("plain@4g128", "plain@8"):
        alone = layer_choices(replace(m, own_errors={form: truncation_errors(m.singular_values)}), "auto", "bytes")
        ranks[form] = [rank for each, rank in zip(alone.forms, alone.ranks.tolist(), strict=True) if each == form]
    assert ranks["plain@8"][:130] == [*range(1, 129), 144, 160]
    # Of 160 and 224 inputs the groups would be 80 and 112.
    assert ranks["plain@4g128"][:131] == [*range(1, 129), 192, 256, 320]


def test_many_choices_are_pruned_to_those_that_pay() -> None:
    m = quantized(sides=(256, 256))
    found = layer_choices(m, "auto", "bytes")
    best = sorted(zip(found.choices.cost, found.choices.loss, strict=True))
    assert all(loss < before for (_, before), (_, loss) in itertools.pairwise(best))
    assert "dense" in found.forms


def test_a_plan_states_bits_apart_from_the_form_and_is_read_back(tmp_path: Path) -> None:
    layers = [quantized("a", (64, 256), widths=(4,), decay=1.0), quantized("b", decay=0.5, widths=(6,))]
    plans = chosen(layers, Budget("tolerance", 0.08))
    plan = Plan("model", None, Budget("tolerance", 0.08), plans)
    entries = plan.to_dict()["layers"]
    assert [(e["form"], e["rank"], e["bits"], e["group_size"], e["zero_points"]) for e in entries] == [
        ("dense", 0, 4, 128, False),
        ("plain", plans[1].rank, 6, None, False),
    ]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.to_dict()))
    read = apply_edits(read_plan(path), layers, "the plan")
    assert [(each.form, each.rank, each.error) for each in read] == [(p.form, p.rank, p.error) for p in plans]


def edited(tmp_path: Path, **entry: object) -> tuple[LayerPlan, ...]:
    path = tmp_path / "plan.json"
    document = {"schema_version": 1, "layers": [{"name": "layer", **entry}]}
    path.write_text(json.dumps(document))
    m = quantized()
    return apply_edits(read_plan(path), [replace(m, own_errors=_all_errors(m))], "the plan")


def _all_errors(m: MeasuredLayer) -> dict[str, Any]:
    return {**m.own_errors, "dense@8g32": np.full(1, 0.5), "plain@3": np.ones(65)}


def test_bits_are_edited_like_ranks(tmp_path: Path) -> None:
    (plan,) = edited(tmp_path, rank=0, form="dense", bits=8, group_size=32)
    assert (plan.form, plan.rank, plan.error) == ("dense@8g32", 0, 0.5)
    (plan,) = edited(tmp_path, rank=7, form="plain", bits=3, group_size=None, zero_points=False)
    assert (plan.form, plan.rank, plan.bits) == ("plain@3", 7, 3)
    (plan,) = edited(tmp_path, rank=7, form="plain", bits=16)
    assert (plan.form, plan.quantization) == ("plain", None)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"rank": None, "form": "dense", "bits": 4}, "rank null of layer contradict"),
        ({"rank": 0, "form": "dense", "bits": 9}, "no quantization has 9 bits"),
        ({"rank": 0, "form": "dense", "bits": "4"}, "no quantization has '4' bits"),
        ({"rank": 0, "form": "dense", "bits": 4, "zero_points": 1}, "zero points 1"),
        ({"rank": 0, "form": "dense", "bits": 4, "group_size": 7}, "does not exist for layer"),
        ({"rank": 0, "form": "plain", "bits": 4}, "not a positive whole number"),
        ({"rank": 0, "form": "channel", "bits": 4}, "positive whole number"),
        ({"rank": 3, "form": "channel", "bits": 4}, "does not exist for layer"),
        ({"rank": 65, "form": "dense", "bits": 4}, "does not exist: its matrix is 64 x 96"),
        ({"rank": 0, "form": "dense"}, "not a positive whole number"),
    ],
)
def test_bits_that_cannot_be_are_refused(tmp_path: Path, entry: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        edited(tmp_path, **entry)


def test_what_cannot_be_reached_names_the_least_that_can() -> None:
    layers = [quantized(decay=0.9)]
    with pytest.raises(BadInput, match="low rank and quantization reach here") as refused:
        chosen(layers, Budget("keep", 0.001))
    least = float(str(refused.value).rpartition("at least ")[2])
    assert chosen(layers, Budget("keep", least))


def test_the_curve_of_sizes_goes_along_bits_and_ranks() -> None:
    curve, of_ranks = (size_curve([each], "auto") for each in (quantized(), replace(quantized(), quantized=())))
    assert list(curve.parameters) == sorted(curve.parameters)
    half = 64 * 96 / 2
    losses = [np.interp(half, each.parameters, each.losses) for each in (curve, of_ranks)]
    assert losses[0] < losses[1]
