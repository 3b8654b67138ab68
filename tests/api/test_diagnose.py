"""What diagnose finds in networks whose training is known, through the public API."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from compressor import BadInput, Diagnosis, TrainingRecipe, diagnose

CLASSES = 3
RECIPE = TrainingRecipe(
    optimizer="sgd",
    momentum=0.0,
    learning_rate=0.5,
    weight_decay=0.02,
    schedule="constant",
    steps=2000,
    batch_size=60,
    sequence_length=1,
    undecayed=(),
)


def examples(count: int = 60, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Clusters of three classes that a little noise blurs."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    centers = 2 * torch.randn(CLASSES, 6, dtype=torch.float64, generator=generator)
    inputs = centers[labels] + torch.randn(count, 6, dtype=torch.float64, generator=generator)
    return inputs.float().double(), labels  # data are read as float32


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.npz"
    inputs, labels = examples()
    np.savez(path, inputs=inputs.numpy(), labels=labels.numpy())
    return path


def chain(activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 12, bias=False),
        activation(),
        nn.Linear(12, 10, bias=False),
        activation(),
        nn.Linear(10, 3, bias=False),
    ).double()


def fit(model: nn.Module, *, steps: int, weight_decay: float, rate: float = 0.5) -> nn.Module:
    """Full-batch gradient descent."""
    inputs, labels = examples()
    inputs = inputs.to(next(model.parameters()).dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, weight_decay=weight_decay)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model


def subjects(found: Diagnosis) -> dict[str, str]:
    return {finding.subject: f"{finding.message} {finding.advice}" for finding in found.findings}


@pytest.mark.slow
def test_network_trained_to_a_stationary_point(data: Path) -> None:
    model = fit(chain(nn.Identity), steps=2000, weight_decay=0.02)
    found = diagnose(model, data=data, recipe=RECIPE, device="cpu")
    assert [layer.scaling_degree for layer in found.layers] == [1, 1, 1]
    for layer in found.layers:
        assert layer.stationarity is not None
        assert layer.stationarity.cosine == pytest.approx(1, abs=1e-9)
        assert layer.stationarity.ratio == pytest.approx(1, abs=1e-6)
    assert found.balance is not None
    assert found.balance.spread == pytest.approx(1, abs=1e-6)
    assert "3 of 3 layers" in subjects(found)["stationary point"]
    assert "no layer dominates" in subjects(found)["norm balance"]
    assert not any(finding.warning for finding in found.findings)


def test_rectified_network_comes_near_and_starts_far(data: Path) -> None:
    """At a constant step the kinks of ReLU keep descent from standing still."""
    begun = diagnose(chain(), data=data, recipe=RECIPE, device="cpu")
    assert "0 of 3 layers" in subjects(begun)["stationary point"]
    ended = diagnose(fit(chain(), steps=1000, weight_decay=0.02), data=data, recipe=RECIPE, device="cpu")
    assert "3 of 3 layers" in subjects(ended)["stationary point"]
    assert [layer.scaling_degree for layer in ended.layers] == [1, 1, 1]


@pytest.mark.parametrize("samples", [None, 45])
def test_gradient_is_that_of_the_mean_loss_however_the_data_are_cut(data: Path, samples: int | None) -> None:
    model = chain()
    found = diagnose(model, data=data, data_samples=samples, recipe=RECIPE, device="cpu")
    inputs, labels = examples()
    kept = torch.arange(60) if samples is None else torch.arange(samples) * 60 // samples
    weights = list(model.parameters())
    loss = nn.functional.cross_entropy(model(inputs[kept]), labels[kept])
    for layer, gradient in zip(found.layers, torch.autograd.grad(loss, weights), strict=True):
        assert layer.stationarity is not None
        assert layer.stationarity.gradient_norm == pytest.approx(gradient.norm().item(), rel=1e-10)
    assert found.predictions is not None
    assert found.predictions.loss == pytest.approx(loss.item())
    assert found.predictions.count == len(kept)


def test_scale_invariant_layers_are_skipped_and_the_model_is_left_as_it_was(data: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 3, bias=False)
    ).double()
    model[0].bias.requires_grad_(False)
    model[4].train()
    before = copy.deepcopy(model)
    found = diagnose(model, data=data, recipe=RECIPE, device="cpu")
    invariant, head = found.layers
    assert (invariant.scaling_degree, head.scaling_degree) == (0, 1)
    assert invariant.stationarity is not None
    assert (invariant.stationarity.cosine, invariant.stationarity.ratio) == (None, None)
    assert "scale-invariant" in invariant.stationarity.reason
    assert head.stationarity is not None
    assert head.stationarity.cosine is not None
    assert "1 of 2 layers" in subjects(found)["scale-invariant layers"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[name]), name
    for now, then in zip(model.modules(), before.modules(), strict=True):
        assert now.training == then.training
        assert not now._forward_hooks
    for now, then in zip(model.parameters(), before.parameters(), strict=True):
        assert (now.requires_grad, now.grad) == (then.requires_grad, None)


@pytest.mark.slow
def test_scale_invariant_layers_come_to_the_norm_that_is_predicted(data: Path) -> None:
    """A third of the labels is noise, so that the gradients at the end are as large as they have been."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 12, bias=False), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3, bias=False)
    ).double()
    inputs, labels = examples()
    labels = torch.where(torch.rand(60) < 0.3, torch.randint(CLASSES, (60,)), labels)
    np.savez(data, inputs=inputs.numpy(), labels=labels.numpy())
    recipe = replace(RECIPE, learning_rate=0.1, weight_decay=0.02, steps=1000, batch_size=20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.02)
    for _ in range(1000):
        drawn = torch.randperm(60)[:20]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[drawn]), labels[drawn]).backward()
        optimizer.step()
    found = diagnose(model.eval(), data=data, recipe=recipe, device="cpu")
    invariant, head = found.layers
    norm = model[0].weight.detach().norm().item()
    assert invariant.equilibrium is not None
    assert invariant.equilibrium.norm == pytest.approx(norm)
    assert invariant.equilibrium.predicted == pytest.approx(norm, rel=0.15)
    assert head.equilibrium is None
    assert "times the equilibrium" in subjects(found)["scale-invariant layers"]
    # The gradient of all data is smaller than those of mini-batches, and less than a batch of data tells nothing.
    for batch_size, least in ((60, 0.0), (61, None)):
        other = diagnose(model, data=data, recipe=replace(recipe, batch_size=batch_size), device="cpu")
        held = other.layers[0].equilibrium
        assert held is not None
        if least is None:
            assert held.predicted is None
            assert "mini-batches" in subjects(other)["scale-invariant layers"]
        else:
            assert held.predicted is not None
            assert least < held.predicted < 0.85 * norm


def test_low_rank_at_chance_is_no_compressibility(data: Path) -> None:
    """Matrices of rank one whose outputs favor the same class whatever comes in."""
    model = chain()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.outer(torch.ones(parameter.shape[0]), torch.ones(parameter.shape[1])))
        model[4].weight.mul_(torch.tensor([[3.0], [2.0], [1.0]], dtype=torch.float64))
    found = diagnose(model, data=data, recipe=RECIPE, device="cpu")
    assert found.predictions is not None
    assert found.predictions.at_chance
    warning = found.findings[0]
    assert (warning.subject, warning.warning) == ("collapse", True)
    assert "3 of 3 layers are low-rank" in warning.message
    assert "not compressibility" in warning.advice
    assert "ranks" not in subjects(found)


def test_decay_that_outweighs_the_data_is_told(data: Path) -> None:
    """In float32 the outputs underflow, and the answer is always the same."""
    model = fit(chain().float(), steps=200, weight_decay=0.5)
    found = diagnose(model, data=data, recipe=replace(RECIPE, weight_decay=0.5, steps=200), device="cpu")
    assert (found.findings[0].subject, found.findings[0].warning) == ("collapse", True)
    healthy = diagnose(fit(chain(), steps=300, weight_decay=0.01), data=data, recipe=RECIPE, device="cpu")
    assert not {"collapse", "norms"} & subjects(healthy).keys()


def test_untrained_network_is_no_collapse(data: Path) -> None:
    inputs, _ = examples()
    labels = torch.randint(CLASSES, (60,), generator=torch.Generator().manual_seed(5))
    np.savez(data, inputs=inputs.numpy(), labels=labels.numpy())
    model = nn.Sequential(nn.Linear(6, 3)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.linalg.qr(torch.randn(6, 3, dtype=torch.float64))[0].T * 1e-3)
        model[0].bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    found = diagnose(model, data=data, device="cpu")
    assert found.predictions is not None
    assert found.predictions.at_chance
    assert "collapsed" not in subjects(found)["collapse"]


def test_zeros_are_a_collapse_without_any_data() -> None:
    model = chain()
    nn.init.zeros_(model[2].weight)
    found = diagnose(model, recipe=RECIPE, device="cpu")
    assert "1 of 3 layers are zero." in subjects(found)["collapse"]
    assert found.layers[1].start_energy is None


def test_chance_is_the_most_frequent_class(data: Path) -> None:
    inputs, _ = examples()
    labels = torch.zeros(60, dtype=torch.int64)
    labels[:15] = 1
    np.savez(data, inputs=inputs.numpy(), labels=labels.numpy())
    found = diagnose(chain(), data=data, device="cpu")
    assert found.predictions is not None
    assert found.predictions.chance == 0.75


def test_last_layer_of_a_classifier_is_capped_by_its_classes(data: Path) -> None:
    found = diagnose(chain(), data=data, recipe=replace(RECIPE, weight_decay=0.5), device="cpu")
    steps = math.ceil(math.log(0.1) / math.log(1 - 0.5 * 0.5))
    windows = [layer.inspected.window for layer in found.layers]
    assert all(window is not None for window in windows)
    assert [window.rank_bound for window in windows if window] == [60 * steps] * 2 + [CLASSES - 1]
    without = diagnose(chain(), recipe=replace(RECIPE, weight_decay=0.5), device="cpu")
    assert without.layers[-1].inspected.window is not None
    assert without.layers[-1].inspected.window.vacuous is True


def test_language_model_is_diagnosed_on_its_next_tokens(data: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=11, max_position_embeddings=8, **sizes)).double().eval()
    windows = torch.randint(11, (40, 8), generator=torch.Generator().manual_seed(1))
    np.savez(data, input_ids=windows.numpy())
    found = diagnose(model, data=data, recipe=replace(RECIPE, sequence_length=8), device="cpu")
    assert found.predictions is not None
    assert (found.predictions.metric, found.predictions.chance, found.predictions.count) == ("perplexity", 11, 40 * 7)
    loss = model(input_ids=windows, labels=windows).loss
    assert found.predictions.loss == pytest.approx(loss.item())
    for layer in found.layers:
        (gradient,) = torch.autograd.grad(loss, model.get_submodule(layer.name).weight, retain_graph=True)
        assert layer.stationarity is not None
        assert layer.stationarity.gradient_norm == pytest.approx(gradient.norm().item(), rel=1e-6)
        assert layer.inspected.uses == 8


def test_uses_are_counted_on_the_data(data: Path) -> None:
    """A matrix that every example uses twice, and an expert to which a quarter of the examples goes."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.expert = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.twice(self.twice(x).relu()).relu()
            out = x[:, :3].clone()
            out[::4] = out[::4] + self.expert(x[::4])
            return out

    torch.manual_seed(0)
    found = diagnose(Routed().double(), data=data, recipe=replace(RECIPE, sequence_length=None), device="cpu")
    assert [layer.inspected.uses for layer in found.layers] == [2, 1]


def test_recipe_decides_what_is_said_without_data() -> None:
    nothing = subjects(diagnose(chain(), device="cpu"))
    assert "`recipe`" in nothing["memory window"]
    assert "stationary point" not in nothing
    short = subjects(diagnose(chain(), recipe=replace(RECIPE, steps=3), device="cpu"))
    assert "longer than the training" in short["memory window"]
    assert "initial weights" in short["initialization"]
    adamw = replace(RECIPE, optimizer="adamw", steps=3, decoupled_weight_decay=True)
    assert "No rank is bounded" in subjects(diagnose(chain(), recipe=adamw, device="cpu"))["memory window"]


def test_weights_that_only_decayed_are_flagged() -> None:
    """Nothing was learned: all of the norm is what decay left of the start."""
    recipe = replace(RECIPE, steps=300)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 60, bias=False), nn.ReLU(), nn.Linear(60, 60, bias=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_((1 - 0.5 * 0.02) ** 300)
    found = diagnose(model, recipe=recipe, device="cpu")
    for layer in found.layers:
        assert layer.start_energy == pytest.approx(1, rel=0.1)  # a random start is near its expected norm
    assert "falling faster" in subjects(found)["norms"]


# Series


def save(model: nn.Module, path: Path) -> None:
    save_file({name: tensor.float().contiguous() for name, tensor in model.state_dict().items()}, path)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of strong decay with a checkpoint now and then, named by step."""
    folder = tmp_path / "run"
    folder.mkdir()
    model = chain()
    save(model, folder / "step-0.safetensors")
    for done in range(50, 201, 50):
        fit(model, steps=50, weight_decay=0.1)
        save(model, folder / f"step-{done}.safetensors")
    return folder


def test_series_is_measured_in_the_order_of_the_steps(run: Path) -> None:
    (run / "notes-7.txt").write_text("not a checkpoint")
    (run / "model-00001-of-00002.safetensors").write_text("a shard, not a step")
    last = run / "step-200.safetensors"
    found = diagnose(last, series=run, recipe=RECIPE, device="cpu")
    assert found.series is not None
    assert found.series.steps == (0, 50, 100, 150, 200)
    for each, layer in zip(found.series.layers, found.layers, strict=True):
        alone = diagnose(run / "step-0.safetensors", recipe=RECIPE, device="cpu")
        assert each.ranks[0] == next(other for other in alone.layers if other.name == each.name).inspected.ranks
        assert each.ranks[-1] == layer.inspected.ranks
        assert each.norms[-1] == pytest.approx(layer.norm)


def test_an_earlier_checkpoint_tells_what_the_window_leaves_out(run: Path) -> None:
    recipe = replace(RECIPE, weight_decay=0.1, steps=200)
    found = diagnose(run / "step-200.safetensors", series=run, recipe=recipe, device="cpu")
    assert found.series is not None
    for index, layer in enumerate(found.layers):
        window = layer.inspected.window
        assert window is not None
        assert window.steps == math.ceil(math.log(0.1) / math.log(0.95))
        # 45 steps: the last checkpoint before step 155 is that of step 150.
        norms = found.series.layers[index].norms
        assert window.norm_ratio == pytest.approx(norms[3] / norms[4])
        assert window.residual == pytest.approx(0.1 * norms[3] / norms[4])
    # Ranks are bounded only where a batch is small.
    small = replace(recipe, batch_size=1, learning_rate=5.0)
    found = diagnose(run / "step-200.safetensors", series=run, recipe=small, device="cpu")
    assert "of a matrix's norm" in subjects(found)["memory window"]


def test_series_that_cannot_be_used(run: Path, tmp_path: Path) -> None:
    model = run / "step-0.safetensors"
    for folder, message in ((tmp_path / "missing", "no folder"), (tmp_path, "holds 0 checkpoints")):
        with pytest.raises(BadInput, match=message):
            diagnose(model, series=folder, device="cpu")
    other = nn.Sequential(nn.Linear(6, 5, bias=False))
    save(other, run / "step-250.safetensors")
    with pytest.raises(BadInput, match="another shape"):
        diagnose(model, series=run, device="cpu")
    save(other, run / "again-250.safetensors")
    with pytest.raises(BadInput, match="both of step 250"):
        diagnose(model, series=run, device="cpu")


# What cannot be diagnosed


def test_data_need_an_architecture(run: Path, data: Path) -> None:
    with pytest.raises(BadInput, match="architecture"):
        diagnose(run / "step-0.safetensors", data=data, device="cpu")


def test_a_gradient_that_is_not_finite_is_said(data: Path) -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.abs().sqrt()

    model = nn.Sequential(nn.Linear(6, 3, bias=False), Root()).double()
    inputs, labels = examples()
    inputs[0] = 0  # the root's slope at zero is infinite
    np.savez(data, inputs=inputs.numpy(), labels=labels.numpy())
    with pytest.raises(BadInput, match="not finite"):
        diagnose(model, data=data, device="cpu")


def test_model_without_a_matrix() -> None:
    with pytest.raises(BadInput, match="no layer"):
        diagnose(nn.Sequential(nn.Embedding(3, 4)), device="cpu")


def test_result_is_json(data: Path) -> None:
    import json

    document = json.loads(json.dumps(diagnose(chain(), data=data, recipe=RECIPE, device="cpu").to_dict()))
    assert document["schema_version"] == 1
    assert {"findings", "layers", "predictions", "balance", "recipe", "series"} <= document.keys()
    assert document["layers"][0]["stationarity"].keys() == {"cosine", "ratio", "gradient_norm", "reason"}
