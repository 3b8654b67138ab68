"""Measured layers with quantized forms whose errors are made up, as rounding and truncation would have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from compressor.forms import FORMS, pair_name, quantization_of
from compressor.measure import truncation_errors
from compressor.planning import MeasuredLayer, quantized_forms
from tests.planning.test_plan import measured


def rounding(bits: int) -> float:
    """About the relative error of rounding to so many bits."""
    return 2.0**-bits


def quantized(
    name: str = "layer",
    sides: tuple[int, int] = (64, 96),
    *,
    widths: Sequence[int] = (),
    decay: float = 0.95,
    corrections: bool = True,
) -> MeasuredLayer:
    """A layer whose errors are those of truncation and of rounding, squared and added."""
    m = measured(name, *sides, decay=decay)
    truncated = truncation_errors(m.singular_values)
    errors = {}
    for form in quantized_forms(m.layer, widths):
        quantization = quantization_of(form)
        assert quantization is not None
        noise = rounding(quantization.bits)
        if pair_name(form) == "dense":
            ranks = 1 + (min(sides) if corrections and quantization.bits <= 4 else 0)
            errors[form] = noise * np.linspace(1, 0.1, ranks) if ranks > 1 else np.array([noise])
        else:
            errors[form] = np.hypot(truncated, noise * np.sqrt(1 - np.minimum(1, truncated**2)))
    return replace(m, quantized=tuple(errors), own_errors=errors)


def nbytes(m: MeasuredLayer, form: str, rank: int) -> int:
    """What a layer takes in a form."""
    return m.layer.parameters * m.itemsize if form == "dense" else int(FORMS[form].nbytes(m.layer, rank, m.itemsize))
