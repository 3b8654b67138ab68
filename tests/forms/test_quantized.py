"""The errors of quantized forms: averages over a large matrix, and what is formed of a small one."""

from __future__ import annotations

import pytest

from compressor.factorize import FactorizationSettings, Metric
from compressor.forms import FORMS, Approximations
from compressor.forms.weights import StoredWeight
from compressor.network import Kind
from compressor.quantize import Quantization, Simulation
from tests.quantize.test_gptq import random
from tests.quantize.test_simulated import metric_of


@pytest.mark.parametrize("kind", ["linear", "embedding"])
@pytest.mark.parametrize("form", ["dense@8", "dense@4g32"])
def test_of_a_large_matrix_averages_are_close_to_errors_that_are_formed(form: str, kind: Kind) -> None:
    weight, metric = StoredWeight(kind, (512, 512), 1), metric_of(512, 512)
    matrix = random(512, 512)
    found = Approximations(weight=weight, matrix=matrix, metric=metric, settings=FactorizationSettings())
    averaged = found.errors(FORMS[form])
    quantization = Quantization.of(form.partition("@")[2])
    turned = kind == "embedding"
    own, of_own = (matrix.T, Metric(metric.gradients, metric.inputs)) if turned else (matrix, metric)
    formed = Simulation(of_own).matrix(own, quantization, of_own).product()
    assert averaged[0] == pytest.approx(found.relative_error(formed.T if turned else formed), rel=0.01)
    assert len(averaged) == (1 if quantization.bits == 8 else 513)


@pytest.mark.parametrize("scale", [2.0**-540, 2.0**510])
def test_weights_of_any_size_have_errors(scale: float) -> None:
    weight, metric = StoredWeight("linear", (512, 512), 1), metric_of(512, 512)
    found = Approximations(
        weight=weight, matrix=scale * random(512, 512), metric=metric, settings=FactorizationSettings()
    )
    assert found.errors(FORMS["dense@8"])[0] >= 0
