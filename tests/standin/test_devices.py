"""What the package knows of devices, with one that is neither a CPU nor CUDA."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import compressor
from compressor.calibration.activation_cache import ActivationCache
from compressor.errors import BadInput
from compressor.evaluation.cost import measure_latency, measure_peak_memory
from compressor.factorize.tied_embedding import TiedMetric, nearest_kronecker_metric
from compressor.factorize.truncated_svd import truncated_svd
from compressor.factorize.weighted_svd import Metric, decompose
from compressor.measure import singular_values
from compressor.measure.eigen import _say_once
from compressor.merging.overlap import row_space
from compressor.model import resolve_device
from compressor.torch_state import neutral_torch_state
from tests.standin.accelerator import counted, failing, without_float64
from tests.standin.networks import NETWORKS
from tests.standin.test_verbs import EFFORTS, compressed, require_same

pytestmark = pytest.mark.slow


def test_an_accelerator_goes_by_its_name(device, other_device):
    assert resolve_device("standin") == resolve_device("standin:0") == resolve_device(device) == device
    assert resolve_device("standin:1") == other_device
    assert resolve_device("auto") == torch.device("cpu"), "it is not chosen where nobody named it"


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("standin:2", "use standin:0 to standin:1, auto or cpu"),
        ("gpu", "use auto, cpu, standin or standin:N"),
        ("xpu", "use auto, cpu, standin or standin:N"),
        ("standin:", "use auto, cpu, standin or standin:N"),
        ("cuda", "use auto or cpu"),
    ],
)
def test_an_error_says_what_there_is(name, remedy):
    with pytest.raises(BadInput, match=remedy):
        resolve_device(name)


def test_random_numbers_of_every_device_end_as_they_began(device, other_device):
    def draw() -> list[float]:
        return [float(torch.rand((), device=each)) for each in ("cpu", device, other_device)]

    torch.manual_seed(0)
    with neutral_torch_state():
        draw()
    after = draw()
    torch.manual_seed(0)
    assert draw() == after


def test_timing_waits_for_the_device(device):
    with counted() as counts:
        latency = measure_latency(nn.Linear(8, 8), {"inputs": torch.zeros(2, 8)}, device=device)
    assert counts["synchronize"] == 2 * latency.repeats


def test_peak_memory_is_the_allocator_s(device):
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 2))
    peak = measure_peak_memory(model, {"inputs": torch.zeros(16, 64)}, device=device)
    weights = 4 * sum(each.numel() for each in model.parameters())
    assert peak >= weights + 4 * 16 * (64 + 256)
    assert peak < weights + 4 * 16 * (64 + 3 * 256)


@pytest.mark.parametrize("matrix", [torch.randn(6, 9), torch.randn(9, 6)])
def test_a_decomposition_that_fails_on_the_device_is_done_on_the_cpu(device, matrix, caplog):
    _say_once.cache_clear()
    there = matrix.to(device)
    metric = Metric(torch.eye(9 if matrix.shape[1] == 9 else 6).double(), torch.eye(len(matrix)).double())
    moved = Metric(metric.inputs.to(device), metric.gradients.to(device))
    with failing("aten::_linalg_eigh"):
        pair, basis = truncated_svd(there, 3), row_space(there)
        values = [singular_values(there), decompose(there, moved).values]
    assert {pair.up.device, pair.down.device, basis.device} == {device}
    assert caplog.text.count("standin does not find the eigenvalues of some matrices: the CPU does") == 1
    torch.testing.assert_close(pair.product().cpu(), truncated_svd(matrix, 3).product())
    np.testing.assert_allclose(values, [singular_values(matrix), decompose(matrix, metric).values])


def test_the_nearest_metric_asks_the_device_for_no_eigenvalues(device):
    def metric(where: torch.device) -> TiedMetric:
        torch.manual_seed(0)
        terms = []
        for _ in range(2):
            root = torch.randn(4, 4, dtype=torch.float64)
            terms.append(Metric(torch.rand(7, dtype=torch.float64).to(where), (root @ root.T).to(where)))
        return TiedMetric(*terms)

    with failing("aten::linalg_eig"):
        found = nearest_kronecker_metric(metric(device))
    wanted = nearest_kronecker_metric(metric(torch.device("cpu")))
    torch.testing.assert_close(found.inputs.cpu(), wanted.inputs)
    torch.testing.assert_close(found.gradients.cpu(), wanted.gradients)


@pytest.mark.parametrize("order", [range(6), [0, 1, 2, 3, 3, 3, 4, 5], [3, 1, 0, 5, 2, 4]])
def test_batches_that_are_read_ahead_are_those_that_were_written_last(order, device):
    cache = ActivationCache(device)
    kinds = cache.dense("fit", 1), cache.gradients(2)
    values = {kind: [torch.randn(3) for _ in range(6)] for kind in kinds}
    for kind, batches in values.items():
        for batch, each in enumerate(batches):
            kind.write(batch, (each,))
    for batch in order:
        for kind, batches in values.items():
            [found] = kind.read(batch)
            assert found.device == device
            assert torch.equal(found.cpu(), batches[batch])
            if batch < 5:  # the next one, which may be read already
                batches[batch + 1] = torch.randn(3)
                kind.write(batch + 1, (batches[batch + 1],))
    kinds[0].drop(5)
    kinds[0].read(4)
    with pytest.raises(KeyError):
        kinds[0].read(5)


@pytest.fixture
def narrow(device):
    """The device without float64, as Apple's: what needs float64 is computed on the CPU, the rest on the device."""
    with without_float64():
        yield device


def test_the_stand_in_refuses_float64(narrow):
    assert resolve_device("standin") == narrow
    here = torch.ones(2, device=narrow)
    for make in (
        here.double,
        lambda: here.new_zeros(2, dtype=torch.float64),
        lambda: torch.ones(2).double().to(narrow),
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
def test_compress_without_float64(name, effort, narrow):
    found, expected = (
        compressed(NETWORKS[name], at, on, **EFFORTS[effort]) for at, on in ((narrow, "standin"), ("cpu", "cpu"))
    )
    require_same(found.model, expected.model, device=narrow)


def test_tied_embeddings_without_float64(narrow):
    found, expected = (
        compressed(NETWORKS["tied"], at, on, embeddings=True, **EFFORTS["balanced"])
        for at, on in ((narrow, "standin"), ("cpu", "cpu"))
    )
    require_same(found.model, expected.model, device=narrow)


def test_other_verbs_without_float64(narrow, tmp_path):
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
