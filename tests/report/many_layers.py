"""A result with many layers that no model was compressed for, with everything that a report shows of a layer."""

from __future__ import annotations

import numpy as np

from compressor.evaluation import UniformQuantization
from compressor.network import Layer
from compressor.planning import CalibrationResult, MeasuredLayer
from compressor.planning.size import plan_by_size
from compressor.results import BeforeAfter, Compression
from tests.report.results import compression_of, plan_of

PARTS = (
    "self_attention.query_projection",
    "self_attention.output_projection",
    "mlp.up_projection",
    "mlp.down_projection",
)


def names(count: int, length: int = 120) -> list[str]:
    """Names of layers in blocks of four, each of so many characters."""
    beginnings = (f"model.decoder.layers.{number // 4}.{PARTS[number % 4]}." for number in range(count))
    return [beginning + "x" * (length - len(beginning)) for beginning in beginnings]


def measured_layer(name: str, number: int, side: int = 48) -> MeasuredLayer:
    draw = np.random.default_rng(number)
    values = np.sort(draw.lognormal(0, 2, side))[::-1]
    layer = Layer(name, name, f"{name}.weight", None, "linear", (side, side), (side, side))
    return MeasuredLayer(layer, values, itemsize=2, weighted_values=1e-2 * values, uses=2.0)


def many_layers(count: int) -> Compression:
    """A calibrated result at a quarter of the size."""
    # Not in the order of their names, as a file may list them.
    measured = [measured_layer(name, number) for number, name in enumerate(sorted(names(count)))]
    size = sum(each.layer.parameters for each in measured)
    layers = plan_by_size(measured, size // 4, "plain", unit="parameters")
    assert layers is not None
    plan = plan_of(*layers, calibration=CalibrationResult(96, 32, 1.0, predicted_loss=0.02, holdout_loss=0.05))
    after = 2 * sum(layer.parameters for layer in layers)
    return compression_of(
        plan,
        parameters=BeforeAfter(size, after // 2),
        bytes=BeforeAfter(2 * size + 4096, after + 4096),
        spectra={each.layer.name: each.singular_values for each in measured},
        measured=tuple(measured),
        form="plain",
        command="compress model --keep 0.25 --output small",
        uniform=tuple(
            UniformQuantization(bits, "GPTQ", bits * size // 16, bits * size // 8, holdout_loss=loss)
            for bits, loss in ((8, -1e-5), (4, 0.003))
        ),
    )
