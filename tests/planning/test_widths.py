"""Which quantized forms a layer may take: those of the widths that are allowed, and that its kind bears."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.errors import BadInput
from compressor.forms import FORMS, pair_name, quantization_of
from compressor.network import Layer
from compressor.planning import PlanningSettings, quantized_forms

widths = st.lists(st.sampled_from([16, 8, 7, 6, 5, 4, 3, 2]), max_size=4)


def layer(kind: str = "linear", *shape: int) -> Layer:
    tensor = shape or (96, 64)
    matrix = (tensor[0], tensor[1] if len(tensor) == 2 else tensor[1] * tensor[2] * tensor[3])
    if kind == "embedding":
        matrix = (tensor[1], tensor[0])
    return Layer("layer", "layer", "layer.weight", None, kind, tensor, matrix)  # type: ignore[arg-type]


def bits(form: str) -> int:
    quantization = quantization_of(form)
    assert quantization is not None
    return quantization.bits


@given(widths, st.booleans())
def test_every_form_exists_and_has_one_of_the_widths(allowed: list[int], initial: bool) -> None:
    forms = quantized_forms(layer(), allowed, initial=initial)
    assert {bits(form) for form in forms} == ({*allowed} - {16} or (set() if allowed else {8, 7, 6, 5, 4, 3, 2}))
    assert all(FORMS[form].name == form and FORMS[form].takes(layer()) for form in forms)
    assert any(FORMS[form].from_initial for form in forms) == (initial and bool(forms))


def test_factors_have_four_bits_at_least() -> None:
    pairs = {bits(form) for form in quantized_forms(layer(), ()) if pair_name(form) != "dense"}
    assert pairs == {8, 6, 5, 4}


@pytest.mark.parametrize(
    ("kind", "shape", "widths"),
    [("embedding", (300, 64), {8, 4}), ("convolution", (16, 32, 3, 3), {8, 7, 6, 5, 4, 3, 2})],
)
def test_rows_of_an_embedding_bear_fewer_widths(kind: str, shape: tuple[int, ...], widths: set[int]) -> None:
    found = [form for form in quantized_forms(layer(kind, *shape), ()) if pair_name(form) == "dense"]
    assert {*map(bits, found)} == widths


def test_settings_say_which_widths_are_tried() -> None:
    few = PlanningSettings(widths=(8, 3), pair_widths=(8,))
    assert {bits(form) for form in quantized_forms(layer(), (), settings=few)} == {8, 3}
    assert "plain@5g128" not in quantized_forms(layer(), (5,), settings=few)
    with pytest.raises(BadInput, match="pair_widths"):
        PlanningSettings(pair_widths=(16,))
