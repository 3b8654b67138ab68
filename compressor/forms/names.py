"""Names of quantized forms: that of a form, then `@` and the name of a quantization, as in `plain@4g128`."""

from __future__ import annotations

from functools import cache

from compressor.quantize import Quantization


def quantized_name(form: str, quantization: Quantization | None) -> str:
    """The name of a form whose numbers are quantized; its own where they are not."""
    return form if quantization is None else f"{form}@{quantization.name}"


def pair_name(form: str) -> str:
    """The name of the form without its quantization: `plain` of `plain@4g128`, `dense` of `dense@8`."""
    return form.partition("@")[0]


@cache
def quantization_of(form: str) -> Quantization | None:
    """How the numbers of a form are quantized; None of one whose are not.

    Raises:
        ValueError: what stands behind the `@` names no quantization.
    """
    _, quantized, name = form.partition("@")
    return Quantization.of(name) if quantized else None
