"""A walk runs on what its own steps left, whatever an earlier walk left in the cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.calibration import Calibration, uncompensated
from compressor.calibration.examples import Chunk
from compressor.calibration.walk import Walk
from compressor.model import evaluation_mode
from tests.calibration.tiny_models import calibrated, inputs_for, planned, transformer


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    found = calibrated(transformer("llama").eval(), [inputs_for("llama", 4), inputs_for("llama", 3)])
    assert found.segments.count > 2
    return found


def outputs(walk: Walk) -> list[tuple[Tensor, ...]]:
    """Of every segment on the second batch, in the model compressed so far."""
    found = []
    with evaluation_mode(walk.calibration.run.device, walk.calibration.model):
        for _ in range(walk.calibration.segments.count):
            found.append(walk.run_compressed(Chunk("fit", 1)))
            walk.advance()
    return found


def test_without_modules_it_is_the_dense_model_even_after_a_walk_with_some(calibration: Calibration) -> None:
    plans = [planned(layer, 2) for layer in calibration.layers.values()]
    compressed = outputs(Walk(calibration, dict(uncompensated(calibration, plans).modules)))
    again, dense = Walk(calibration), Walk(calibration)
    for found, other in zip(outputs(again), compressed, strict=True):
        with evaluation_mode(calibration.run.device, calibration.model):
            expected = dense.run_dense(Chunk("fit", 1))
        dense.segment += 1
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert dense.segment == 1 or not torch.equal(found[0], other[0])


def test_rows_of_a_batch_are_run_as_they_are_in_the_whole(calibration: Calibration) -> None:
    rows = slice(1, 3)
    with evaluation_mode(calibration.run.device, calibration.model):
        for segment in range(calibration.segments.count):
            walk = Walk(calibration, segment=segment)
            some, whole = walk.run_dense(Chunk("fit", 0, rows)), walk.run_dense(Chunk("fit", 0))
            for a, b in zip(some, whole, strict=True):
                torch.testing.assert_close(a, b[rows])
