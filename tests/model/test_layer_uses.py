"""What one forward says about how often each layer is used, against what can be counted by hand."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import transformers
from torch import Tensor, nn

from compressor.errors import BadInput
from compressor.latency import LayerUse
from compressor.model import LayerSelection, layer_uses, open_model, scaled
from tests.lowrank.architectures import ARCHITECTURES

CPU = torch.device("cpu")


def uses(model: nn.Module, inputs: Mapping[str, Tensor], *, embeddings: bool = False) -> dict[str, LayerUse]:
    opened = open_model(model, select=LayerSelection(embeddings=embeddings))
    layers = [layer for layer in opened.layers if layer.eligible]
    return layer_uses(opened, layers, inputs, device=CPU)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.unused = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.relu(self.inner(x)))


def test_rows_of_linear_layers_and_layers_that_are_called_twice() -> None:
    found = uses(Twice(), {"x": torch.zeros(1, 5, 8)})
    assert found == {"inner": LayerUse(calls=2, rows=5)}


def test_sizes_of_convolutions() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Conv2d(4, 6, 3)
    )
    found = uses(model, {"x": torch.zeros(1, 3, 16, 12)})
    assert found["0"] == LayerUse(batch=1, in_size=(16, 12), out_size=(8, 6), bias=True)
    assert found["2"] == LayerUse(batch=1, in_size=(8, 6), out_size=(16, 12), bias=True)
    assert found["3"] == LayerUse(batch=1, in_size=(16, 12), out_size=(14, 10), bias=True)


def test_a_use_by_more_examples() -> None:
    assert scaled(LayerUse(calls=2, rows=5, head_rows=3), 4) == LayerUse(calls=2, rows=20, head_rows=12)
    assert scaled(LayerUse(batch=2, in_size=(8,), out_size=(4,)), 4) == LayerUse(batch=8, in_size=(8,), out_size=(4,))


def test_a_tied_head_is_used_with_its_embedding() -> None:
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=32)
    found = uses(
        transformers.GPT2LMHeadModel(config), {"input_ids": torch.zeros(1, 7, dtype=torch.int64)}, embeddings=True
    )
    assert found["transformer.wte"] == LayerUse(rows=7, head_rows=7)
    assert found["transformer.h.0.attn.c_attn"] == LayerUse(rows=7, bias=True)
    assert found["transformer.h.0.mlp.c_fc"].rows == 7


def test_weights_that_a_module_multiplies_with_in_its_own_code() -> None:
    attention = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    found = uses(nn.Sequential(attention, nn.Linear(16, 4)), {"x": torch.zeros(1, 9, 16)})
    assert {name: use.rows for name, use in found.items()} == {
        "0.self_attn.in_proj_weight": 9,
        "0.self_attn.out_proj": 9,
        "0.linear1": 9,
        "0.linear2": 9,
        "1": 9,
    }


class LooksAtValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x[x.sum(-1) > 0])


def test_a_model_that_looks_at_values_is_run_on_them_and_left_as_it_was() -> None:
    model = LooksAtValues()
    found = uses(model, {"x": torch.tensor([[1.0] * 8, [-1.0] * 8, [1.0] * 8])})
    assert found["inner"].rows == 2
    assert not model.inner._forward_hooks
    assert model.training


def test_a_model_that_does_not_take_the_inputs_is_refused() -> None:
    with pytest.raises(BadInput, match=r"cannot be run on example inputs \(RuntimeError"):
        uses(Twice(), {"x": torch.zeros(1, 7)})


def test_experts_are_refused_because_tokens_decide() -> None:
    architecture = ARCHITECTURES["mixtral"]
    with pytest.raises(BadInput, match="depends on the tokens"):
        uses(architecture.dense(), architecture.inputs())
