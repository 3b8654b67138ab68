"""The initial weights and what a layer still has of them."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from compressor.errors import BadInput
from compressor.initial import InitialWeights, fitted_share, share_left, start_of, starts_of
from compressor.io import open_checkpoint
from compressor.network import find_layers, module_architecture
from compressor.recipe import TrainingRecipe


def build() -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16))


def trained(seed: int, *, share: float = 0.8) -> nn.Sequential:
    """A network whose first layer kept a share of its start, and whose second one is another's."""
    torch.manual_seed(seed)
    module = build()
    column, row = torch.randn(32, 1), torch.randn(1, 24)
    with torch.no_grad():
        module[0].weight.mul_(share).add_(column @ row, alpha=0.02)
        module[2].weight.normal_(std=0.1)
    return module


@pytest.fixture(autouse=True)
def _own_generator():
    with torch.random.fork_rng(devices=()):
        yield


def test_a_layer_that_correlates_with_its_start_has_one_and_another_has_none():
    module = trained(3)
    checkpoint = open_checkpoint(module)
    layers = find_layers(checkpoint, module_architecture(module))
    found = starts_of(layers, checkpoint, InitialWeights.from_seed(build, 3))
    assert set(found) == {"0"}
    start = found["0"]
    assert start.z == pytest.approx(start.correlation * math.sqrt(24 * 32))
    assert start.fitted == pytest.approx(0.8, abs=0.02)
    assert start.share == start.fitted
    assert start.predicted is None
    assert 0.05 < start.written < 0.5
    assert starts_of(layers, checkpoint, InitialWeights.from_seed(build, 4)) == {}


def test_the_rank_of_what_training_wrote_is_bounded_where_one_module_uses_the_matrix():
    torch.manual_seed(3)
    module = build()
    with torch.no_grad():
        module[0].weight.add_(torch.randn(32, 3) @ torch.randn(3, 24), alpha=0.02)
    checkpoint, initial = open_checkpoint(module), InitialWeights.from_seed(build, 3)
    first = find_layers(checkpoint, module_architecture(module))[0]
    recipe = TrainingRecipe(optimizer="sgd", learning_rate=0.1, weight_decay=0.0, batch_size=1, steps=3)
    bounds = [
        starts_of([layer], checkpoint, initial, recipe=recipe, uses={first.name: 1})[first.name].rank_bound
        for layer in (first, replace(first, places=("again",)))
    ]
    assert bounds == [3, None]


def test_the_generators_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    InitialWeights.from_seed(build, 1)
    assert torch.equal(torch.rand(3), expected)


def test_a_seed_that_no_generator_takes_is_refused():
    with pytest.raises(BadInput, match="-1 is no seed"):
        InitialWeights.from_seed(build, -1)


@pytest.mark.parametrize(("decay", "used"), [(0.2231435, "predicted"), (1.0, "fitted")])
def test_the_share_is_the_predicted_one_where_it_leaves_no_more_than_the_fit(decay, used):
    drawn = torch.randn(40, 40, dtype=torch.float64)
    recipe = TrainingRecipe(optimizer="adamw", learning_rate=0.01, weight_decay=decay, schedule="constant", steps=100)
    trained = 0.8 * drawn + 0.05 * torch.randn(40, 40, dtype=torch.float64)
    start = start_of(trained, drawn, predicted=share_left(recipe))
    assert start is not None
    assert start.predicted == pytest.approx((1 - 0.01 * decay) ** 100, rel=1e-3)
    assert start.share == getattr(start, used)


def test_of_an_early_checkpoint_weight_decay_left_what_the_steps_since_left(tmp_path):
    """And they alone bound the rank of what training wrote since."""
    torch.manual_seed(0)
    early = nn.Sequential(nn.Linear(24, 32, bias=False))
    save_file(early.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 40, "max_steps": 43}))
    trained = nn.Sequential(nn.Linear(24, 32, bias=False))
    recipe = TrainingRecipe(
        optimizer="sgd", momentum=0.0, learning_rate=0.1, weight_decay=0.5, schedule="constant", batch_size=1, steps=43
    )
    with torch.no_grad():
        trained[0].weight.copy_(0.95**3 * early[0].weight + 0.02 * torch.randn(32, 3) @ torch.randn(3, 24))
    (layer,) = find_layers(open_checkpoint(trained), module_architecture(trained))
    initial = InitialWeights.from_checkpoint(tmp_path)
    (start,) = starts_of([layer], open_checkpoint(trained), initial, recipe=recipe, uses={layer.name: 1}).values()
    assert start.share == start.predicted == pytest.approx(0.95**3)
    assert start.rank_bound == 3


def test_the_fit_is_taken_in_the_metric_that_is_given():
    drawn, written = torch.randn(2, 30, 30, dtype=torch.float64)
    written[:, :15] = 0
    start = start_of(0.7 * drawn + written, drawn, in_metric=lambda weight: weight[:, :15])
    assert start is not None
    assert start.fitted == pytest.approx(0.7)
    assert start.written == pytest.approx(float(written.norm() / (0.7 * drawn + written).norm()))


def test_a_common_mean_is_no_correlation():
    first, second = 1 + 0.1 * torch.randn(2, 50, 50, dtype=torch.float64)
    assert start_of(first, second) is None
    assert fitted_share(first, second) == pytest.approx(1, abs=0.02)


def test_a_checkpoint_and_a_state_give_the_same_weights(tmp_path):
    torch.manual_seed(3)
    module = build()
    torch.save(module.state_dict(), tmp_path / "initial.pt")
    sources = (
        InitialWeights.from_checkpoint(tmp_path / "initial.pt"),
        InitialWeights.from_state(module.state_dict()),
        InitialWeights.from_state(module.state_dict),
    )
    for initial in sources:
        assert torch.equal(initial.read("0.weight"), module[0].weight)
        assert initial.read("elsewhere") is None
    assert sources[0].digest is not None


@pytest.mark.parametrize("kind", ["seed", "checkpoint", "state"])
def test_another_process_reads_the_same(kind, tmp_path):
    torch.manual_seed(3)
    module = build()
    torch.save(module.state_dict(), tmp_path / "initial.pt")
    initial = {
        "seed": lambda: InitialWeights.from_seed(build, 3),
        "checkpoint": lambda: InitialWeights.from_checkpoint(tmp_path / "initial.pt"),
        "state": lambda: InitialWeights.from_state(module.state_dict()),
    }[kind]()
    again = pickle.loads(pickle.dumps(initial))
    assert again.tensors.keys() == module.state_dict().keys()
    for name, tensor in module.state_dict().items():
        assert torch.equal(again.read(name), tensor)


def test_of_a_seed_no_numbers_are_kept():
    initial = InitialWeights.from_seed(lambda: nn.Linear(600, 500), 3)
    assert initial.read("weight").shape == (500, 600)
    assert len(pickle.dumps(initial)) < 4 * 600 * 500 / 20


def test_matrices_whose_draws_are_unknown_are_named(caplog):
    def permuted():
        module = nn.Linear(8, 8)
        module.weight.data = torch.randperm(64).float().view(8, 8)
        return module

    assert InitialWeights.from_seed(permuted, 0).read("weight") is None
    assert "how weight" in caplog.text


@pytest.mark.parametrize("state", [3, {}, {"name": "a"}])
def test_what_is_no_state_is_refused(state):
    with pytest.raises(BadInput, match="the initial state"):
        InitialWeights.from_state(state)
