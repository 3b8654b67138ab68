"""The pretended accelerator behaves as a CUDA device where the package could tell."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from tests.standin.accelerator import counted, failing

pytestmark = pytest.mark.slow


def test_it_computes_what_the_cpu_computes(device):
    torch.manual_seed(0)
    a, b = torch.randn(4, 5), torch.randn(5, 3)
    product = a.to(device) @ b.to(device)
    assert product.device == device
    assert torch.equal(product.cpu(), a @ b)
    assert torch.equal(a.to(device).T.contiguous().view(2, 10)[1:, ::2].cpu(), a.T.contiguous().view(2, 10)[1:, ::2])
    resized = torch.zeros(0, device=device)
    torch.mm(a.to(device), b.to(device), out=resized)
    assert torch.equal(resized.cpu(), a @ b)


def test_tensors_of_two_devices_are_refused(device, other_device):
    here = torch.ones(2, 2, device=device)
    for elsewhere in (torch.ones(2, 2), torch.ones(2, 2, device=other_device)):
        with pytest.raises(RuntimeError, match="same device"):
            here @ elsewhere
        with pytest.raises(RuntimeError, match="same device"):
            torch.cat([here, elsewhere])
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, 2).mul_(here)
    with pytest.raises(RuntimeError, match="same device"):
        nn.functional.conv1d(here[None], torch.ones(2, 2, 1))
    assert (here + torch.tensor(1.0)).sum().item() == 8, "a number may lie on the CPU"
    assert here[torch.tensor([0])].sum().item() == 2, "and so may indices"


def test_numbers_are_drawn_by_a_generator_of_the_device(device, other_device):
    drawn = torch.rand(3, device=device, generator=torch.Generator(device).manual_seed(1))
    assert torch.equal(drawn.cpu(), torch.rand(3, generator=torch.Generator().manual_seed(1)))
    for elsewhere in ("cpu", other_device):
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(3, device=device, generator=torch.Generator(elsewhere))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    torch.rand(3, device=device)
    assert torch.equal(torch.get_rng_state(), state)


def test_it_counts_launches_copies_and_waits(device):
    a = torch.ones(4, 5)
    with counted() as counts:
        here = a.to(device)
        (here.T @ here).relu()
        here.view(-1)[3:].unsqueeze(0)
    assert counts == {"copy to device": 1, "bytes to device": 80, "aten::mm": 1, "aten::relu": 1}
    with counted() as counts:
        assert float(here[0, 0]) == 1
        here[here > 0]
        here.nonzero()
        torch.accelerator.synchronize(device)
    assert (counts["item"], counts["synchronize"]) == (1, 4)
    with counted() as counts:
        here.cpu()
    assert counts == {"copy to host": 1, "bytes to host": 80}


def test_memory_is_counted(device):
    before = torch.accelerator.memory_allocated(device)
    torch.accelerator.reset_peak_memory_stats(device)
    here = torch.zeros(1000, device=device)
    here + 1
    assert torch.accelerator.memory_allocated(device) - before == 4000
    assert torch.accelerator.max_memory_allocated(device) - before == 8000


def test_events_measure_time(device):
    first, second = (torch.Event(device, enable_timing=True) for _ in range(2))
    first.record()
    torch.ones(3, device=device)
    second.record()
    second.synchronize()
    assert first.elapsed_time(second) > 0


def test_models_train_are_copied_and_saved(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    x = torch.randn(2, 3, 8, 8)
    there = copy.deepcopy(model).to(device)
    for each, data in ((model, x), (there, x.to(device))):
        optimizer = torch.optim.Adam(each.parameters())
        each(data).square().sum().backward()
        optimizer.step()
    saved = io.BytesIO()
    torch.save(copy.deepcopy(there).state_dict(), saved)
    saved.seek(0)
    for name, tensor in torch.load(saved, map_location="cpu").items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_have_gradients(device, kind):
    torch.manual_seed(0)
    layer, x = kind(3, 4, batch_first=True, bidirectional=True), torch.randn(2, 5, 3)
    there = copy.deepcopy(layer).to(device)
    outputs = [each(data)[0] for each, data in ((layer, x), (there, x.to(device)))]
    torch.testing.assert_close(outputs[1].cpu(), outputs[0])
    for each in outputs:
        each.square().sum().backward()
    for ours, theirs in zip(there.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.cpu(), theirs.grad)


def test_linear_algebra_fails_where_it_is_told_to(device):
    matrix = torch.eye(3, device=device)
    with failing("aten::_linalg_eigh"), pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.eigh(matrix)
    assert torch.linalg.eigh(matrix).eigenvalues.device == device
