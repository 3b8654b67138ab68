"""In which quantized forms a layer may be stored, by the widths that are allowed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from compressor.forms import DENSE, FORMS, pair_forms, quantized_name
from compressor.network import Layer
from compressor.planning.settings import PLANNING, PlanningSettings
from compressor.quantize import Quantization, quantizations


def quantized_forms(
    layer: Layer, widths: Sequence[int], *, initial: bool = False, settings: PlanningSettings = PLANNING
) -> tuple[str, ...]:
    """The names of the quantized forms of a layer: the matrix itself and its pairs, in each width.

    Args:
        layer: The layer.
        widths: The bits that are allowed; 16 is none, and without any those of the settings are.
        initial: Whether its initial weights are known, so that what training wrote may be quantized too.
        settings: Which widths are tried.
    """
    below = [bits for bits in widths or settings.widths if bits < 16]
    names = [*_dense(layer, below, settings), *_pairs(layer, below, settings)]
    of_written = [f"{INITIAL}{name}" for name in names] if initial else []
    return tuple(name for name in (*names, *of_written) if name in FORMS and FORMS[name].takes(layer))


# How the names of the forms of what training wrote begin.
INITIAL = "initial+"


def _dense(layer: Layer, widths: Sequence[int], settings: PlanningSettings) -> Iterator[str]:
    """The layer's matrix in each width, at the groups of inputs that may pay in it; an embedding has none."""
    if layer.kind == "embedding":
        yield from (quantized_name(DENSE, Quantization(bits)) for bits in widths if bits in settings.embedding_widths)
        return
    for bits in widths:
        yield from (quantized_name(DENSE, each) for each in quantizations(layer.shape, bits))


def _pairs(layer: Layer, widths: Sequence[int], settings: PlanningSettings) -> Iterator[str]:
    """Each pair in each width that factors bear, at the groups of inputs that take the fewest bytes."""
    for form in pair_forms(layer):
        if form.name in settings.excluded_forms:
            continue
        for bits in widths:
            if bits in settings.pair_widths:
                yield quantized_name(form.name, quantizations(form.sides(layer), bits)[0])
