"""A model in evaluation mode is where it is asked for, and is afterwards as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compressor.factorize.settings import DEFAULTS
from compressor.forms import InitialForm, InitialLayer, StoredWeight
from compressor.forms.plain import PLAIN
from compressor.forms.quantized import QuantizedPair
from compressor.model import dtype_of, evaluation_mode, logits_of, on_device
from compressor.network import SeparateExperts, with_separate_experts
from compressor.quantize import Quantization
from tests.lowrank.architectures import ARCHITECTURES

ELSEWHERE = torch.device("meta")


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).train()


def memory(model: nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in model.state_dict(keep_vars=True).items()}


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_that_was_moved_comes_back_to_the_same_memory(fails: bool) -> None:
    model = network()
    first = model[0].get_parameter("weight")
    first.grad = torch.ones(6, 4)
    tensors, before = dict(model.named_parameters()), memory(model)
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        with evaluation_mode(ELSEWHERE, model):
            assert {tensor.device for tensor in model.state_dict().values()} == {ELSEWHERE}
            assert not model.training
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert model.training
    assert all(parameter is tensors[name] for name, parameter in model.named_parameters())
    assert memory(model) == before
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(first.grad, torch.ones(6, 4))


def test_models_that_share_weights_share_them_afterwards() -> None:
    dense = ARCHITECTURES["mixtral"].dense()
    apart = with_separate_experts(dense)
    before = memory(dense), memory(apart)
    for models in ((apart, dense), (apart,)):
        with evaluation_mode(ELSEWHERE, *models):
            pass
    assert (memory(dense), memory(apart)) == before
    assert any(isinstance(module, SeparateExperts) for module in apart.modules())


def test_a_model_that_is_on_the_device_stays_there() -> None:
    model = network()
    before = memory(model)
    with evaluation_mode(torch.device("cpu"), model):
        during = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    assert during.items() <= before.items()


def test_a_model_that_is_held_on_a_device_is_moved_once() -> None:
    model = network()
    before = memory(model)
    with on_device(ELSEWHERE, model):
        held = dict(model.named_parameters())
        assert model.training
        for _ in range(2):
            with evaluation_mode(ELSEWHERE, model), on_device(ELSEWHERE, model):
                assert all(parameter is held[name] for name, parameter in model.named_parameters())
        assert {tensor.device for tensor in model.state_dict().values()} == {ELSEWHERE}
    assert memory(model) == before


def test_a_recurrent_layer_that_was_moved_runs_with_its_own_weights() -> None:
    layer, x = nn.LSTM(3, 4), torch.randn(2, 5, 3)
    with torch.no_grad():
        expected, _ = layer(x)
        with on_device(ELSEWHERE, layer):
            pass
        found, _ = layer(x)
    assert torch.equal(found, expected)


def test_a_model_takes_its_inputs_in_the_dtype_of_its_weights_and_not_of_their_scales() -> None:
    torch.manual_seed(0)
    dense, form = nn.Linear(48, 6), InitialForm.of(QuantizedPair.of(PLAIN, Quantization(8)))
    weight, start = StoredWeight("linear", (6, 48)), torch.randn(6, 48)
    pair = form.approximate(weight, dense.weight.detach().double() - start, 6, metric=None, settings=DEFAULTS)
    first = form.layer(dense, 6)
    assert isinstance(first, InitialLayer)
    first.load_state_dict({**form.stored(weight, pair, torch.float32), "bias": dense.bias, "weight": first.weight})
    first.fill_start(start)
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(6, 3))
    assert next(model.parameters()).dtype == torch.float32  # the bias
    without = nn.Sequential(form.layer(nn.Linear(48, 6, bias=False), 6))
    assert {each.dtype for each in without.parameters()} == {torch.float16}
    assert dtype_of(without) == dtype_of(model) == torch.float32
    assert dtype_of(nn.Sequential(nn.ReLU(), nn.Linear(2, 2).half())) == torch.float16
    assert dtype_of(nn.ReLU()) is None
    x = torch.randn(5, 48)
    expected = model[2](torch.relu(dense(x)))
    torch.testing.assert_close(logits_of(model, {"x": x}), expected, atol=0.05, rtol=0)
