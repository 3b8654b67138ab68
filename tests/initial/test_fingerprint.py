"""Fingerprints of initial tensors."""

from __future__ import annotations

import json

import pytest
import torch

from compressor.initial import Fingerprint


def test_a_fingerprint_tells_tensors_apart_and_forgives_the_last_digits() -> None:
    tensor = torch.randn(40, 30)
    own = Fingerprint.from_dict(json.loads(json.dumps(Fingerprint.of(tensor).to_dict())))
    assert own.defect(tensor) is None
    assert own.defect(tensor * (1 + 1e-7)) is None
    assert own.defect(tensor.flip(0)) is not None
    assert own.defect(torch.randn(40, 30)) is not None
    for bad in (None, {}, {"norm": "1", "values": []}, {"norm": 1.0, "values": [float("nan")]}):
        with pytest.raises(ValueError, match="no fingerprint"):
            Fingerprint.from_dict(bad)
