"""Models of plain PyTorch, as modules and as the files of strangers: what becomes smaller computes what it says."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import prune

from compressor import BadInput, compress, restore
from compressor.cli.run import run
from compressor.forms import LowRankLinear, PivotedLinear
from compressor.lowrank import factored_parameters
from compressor.model import load_model
from compressor.planning import Budget, LayerPlan, Plan
from tests.calibration.tiny_models import TWO_PASSES

torch.set_num_threads(1)


class Recurrent(nn.Module):
    """A recurrent layer, backwards too, and a classifier."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 12)
        self.rnn = kind(12, 16, bidirectional=True, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.words(tokens))[0][:, -1])


class Attention(nn.Module):
    """One block of a vision transformer with a fused projection to q, k and v, in plain linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 24, 4, stride=4)
        self.positions = nn.Parameter(torch.randn(1, 4, 24))
        self.norm = nn.LayerNorm(24)
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)
        self.mlp = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT + self.positions
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 12)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head((x + self.mlp(x)).mean(1))


class Fused(nn.Module):
    """PyTorch's own attention, alone and in its transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(16, 2, kdim=12, vdim=20, batch_first=True)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        self.memory = nn.Parameter(torch.randn(1, 5, 12))
        self.values = nn.Parameter(torch.randn(1, 5, 20))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x)[0]
        memory, values = (each.expand(len(x), -1, -1) for each in (self.memory, self.values))
        return self.encoder(x + self.cross(x, memory, values)[0])


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(8, 16), nn.GRUCell(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        hidden, state = self.lstm(x)
        return self.gru(self.lstm(x, (hidden, state))[0])


def mobile() -> nn.Sequential:
    """Depthwise, grouped and dilated convolutions, and pointwise ones between them."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6(),
        nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24),
        nn.Conv2d(24, 24, 3, padding=2, dilation=2, groups=4, bias=False), nn.BatchNorm2d(24), nn.ReLU6(),
        nn.Conv2d(24, 32, 3, padding=2, dilation=2, padding_mode="circular"), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def generator(*, bias: bool = False) -> nn.Sequential:
    """DCGAN's generator, small."""
    return nn.Sequential(
        nn.ConvTranspose2d(16, 32, 4, 1, 0, bias=bias), nn.BatchNorm2d(32), nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=bias), nn.BatchNorm2d(16), nn.ReLU(),
        nn.ConvTranspose2d(16, 3, 4, 2, 1, bias=bias), nn.Tanh(),
    )  # fmt: skip


def generator_with_biases() -> nn.Sequential:
    return generator(bias=True)


def images(count: int = 5) -> Tensor:
    return torch.randn(count, 1, 8, 8)


def words(count: int = 5) -> Tensor:
    return torch.randint(0, 20, (count, 7))


def codes(count: int = 5) -> Tensor:
    return torch.randn(count, 16, 1, 1)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "lstm": (Recurrent, words),
    "gru": (lambda: Recurrent(nn.GRU), words),
    "vit": (Attention, images),
    "depthwise cnn": (mobile, images),
    "generator": (generator, codes),
    "generator with biases": (generator_with_biases, codes),
    "attention": (Fused, lambda count=5: torch.randn(count, 6, 16)),
    "cells": (Cells, lambda count=5: torch.randn(count, 8)),
}


def trained(build: Callable[[], nn.Module]) -> nn.Module:
    """A model in evaluation mode whose numbers are not those of `build`, batch statistics among them."""
    torch.manual_seed(3)
    model = build().eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "running_var" in name else torch.randn_like(tensor) * 0.3)
    return model


def saved(model: nn.Module, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    return path


def dense_twin(build: Callable[[], nn.Module], state: dict[str, Tensor]) -> nn.Module:
    """The original code with a restored state: what a user of it has."""
    model = build().eval()
    model.load_state_dict(state, strict=True)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", MODELS)
def test_a_strangers_file_meets_its_budget_and_restores_into_its_own_code(
    name: str, suffix: str, tmp_path: Path
) -> None:
    build, inputs = MODELS[name]
    model = trained(build)
    path = saved(model, tmp_path / f"model{suffix}")
    assert run([str(path), "--keep", "0.6", "-o", str(tmp_path / "small.safetensors")]) == 0
    small = load_file(tmp_path / "small.safetensors")
    report = compress(path, keep=0.6, dry_run=True)
    untouched = sum(t.numel() for t in model.state_dict().values()) - report.plan.eligible_before
    stored = sum(tensor.numel() for tensor in small.values())
    assert untouched < stored <= untouched + 0.6 * report.plan.eligible_before

    restored = tmp_path / f"restored{suffix}"
    assert run(["restore", str(tmp_path / "small.safetensors"), "-o", str(restored)]) == 0
    state = load_file(restored) if suffix == ".safetensors" else torch.load(restored, weights_only=True)
    twin, x = dense_twin(build, state), inputs()
    with torch.no_grad():
        expected = twin(x)
        assert not torch.equal(expected, model(x))
        # The compressed file itself runs in the same code, whatever a bare file could know of its layers.
        torch.testing.assert_close(load_model(tmp_path / "small.safetensors", build).eval()(x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_module_its_state_dict_and_its_file_are_one_model(name: str, tmp_path: Path) -> None:
    build, inputs = MODELS[name]
    model, x = trained(build), inputs()
    in_memory = compress(model, keep=0.6, calibration="none", prefer="size").model
    assert in_memory is not None
    path = saved(model, tmp_path / "model.safetensors")
    report = compress(path, keep=0.6, calibration="none", factory=build, output=tmp_path / "small.safetensors")
    state, file = in_memory.state_dict(), load_file(str(report.output))
    assert state.keys() == file.keys()
    assert all(torch.equal(state[name], file[name]) for name in file)
    assert sum(tensor.numel() for tensor in state.values()) == report.parameters.after

    restore(saved(in_memory, tmp_path / "small.pt"), output=tmp_path / "dense.safetensors")
    restore(str(report.output), output=tmp_path / "again.safetensors")
    twin = dense_twin(build, load_file(tmp_path / "dense.safetensors"))
    loaded = load_model(str(report.output), build).eval()
    with torch.no_grad():
        expected = twin(x)
        for each in (in_memory, loaded, dense_twin(build, load_file(tmp_path / "again.safetensors"))):
            torch.testing.assert_close(each(x), expected)
        in_memory.load_state_dict(loaded.state_dict(), strict=True)
        torch.testing.assert_close(in_memory(x), expected)
        torch.testing.assert_close(copy.deepcopy(in_memory)(x), expected)
    with pytest.raises(RuntimeError, match=r"[Mm]issing|size mismatch"):
        build().load_state_dict(file)


def drawn(inputs: Callable[..., Tensor], seed: int = 1) -> list[Tensor]:
    torch.manual_seed(seed)
    return [inputs(8) for _ in range(12)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lstm", "generator with biases", "attention", "cells"])
def test_calibration_makes_far_better_factors_of_every_kind(name: str) -> None:
    build, inputs = MODELS[name]
    model = trained(build)
    report = compress(
        model, keep=0.5, calibration=drawn(inputs), calibration_settings=TWO_PASSES, prefer="size", bits=16
    )
    blind = compress(model, keep=0.5, prefer="size").model
    assert report.model is not None
    assert blind is not None
    assert report.plan.eligible_after <= 0.5 * report.plan.eligible_before
    [x] = drawn(lambda count: inputs(8 * count), seed=2)[:1]
    with torch.no_grad():
        expected = model(x)
        errors = [float((small(x) - expected).square().mean()) for small in (report.model, blind)]
    assert errors[0] < 0.5 * errors[1]


class Twice(nn.Module):
    """One module under two names, called three times, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.again = self.first
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(torch.relu(self.first(torch.relu(self.first(x))))))


@pytest.mark.slow
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_module_under_several_names_becomes_one_pair_that_is_called_as_often(
    calibrated: bool, tmp_path: Path
) -> None:
    model = trained(Twice)
    data = drawn(lambda count: torch.randn(count, 16)) if calibrated else None
    report = compress(model, keep=0.6, calibration=data, prefer="size", bits=16)
    small: Any = report.model
    assert isinstance(small.first, LowRankLinear | PivotedLinear)
    assert small.first is small.again
    torch.save(model.state_dict(), tmp_path / "tied.pt")  # which knows that the two are one
    filed = compress(tmp_path / "tied.pt", keep=0.6, factory=Twice, calibration=data, bits=16)
    assert filed.parameters == report.parameters
    loaded: Any = load_model(str(filed.output), Twice)
    assert loaded.first is loaded.again
    restore(str(filed.output), output=tmp_path / "dense.safetensors")
    twin, x = dense_twin(Twice, load_file(tmp_path / "dense.safetensors")), torch.randn(6, 16)
    with torch.no_grad():
        for each in (small, loaded):
            torch.testing.assert_close(each(x), twin(x))
    apart = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(apart, tmp_path / "apart.safetensors")  # which does not
    with_code = compress(tmp_path / "apart.safetensors", keep=0.6, factory=Twice)
    assert {layer.name for layer in with_code.skipped} == {"first", "again"}


class Repeated(nn.Module):
    """A transformer's layer and a cell that are run several times, under as many names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)] * 3)
        self.cell = nn.GRUCell(16, 16)
        self.again = self.cell

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.again(x[:, 0], self.cell(x[:, 1]))


def test_factored_parameters_of_a_module_under_several_names_come_back_from_a_file(tmp_path: Path) -> None:
    model, x = trained(Repeated), torch.randn(3, 4, 16)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    report = compress(tmp_path / "model.pt", keep=0.5, factory=Repeated)
    assert {"layers.0.self_attn.in_proj_weight", "cell.weight_hh"} <= {
        layer.name for layer in report.plan.layers if layer.rank is not None
    }
    loaded: Any = load_model(str(report.output), Repeated).eval()
    assert loaded.layers[0] is loaded.layers[2]
    assert loaded.cell is loaded.again
    restore(str(report.output), output=tmp_path / "dense.pt")
    twin = dense_twin(Repeated, torch.load(tmp_path / "dense.pt"))
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), twin(x), rtol=1e-4, atol=1e-5)


def normalized(kind: str) -> nn.Sequential:
    wrap: Any = {
        "weight_norm": nn.utils.parametrizations.weight_norm,
        "old weight_norm": nn.utils.weight_norm,
        "spectral_norm": nn.utils.parametrizations.spectral_norm,
        "old spectral_norm": nn.utils.spectral_norm,
        "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    }[kind]
    return nn.Sequential(
        wrap(nn.Conv2d(2, 12, 3)), nn.ReLU(), wrap(nn.ConvTranspose2d(12, 8, 3)), nn.Flatten(),
        wrap(nn.Linear(8 * 64, 24)), nn.Tanh(), nn.Linear(24, 5),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["weight_norm", "old weight_norm", "spectral_norm", "old spectral_norm", "pruning"])
def test_computed_weights_are_compressed_as_what_they_are_and_the_model_is_left_alone(
    kind: str, training: bool, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model, x = normalized(kind), torch.randn(4, 2, 8, 8)
    model(x).sum().backward()  # old ways keep the result, with its graph, as an attribute
    model.eval()
    expected = model(x).detach()
    model.train(training)
    model[4].requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = compress(
        model, plan=Plan("", None, Budget("plan"), (LayerPlan("4", (0, 0), "", 24, "plain", 0, 0.0, ""),))
    )
    assert "0.weight, 2.weight, 4.weight" in caplog.text
    small: Any = report.model
    assert type(small[0]) is nn.Conv2d
    assert isinstance(small[4], LowRankLinear)
    assert small.training == training
    assert [each.requires_grad for each in (small[0].weight, small[4].up.weight, small[6].weight)] == [
        True,
        False,
        True,
    ]
    torch.testing.assert_close(small.eval()(x), expected, rtol=1e-4, atol=1e-5)
    copy.deepcopy(small)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(model.eval()(x).detach(), expected)
    images = [torch.randn(4, 2, 8, 8) for _ in range(4)]
    cut: Any = compress(
        model, keep=0.5, calibration=images, calibration_settings=TWO_PASSES, prefer="size", bits=16
    ).model
    assert isinstance(cut[4], LowRankLinear | PivotedLinear)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", ["weight_norm", "old weight_norm", "spectral_norm", "old spectral_norm"])
@pytest.mark.parametrize("factory", [True, False], ids=["code", "bare file"])
def test_a_file_of_normalized_weights_comes_back_into_its_own_code(kind: str, factory: bool, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return normalized(kind)

    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(4, 2, 8, 8)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    report = compress(tmp_path / "model.safetensors", tolerance=0.7, factory=build if factory else None)
    assert [layer.name.partition(".")[0] for layer in report.plan.layers if layer.rank is not None] == list("0246")
    restore(str(report.output), output=tmp_path / "dense.safetensors")
    twin = dense_twin(build, load_file(tmp_path / "dense.safetensors"))
    loaded = load_model(str(report.output), build).eval()
    torch.testing.assert_close(loaded(x), twin(x), rtol=1e-4, atol=1e-5)


def test_a_factored_parameter_trains_moves_and_is_computed_once_where_it_does_not() -> None:
    small: Any = compress(trained(Recurrent), keep=0.5, prefer="size").model
    names = factored_parameters(small.rnn)
    assert set(names) == {"weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse"}
    x = words(3)
    with torch.no_grad():
        assert small.rnn.weight_ih_l0 is small.rnn.weight_ih_l0  # nn.LSTM asks four times in a pass
        before = small(x)
        small.rnn.parametrizations.weight_ih_l0.original0.data.mul_(0.5)  # which no version counter tells
        assert not torch.allclose(small(x), before)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.5)
    for _ in range(2):
        small(x).square().sum().backward()
        small(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in small.rnn.parameters())
    optimizer.step()
    with torch.no_grad():
        after = small(x)
        assert not torch.allclose(after, before)
        torch.testing.assert_close(small.double()(x), after.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["lstm", "cells"])
def test_the_product_of_factors_does_not_depend_on_autocast(kind: str) -> None:
    build, data = MODELS[kind]
    small, x = compress(trained(build), keep=0.5, prefer="size").model, data()
    assert any(factored_parameters(part) for part in small.modules())
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.mul_(0.5)  # so that the product is computed anew
        fresh = copy.deepcopy(small)
        before = small(x)
        with torch.autocast("cpu", torch.bfloat16):
            cast = fresh(x)
        assert torch.equal(fresh(x), before)
    torch.testing.assert_close(cast.float(), before, rtol=0.1, atol=0.1)


def test_attention_runs_on_its_fast_path_and_off_it() -> None:
    small: Any = compress(trained(Fused), keep=0.5, prefer="size").model
    x = torch.randn(3, 6, 16)
    with torch.no_grad():
        fast = small(x)
    with torch.enable_grad():
        torch.testing.assert_close(small(x).detach(), fast, rtol=1e-4, atol=1e-5)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """All that must be as it was, but for the numbers."""
    modules = {
        name: (id(module), type(module), sorted(vars(module)), module.training, list(module._modules.items()),
               dict(module._forward_hooks), dict(module._forward_pre_hooks), dict(module._backward_hooks))
        for name, module in model.named_modules()
    }  # fmt: skip
    tensors = {
        name: (id(tensor), tensor.requires_grad, id(tensor.grad), tensor.dtype, tensor.device, tensor.data_ptr())
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    return {"modules": modules, "tensors": tensors}


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    before, values = fingerprint(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield
    assert fingerprint(model) == before
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())


class Raising(nn.Module):
    """Runs for some batches, then fails."""

    def __init__(self, runs: int) -> None:
        super().__init__()
        self.stem, self.rnn, self.drop = nn.Linear(8, 8), nn.GRU(8, 8, batch_first=True), nn.Dropout(0.5)
        self.conv, self.head = nn.Conv1d(8, 8, 3), nn.Linear(8, 4)
        self.left = [runs]  # a list, because numbers in attributes are restored

    def forward(self, x: Tensor) -> Tensor:
        self.left[0] -= 1
        if self.left[0] < 0:
            raise RuntimeError("no more")
        return self.head(self.conv(self.drop(self.rnn(self.stem(x))[0]).mT).mean(-1))


@pytest.mark.slow
@pytest.mark.parametrize("runs", [0, 1, 5, 13, 40, 10**6])
@pytest.mark.parametrize("caller", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_module_is_as_it_was_wherever_a_run_of_it_fails(runs: int, caller: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model = Raising(runs).bfloat16()
    model.conv.eval()
    model.head.requires_grad_(False)
    model.stem.weight.grad = torch.ones_like(model.stem.weight)
    model.rnn.weight_ih_l0.grad = torch.ones_like(model.rnn.weight_ih_l0)
    seen: list[int] = []
    model.stem.register_forward_hook(lambda *_: seen.append(1))
    with caller():
        batches = [torch.randn(2, 5, 8) for _ in range(8)]
        state = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        with left_as_it_was(model):
            if runs < 10**6:
                with pytest.raises((RuntimeError, BadInput), match="no more"):
                    compress(
                        model, keep=0.5, calibration=batches, calibration_settings=TWO_PASSES, prefer="size", bits=16
                    )
            else:
                small: Any = compress(
                    model, keep=0.5, calibration=batches, calibration_settings=TWO_PASSES, prefer="size", bits=16
                ).model
                assert {tensor.dtype for tensor in small.state_dict().values()} <= {torch.bfloat16, torch.int32}
                assert not any(tensor.is_inference() for tensor in (*small.parameters(), *small.buffers()))
                assert small.training
                assert not small.conv.training
                assert not any(parameter.requires_grad for parameter in small.head.parameters())
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == state


@pytest.mark.slow
def test_a_module_that_was_made_in_inference_mode_is_compressed() -> None:
    with torch.inference_mode():
        model = trained(Recurrent)
        small: Any = compress(
            model, keep=0.5, calibration=drawn(words), calibration_settings=TWO_PASSES, prefer="size", bits=16
        ).model
    small(words(2)).sum().backward()
    assert all(parameter.is_inference() for parameter in model.parameters())


def test_what_a_mobile_network_passes_through_is_said() -> None:
    report = compress(trained(mobile), keep=0.7, calibration="none", prefer="size")
    assert {layer.name: layer.skip for layer in report.skipped} == {"3": "depthwise"}
    assert "8" in {layer.name for layer in report.plan.layers}  # of 4 groups
