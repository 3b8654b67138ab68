"""The scale of a layer before training, against layers that their own libraries initialize."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from compressor.io import open_checkpoint
from compressor.measure import initial_standard_deviation
from compressor.network import find_layers, module_architecture, transformers_architecture


@pytest.mark.parametrize("layer", [nn.Linear(288, 500), nn.Conv2d(32, 500, 3)])
def test_without_a_module_it_is_the_default_of_torch(layer: nn.Linear | nn.Conv2d, tmp_path: Path) -> None:
    save_file({"layer.weight": layer.weight.detach().clone()}, tmp_path / "m.safetensors")
    [found] = find_layers(open_checkpoint(tmp_path / "m.safetensors"))
    assert initial_standard_deviation(found, None) == pytest.approx(layer.weight.std().item(), rel=0.01)


def test_a_trained_module_is_initialized_once_more_and_left_alone() -> None:
    model = nn.Sequential(nn.Linear(300, 200))
    expected = float(model[0].weight.detach().std())
    with torch.no_grad():
        model[0].weight.fill_(7.0)
    [found] = find_layers(open_checkpoint(model), module_architecture(model))
    assert initial_standard_deviation(found, module_architecture(model)) == pytest.approx(expected, rel=0.01)
    assert bool((model[0].weight == 7.0).all())


def test_a_new_model_says_it_itself() -> None:
    model = nn.Sequential(nn.Linear(300, 200))
    nn.init.normal_(model[0].weight, std=0.001)
    [found] = find_layers(open_checkpoint(model), module_architecture(model, untrained=True))
    measured = initial_standard_deviation(found, module_architecture(model, untrained=True))
    assert measured == pytest.approx(0.001, rel=0.01)


def test_transformers_initializes_by_the_configuration(tmp_path: Path) -> None:
    import transformers

    config = transformers.GPT2Config(n_embd=48, n_layer=1, n_head=2, vocab_size=20, initializer_range=0.3)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    architecture = transformers_architecture(tmp_path)
    for layer in find_layers(open_checkpoint(tmp_path), architecture):
        if layer.eligible:
            assert initial_standard_deviation(layer, architecture) == pytest.approx(0.3, rel=0.05)
