"""The layers of a model as measured in the metric of the loss: what a plan is chosen by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from compressor.calibration.calibration import Calibration
from compressor.calibration.decompositions import decompose_layers, decomposition_of, own_errors
from compressor.calibration.starts import starts_in_metric
from compressor.forms import FORMS, InitialForm, PairForm, from_initial
from compressor.measure import Spectrum, truncation_errors
from compressor.network import Layer
from compressor.planning import (
    MeasuredLayer,
)


def weighted_layers(measured: Sequence[MeasuredLayer], calibration: Calibration) -> list[MeasuredLayer]:
    """The layers with their singular values in the metric of the loss; a layer that no example reached stays dense.

    Of a layer with a start the share is the predicted one where that is used, else the best fit in this metric.
    """
    reached = [m for m in measured if m.layer.name in calibration.metrics]
    decompose_layers(calibration, [(m.layer, None) for m in reached])
    starts = starts_in_metric(calibration, [(m.layer, m.start) for m in reached if m.start is not None])
    reached = [m if m.start is None else replace(m, start=next(starts)) for m in reached]
    decompose_layers(calibration, [(m.layer, m.start.share) for m in reached if m.start is not None])
    found = own_errors(calibration, [asked for m in reached for asked in _asked(m)])
    weighted = {}
    for m in reached:
        own: dict[str, Spectrum] = {}
        for _ in _asked(m):
            own |= next(found)
        weighted[m.layer.name] = _weighted(m, calibration, own)
    unreached = "no calibration example reached it with an effect on the outputs"
    return [weighted.get(m.layer.name) or replace(m, stays_dense=unreached) for m in measured]


def _asked(m: MeasuredLayer) -> list[tuple[Layer, float | None, Sequence[str]]]:
    """The forms of a layer whose errors are not those of a truncated SVD: of its matrix, and of what training wrote."""
    forms = (*m.own_values, *m.quantized)
    of_layer = [form for form in forms if not from_initial(form)]
    of_written = [form for form in forms if _of_own_errors(FORMS[form])]
    share = None if m.start is None else m.start.share
    asked = ((m.layer, None, of_layer), (m.layer, share, of_written))
    return [(layer, share, forms) for layer, share, forms in asked if forms]


def _of_own_errors(form: PairForm) -> bool:
    """Whether what training wrote errs otherwise in a form than its truncated SVD."""
    return isinstance(form, InitialForm) and form.pair.has_own_errors


def _weighted(m: MeasuredLayer, calibration: Calibration, own: Mapping[str, Spectrum]) -> MeasuredLayer:
    """A layer with its values in the metric; what training wrote errs relative to the whole layer too."""
    values, errors = decomposition_of(calibration, m.layer).values, dict(own)
    if m.start is not None:
        written = decomposition_of(calibration, m.layer, calibration.start(m.layer, m.start.share)).values
        total, of_written = (float(np.square(each).sum()) for each in (values, written))
        relative = math.sqrt(of_written / total) if total > 0 else 0.0
        for form in (*m.own_values, *m.quantized):
            if from_initial(form):
                errors[form] = relative * (own[form] if form in own else truncation_errors(written))
    return replace(m, weighted_values=values, own_errors=errors, uses=calibration.uses[m.layer.name])
