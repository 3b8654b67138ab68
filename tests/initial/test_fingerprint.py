"""Fingerprints of initial tensors."""

from __future__ import annotations

import json

import pytest
import torch

from compressor.initial import Fingerprint


def test_a_fingerprint_tells_tensors_apart_and_forgives_the_last_digits() -> None:
    tensor = torch.randn(40, 30)
    own = Fingerprint.of_list(json.loads(json.dumps(Fingerprint.of(tensor).to_list())))
    assert own.defect(tensor) is None
    assert own.defect(tensor * (1 + 1e-7)) is None
    assert own.defect(tensor.flip(0)) is not None
    assert own.defect(torch.randn(40, 30)) is not None
    for bad in (None, {}, [], ["1"], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="no fingerprint"):
            Fingerprint.of_list(bad)
