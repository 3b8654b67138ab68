"""Moments of parameters against those that hooks on a layer see, and the loss that they predict."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compressor.calibration.criterion import sampled_loss
from compressor.errors import BadInput
from compressor.measure.moments import MomentPass, collect_moments
from compressor.measure.parameter_moments import ParameterCollector


class Last(nn.Module):
    """A recurrent layer and logits of its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(5, 6, batch_first=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def batches(count: int, *shape: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape) for _ in range(count)]


def test_a_linear_layers_are_those_that_a_hook_on_it_sees() -> None:
    # For one vector a prediction the Fisher information is E[x x^T (x) g g^T], near to a Kronecker product where all
    # vectors are as long.
    torch.manual_seed(0)
    layer = nn.Linear(6, 8)
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(8, 5))
    data = [nn.functional.normalize(each, dim=-1) for each in batches(600, 20, 6)]
    collector, generator = ParameterCollector({"layer": (layer, "weight")}), torch.Generator().manual_seed(0)

    def run(x: Tensor) -> None:
        sampled_loss(model(x), (), "likelihood", generator=generator).backward()

    with collector:
        seen = collect_moments({"layer": layer}, [MomentPass(lambda x=x: run(x)) for x in data])["layer"]
    found = collector.moments(600 * 20)["layer"]
    assert seen is not None
    for ours, theirs in ((found.inputs, seen.inputs), (found.gradients, seen.gradients)):
        scaled = ours * (theirs.trace() / ours.trace())
        assert float((scaled - theirs).norm() / theirs.norm()) < 0.15
    product = float(found.inputs.trace() * found.gradients.trace())
    assert product == pytest.approx(float(seen.inputs.trace() * seen.gradients.trace()), rel=0.1)


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0"])
def test_the_predicted_loss_of_a_recurrent_weight_is_the_divergence_of_a_small_change(name: str) -> None:
    torch.manual_seed(0)
    model, data = Last().eval(), batches(150, 16, 4, 5)
    collector, generator = ParameterCollector({"weight": (model.rnn, name)}), torch.Generator().manual_seed(0)
    with collector:
        for x in data:
            sampled_loss(model(x), (), "likelihood", generator=generator).backward()
    found = collector.moments(150 * 16)["weight"]
    weight, x, ratios = getattr(model.rnn, name), torch.cat(data), []
    for seed in range(10):
        torch.manual_seed(seed)
        change = 0.02 * torch.randn_like(weight)
        wide = change.detach().double()
        predicted = 0.5 * float((found.gradients @ wide @ found.inputs * wide).sum())
        with torch.no_grad():
            before = model(x).double().log_softmax(-1)
            weight += change
            after = model(x).double().log_softmax(-1)
            weight -= change
        ratios.append(predicted / float(nn.functional.kl_div(after, before, log_target=True, reduction="batchmean")))
    assert 0.7 < sum(ratios) / len(ratios) < 1.4
    assert all(0.4 < ratio < 2.5 for ratio in ratios)


@pytest.mark.slow
def test_a_sure_model_has_the_same_moments_in_batches_of_any_size() -> None:
    torch.manual_seed(0)
    model = Last().eval()
    with torch.no_grad():
        model.head.weight *= 5
        model.head.bias[0] += 5
    [x] = batches(1, 2048, 4, 5)
    assert float(model(x).detach().softmax(-1).amax(-1).mean()) > 0.9
    traces = []
    for each, draws in ((1, 1), (8, 8), (256, 8)):
        collector, generator = ParameterCollector({"w": (model.rnn, "weight_ih_l0")}), torch.Generator().manual_seed(0)
        with collector:
            for batch in x.split(each) * draws:
                sampled_loss(model(batch), (), "likelihood", generator=generator).backward()
        found = collector.moments(len(x) * draws)["w"]
        traces.append(float(found.inputs.trace() * found.gradients.trace()))
    assert traces[1:] == pytest.approx([traces[0]] * 2, rel=0.35)


def test_gradients_that_were_there_return_and_what_is_not_reached_has_no_moments() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)})
    model["used"].weight.grad = torch.ones(2, 3)
    model["used"].weight.requires_grad_(False)
    collector = ParameterCollector({name: (module, "weight") for name, module in model.items()})
    before = model["used"].weight.grad

    def run() -> None:
        with collector:
            model["used"](torch.ones(4, 3)).sum().backward()
            assert model["used"].weight.grad is None
            raise RuntimeError("failed")

    with pytest.raises(RuntimeError, match="failed"):
        run()
    assert model["used"].weight.grad is before
    assert not model["used"].weight.requires_grad
    assert set(collector.moments(4)) == {"used"}


def test_gradients_that_are_not_finite_are_named() -> None:
    layer = nn.Linear(3, 2)
    collector = ParameterCollector({"head": (layer, "weight")})
    with collector:
        (layer(torch.ones(4, 3)) * torch.inf).sum().backward()
    with pytest.raises(BadInput, match="head"):
        collector.moments(4)
