"""The output head is found where its outputs, position by position, are the model's; and nowhere else."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import transformers
from torch import Tensor, nn

from compressor.calibration.criterion import outputs_of
from compressor.model import evaluation_mode
from compressor.model.head import Head, find_head
from tests.calibration.tiny_models import CPU, inputs_for, left_as_it_was, odd, transformer


def capped() -> nn.Module:
    """A Gemma whose logits are capped and a Granite-like scale away from what its head outputs."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, final_logit_softcapping=2.0, initializer_range=0.3,
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM(config).eval()


def scaled() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GraniteConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, logits_scaling=3.0, initializer_range=0.3,
    )  # fmt: skip
    return transformers.GraniteForCausalLM(config).eval()


class Ended(nn.Module):
    """Linear layers, and something after the last one."""

    def __init__(self, end: str) -> None:
        super().__init__()
        self.body, self.head, self.end = nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, 5), end

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.body(x)
        logits: Tensor = self.head(hidden)
        if self.end == "twice":
            logits = self.head(hidden)
        if self.end == "mean":
            logits = logits - logits.mean(0, keepdim=True)  # which mixes positions
        if self.end == "scale":
            logits = 3 * logits
        return logits


def found(model: nn.Module, inputs: dict[str, Tensor]) -> Head | None:
    with evaluation_mode(CPU, model):
        return find_head(model, partial(outputs_of, inputs=inputs))


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("llama", "lm_head"),
        ("gpt2", "lm_head"),
        ("gpt-neox", "lm_head"),
        ("opt", "lm_head"),
        ("bert", "cls.predictions.decoder"),
        ("vit", "classifier"),
    ],
)
def test_it_is_the_layer_that_outputs_the_models_outputs(name: str, head: str) -> None:
    model = transformer(name).eval()
    with left_as_it_was(model):
        assert found(model, inputs_for(name, 3)) == Head(head, outputs_of(model, inputs_for(name, 3)).shape[-1])


@pytest.mark.parametrize("model", [capped, scaled])
def test_what_the_models_own_code_makes_of_it_is_part_of_it(model: object) -> None:
    built: nn.Module = model()  # type: ignore[operator]
    small, other = ({"input_ids": torch.randint(3, 40, (examples, 7))} for examples in (1, 3))
    with left_as_it_was(built):
        head = found(built, small)
        assert head is not None
        assert head.tail is not None
        with evaluation_mode(CPU, built):
            expected = outputs_of(built, other)
            hidden = head.inputs(built, partial(outputs_of, inputs=other))
            torch.testing.assert_close(head(built, hidden.flatten(0, 1)[None, 2:9])[0], expected.flatten(0, 1)[2:9])


def test_a_layer_in_its_place_runs_instead_of_it() -> None:
    for end in ("", "scale"):
        model, instead, x = Ended(end), nn.Linear(8, 5), torch.randn(4, 6)
        head = found(model, {"inputs": x})
        assert head is not None
        hidden = model.body(x)
        expected = instead(hidden) * (3 if end else 1)
        torch.testing.assert_close(head(model, hidden[None], instead=instead)[0], expected)


@pytest.mark.parametrize("end", ["twice", "mean"])
def test_none_where_positions_are_mixed_or_it_runs_twice(end: str) -> None:
    assert found(Ended(end), {"inputs": torch.randn(4, 6)}) is None


@pytest.mark.parametrize("name", ["clip", "resnet"])
def test_none_where_the_outputs_are_no_layers(name: str) -> None:
    model, inputs = odd(name)
    if name == "resnet":
        model = nn.Sequential(nn.Conv2d(3, 4, 1))
        inputs = {"inputs": inputs["pixel_values"]}
    assert found(model.eval(), inputs) is None
