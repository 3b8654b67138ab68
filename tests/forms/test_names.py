"""Names of quantized forms say which form is quantized, and how."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.forms import FORMS, pair_name, quantization_of, quantized_name
from compressor.quantize import Quantization

quantizations = st.builds(Quantization, st.integers(2, 8), st.none() | st.integers(1, 512), st.booleans())


@given(st.sampled_from(["dense", *FORMS]), st.none() | quantizations)
def test_a_name_is_read_as_it_was_made(form: str, quantization: Quantization | None) -> None:
    name = quantized_name(form, quantization)
    assert (pair_name(name), quantization_of(name)) == (form, quantization)


def test_a_name_that_names_no_quantization_is_refused() -> None:
    with pytest.raises(ValueError, match="no quantization"):
        quantization_of("plain@")
