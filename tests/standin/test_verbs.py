"""Every verb on an accelerator, with models that lie on the CPU and on the accelerator: it gives what the CPU gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import compressor
from compressor.calibration import CalibrationSettings, RefinementSettings
from tests.standin.networks import NETWORKS, Network

pytestmark = pytest.mark.slow

# Of each kind of candidate two; int8 and int4 are compared on it by `balanced`, in `test_embeddings`.
BRIEF = CalibrationSettings(
    refinement=RefinementSettings(passes=1, steps=2), exponents=(1.0, 0.0), ridges=(1e-3, 1e-1), uniform=False
)
# What is asked of `compress`, but for the calibration.
EFFORTS: dict[str, dict[str, Any]] = {
    "none": {},
    "self": {"effort": "fast", "calibration": "self", "calibration_samples": 8},
    "fast": {"effort": "fast", "bits": None},  # in any bits, as data are calibrated on
    "balanced": {"effort": "balanced"},
    "best": {"calibration_settings": BRIEF},
}


def compressed(network: Network, at: torch.device | str, on: str, **asked: Any) -> Any:
    """A network that lies `at` a device, compressed `on` one."""
    asked = {"calibration": network.batches(4), "bits": 16} | asked if asked else {"calibration": "none"}
    return compressor.compress(network.on(at), keep=0.6, prefer="size", device=on, **asked)


def require_same(ours: nn.Module, theirs: nn.Module, *, device: torch.device) -> None:
    """Equal weights, but for the order in which fused kernels add on the CPU."""
    assert {each.device for each in ours.state_dict().values()} == {device}
    for (name, tensor), expected in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor.cpu(), expected, rtol=0, atol=5e-3, msg=name)


# Transformers are alike, and take longest.
CASES = [
    (name, effort)
    for name in NETWORKS
    for effort in EFFORTS
    if effort in {"none", "self"} or name in {"llama", "convolutions", "perceptron", "recurrent", "encoder"}
    if effort != "balanced"  # all of it is done by best too
]


@pytest.mark.parametrize(("name", "effort"), CASES)
def test_compress(name, effort, device):
    network = NETWORKS[name]
    expected = compressed(network, "cpu", "cpu", **EFFORTS[effort])
    for at in (torch.device("cpu"), device):
        found = compressed(network, at, "standin", **EFFORTS[effort])
        require_same(found.model, expected.model, device=at)


def test_embeddings(device):
    found, expected = (
        compressed(NETWORKS["tied"], at, on, embeddings=True, **EFFORTS["balanced"])
        for at, on in ((device, "standin"), ("cpu", "cpu"))
    )
    require_same(found.model, expected.model, device=device)


@pytest.mark.parametrize("name", ["llama", "perceptron", "convolutions"])
def test_inspect(name, device):
    found, expected = (
        compressor.inspect(NETWORKS[name].on(at), device=on) for at, on in ((device, "standin"), ("cpu", "cpu"))
    )
    assert found.to_dict()["layers"] == expected.to_dict()["layers"]


@pytest.mark.parametrize("at", ["cpu", "standin"])
@pytest.mark.parametrize("name", ["perceptron", "convolutions", "recurrent"])
def test_evaluate(name, at):
    network = NETWORKS[name]
    inputs = torch.cat(network.batches(4))
    labels = network.on("cpu")(inputs).argmax(-1)
    data = DataLoader(TensorDataset(inputs, labels), batch_size=8)
    small = compressed(network, at, "standin").model
    found = compressor.evaluate(small, baseline=network.on(at), data=data, device="standin")
    expected = compressor.evaluate(compressed(network, "cpu", "cpu").model, data=data, device="cpu")
    assert found.device == "standin:0 (a stand-in)"
    assert found.compressed == pytest.approx(expected.compressed)
    assert found.baseline == 1
    assert {each.device.type for each in small.state_dict().values()} == {at}


def test_evaluate_a_language_model(device):
    network = NETWORKS["llama"]
    data = network.batches(3)
    found, expected = (
        compressor.evaluate(network.on(at), data=data, device=on) for at, on in ((device, "standin"), ("cpu", "cpu"))
    )
    assert found.compressed == pytest.approx(expected.compressed)


@pytest.mark.parametrize("name", NETWORKS)
def test_restore(name, device, tmp_path):
    small = compressed(NETWORKS[name], device, "standin").model
    compressor.restore(small, output=tmp_path / "dense.safetensors")
    assert any(tmp_path.iterdir())


def test_a_folder(tmp_path):
    network = NETWORKS["llama"]
    network.on("cpu").save_pretrained(tmp_path / "dense")
    batches = network.batches(4)
    for on in ("standin", "cpu"):
        compressor.compress(
            tmp_path / "dense",
            output=tmp_path / on,
            keep=0.6,
            prefer="size",
            bits=16,
            calibration=batches,
            data=batches,
            effort="balanced",
            device=on,
        )
    found, expected = (compressor.load_model(tmp_path / on) for on in ("standin", "cpu"))
    require_same(found, expected, device=torch.device("cpu"))


@pytest.mark.parametrize("at", ["cpu", "standin"])
def test_the_difference_of_a_fine_tune(at, tmp_path):
    base, tuned = (NETWORKS["perceptron"].on(at) for _ in range(2))
    with torch.no_grad():
        for layer in tuned[::2]:
            layer.weight += torch.outer(torch.linspace(-1, 1, len(layer.weight)), torch.ones(layer.in_features)).to(at)
    adapted = compressor.compress(tuned, base=base, device="standin").model
    x = torch.randn(3, 20)
    torch.testing.assert_close(adapted.to("cpu")(x), tuned.to("cpu")(x), rtol=1e-3, atol=1e-3)


def test_the_difference_of_two_files(tmp_path):
    base = NETWORKS["perceptron"].on("cpu").state_dict()
    save_file(base, tmp_path / "base.safetensors")
    tuned = {name: each + torch.ones_like(each) if each.dim() == 2 else each for name, each in base.items()}
    save_file(tuned, tmp_path / "tuned.safetensors")
    asked = {"base": tmp_path / "base.safetensors"}
    sizes = [
        compressor.compress(
            tmp_path / "tuned.safetensors", output=tmp_path / f"{on}.safetensors", device=on, **asked
        ).bytes
        for on in ("standin", "cpu")
    ]
    assert sizes[0] == sizes[1]


class Spread(nn.Module):
    """A perceptron whose layers take what the one before computes to their own device."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x.to(next(layer.parameters()).device)))
        return x


@pytest.mark.parametrize("effort", [effort for effort in EFFORTS if effort != "self"])
def test_a_model_on_two_devices_is_compressed_where_it_lies(effort, device, other_device):
    model = Spread().to(device)
    model.layers[2].to(other_device)
    asked = {"keep": 0.6, "prefer": "size", **EFFORTS[effort]}
    if effort != "none":
        asked["calibration"] = list(torch.randn(4, 8, 32, generator=torch.Generator().manual_seed(1)))
    found = compressor.compress(model, device="standin", **asked).model
    expected = compressor.compress(Spread(), device="cpu", **asked).model
    assert {each.device for each in found.layers[:2].parameters()} == {device}
    assert {each.device for each in found.layers[2].parameters()} == {other_device}
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=5e-3)


def test_merge(device, tmp_path):
    network, files = NETWORKS["perceptron"], []
    data = []
    for number in range(2):
        model = network.on("cpu")
        with torch.no_grad():
            model[0].weight.mul_(1 + number)
        save_file(model.state_dict(), tmp_path / f"{number}.safetensors")
        files.append(tmp_path / f"{number}.safetensors")
        inputs = torch.cat(network.batches(2))
        data.append(DataLoader(TensorDataset(inputs, model(inputs).argmax(-1)), batch_size=4))
    found, expected = (
        compressor.merge(
            files, output=tmp_path / f"{on}.safetensors", mode="sum", data=data, device=on, factory=network.build
        ).to_dict()
        for on in ("standin", "cpu")
    )
    for each in (found, expected):
        each.pop("seconds")
        each.pop("output")
    torch.testing.assert_close(torch.tensor(_numbers(found)), torch.tensor(_numbers(expected)))


def _numbers(value: Any) -> list[float]:
    """All numbers of a document."""
    if isinstance(value, dict | list | tuple):
        return [number for each in (value.values() if isinstance(value, dict) else value) for number in _numbers(each)]
    return [float(value)] if isinstance(value, int | float) else []


@pytest.mark.parametrize("data", [True, False])
def test_diagnose(data, device):
    network = NETWORKS["perceptron"]
    inputs = torch.cat(network.batches(2))
    examples = (inputs, torch.arange(len(inputs)) % 5) if data else None
    found, expected = (
        compressor.diagnose(network.on(at), data=examples, device=on).to_dict()
        for at, on in ((device, "standin"), ("cpu", "cpu"))
    )
    torch.testing.assert_close(torch.tensor(_numbers(found)), torch.tensor(_numbers(expected)), rtol=1e-4, atol=1e-6)


def test_a_drop_is_searched_for(device):
    network = NETWORKS["perceptron"]
    inputs = torch.cat(network.batches(4))
    data = (inputs, network.on("cpu")(inputs).argmax(-1))
    asked = {
        "calibration": network.batches(4),
        "effort": "fast",
        "data": data,
        "max_drop": 0.5,
        "prefer": "size",
        "bits": 16,
    }
    found, expected = (
        compressor.compress(network.on(at), device=on, **asked) for at, on in ((device, "standin"), ("cpu", "cpu"))
    )
    assert [layer.rank for layer in found.plan.layers] == [layer.rank for layer in expected.plan.layers]


def test_a_compressed_model_on_the_device_is_exported(device, tmp_path):
    pytest.importorskip("onnxscript")
    small = compressed(NETWORKS["perceptron"], device, "standin").model
    compressor.export(small, to="onnx", output=tmp_path / "small.onnx")
    assert (tmp_path / "small.onnx").stat().st_size > 0


@pytest.mark.parametrize("name", ["tied", "convolutions", "recurrent"])
def test_quantized_layers(name, device):
    """Integers made on the accelerator are those made on the CPU, and a model of them computes the same on both."""
    network = NETWORKS[name]
    [inputs] = network.batches(1)
    found, expected = (
        compressor.compress(network.on(at), keep=0.45, bits="8,4", calibration="none", embeddings=True, device=on).model
        for at, on in ((device, "standin"), ("cpu", "cpu"))
    )
    assert any(name.endswith("_packed") for name in expected.state_dict())
    require_same(found, expected, device=device)
    with torch.no_grad():
        ours, theirs = found(inputs.to(device)), expected(inputs)
    torch.testing.assert_close(getattr(ours, "logits", ours).cpu(), getattr(theirs, "logits", theirs))
    if name == "tied":
        tokens = [
            each.generate(inputs.to(each.device), max_new_tokens=3, do_sample=False) for each in (found, expected)
        ]
        assert torch.equal(tokens[0].cpu(), tokens[1])
    labels = None if name == "tied" else expected(inputs).argmax(-1)
    data = [inputs] if labels is None else DataLoader(TensorDataset(inputs, labels), batch_size=4)
    scores = [compressor.evaluate(each, data=data, device=on) for each, on in ((found, "standin"), (expected, "cpu"))]
    assert scores[0].compressed == pytest.approx(scores[1].compressed)
