"""A device without float64, as Apple's: what needs float64 is computed on the CPU, and the rest stays on the device."""

from __future__ import annotations

import pytest
import torch

import compressor
from compressor.model import resolve_device
from tests.standin.accelerator import without_float64
from tests.standin.networks import NETWORKS
from tests.standin.test_verbs import EFFORTS, compressed, require_same

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _narrow(device):
    with without_float64():
        yield


def test_the_stand_in_refuses_float64(device):
    assert resolve_device("standin") == device
    here = torch.ones(2, device=device)
    for make in (
        here.double,
        lambda: here.new_zeros(2, dtype=torch.float64),
        lambda: torch.ones(2).double().to(device),
    ):
        with pytest.raises(TypeError, match="float64"):
            make()


@pytest.mark.parametrize(
    ("name", "effort"),
    [
        ("perceptron", "none"),
        ("perceptron", "best"),
        ("convolutions", "balanced"),
        ("llama", "best"),
        ("mixture", "fast"),
        ("recurrent", "self"),
    ],
)
def test_compress(name, effort, device):
    found, expected = (
        compressed(NETWORKS[name], at, on, **EFFORTS[effort]) for at, on in ((device, "standin"), ("cpu", "cpu"))
    )
    require_same(found.model, expected.model, device=device)


def test_tied_embeddings(device):
    found, expected = (
        compressed(NETWORKS["tied"], at, on, embeddings=True, **EFFORTS["balanced"])
        for at, on in ((device, "standin"), ("cpu", "cpu"))
    )
    require_same(found.model, expected.model, device=device)


def test_other_verbs(device, tmp_path):
    network = NETWORKS["llama"]
    network.on("cpu").save_pretrained(tmp_path / "dense")
    batches = network.batches(4)
    asked = {"data": batches, "device": "standin"}
    found, expected = (
        compressor.evaluate(tmp_path / "dense", data=batches, device=on).compressed for on in ("standin", "cpu")
    )
    assert found == pytest.approx(expected)
    assert compressor.diagnose(tmp_path / "dense", **asked).layers
    assert compressor.inspect(tmp_path / "dense", device="standin").layers
