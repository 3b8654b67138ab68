"""Draws that are recorded, kept as a document, and made again bit by bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from compressor.initial import Draws, Fingerprint, fingerprint, record


def several() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.LSTM(3, 4), nn.Conv2d(2, 3, 3), nn.Embedding(5, 6), nn.Linear(7, 2))


def drawn_twice() -> nn.Module:
    """The draws of PyTorch are overwritten by those of the network."""
    module = nn.Linear(30, 20)
    nn.init.normal_(module.weight, 0.0, 0.02)
    nn.init.uniform_(module.bias)
    return module


def scaled() -> nn.Module:
    module = nn.Linear(30, 20)
    with torch.no_grad():
        module.weight.mul_(2)
    return module


@pytest.mark.parametrize("build", [several, drawn_twice])
def test_what_was_drawn_is_drawn_again(build: Callable[[], nn.Module]) -> None:
    recorded = record(build, 3)
    torch.manual_seed(3)
    state = build().state_dict()
    assert recorded.unrecorded == frozenset()
    draws = Draws.from_dict(json.loads(json.dumps(recorded.draws.to_dict(), sort_keys=True)))
    before = torch.get_rng_state()
    again = dict(draws.replay(state.keys()))
    assert again.keys() == draws.names == state.keys()
    for name in reversed(list(state)):  # in any order
        assert torch.equal(again[name], state[name])
        assert torch.equal(draws.tensor(name), state[name])
    assert torch.equal(before, torch.get_rng_state())


def test_a_tensor_that_changed_after_its_draw_is_unrecorded() -> None:
    recorded = record(scaled, 3)
    assert recorded.unrecorded == {"weight"}
    assert recorded.draws.names == {"bias"}
    with pytest.raises(KeyError):
        recorded.draws.tensor("weight")


def test_recording_leaves_the_generator() -> None:
    before = torch.get_rng_state()
    record(several, 3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "step",
    [
        "normal_",
        ["exec", [3], "float32", [0, 1], "a"],
        ["normal_", [-3], "float32", [0, 1], "a"],
        ["normal_", [2**20, 2**20], "float32", [0, 1], "a"],
        ["normal_", [3], "int8", [0, 1], "a"],
        ["normal_", [3], "float32", ["0", 1], "a"],
        ["normal_", [3], "float32", [0, 1], 5],
    ],
)
def test_a_document_that_is_no_draw_is_refused(step: Any) -> None:
    with pytest.raises(ValueError, match="no draw"):
        Draws.from_dict({"seed": 1, "torch": "2.9", "steps": [step]})


def test_a_fingerprint_tells_other_tensors_and_not_their_rounding() -> None:
    tensor = torch.randn(30, 20)
    mark = Fingerprint.from_dict(json.loads(json.dumps(fingerprint(tensor).to_dict())))
    assert mark.defect(tensor * (1 + 1e-7)) is None
    assert mark.defect(tensor * (1 + 1e-4)) is not None
    assert mark.defect(tensor.flip(0)) is not None
    assert mark.defect(torch.full_like(tensor, torch.nan)) is not None
