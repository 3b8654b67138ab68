"""Models of plain PyTorch, as modules and as the files of strangers: what becomes smaller computes what it says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor import compress, restore
from compressor.cli.run import run
from compressor.evaluation import load_model


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


@pytest.mark.parametrize("name", MODELS)
def test_a_module_its_state_dict_and_its_file_are_one_model(name: str, tmp_path: Path) -> None:
    build, inputs = MODELS[name]
    model, x = trained(build), inputs()
    in_memory = compress(model, keep=0.6).model
    assert in_memory is not None
    path = saved(model, tmp_path / "model.safetensors")
    report = compress(path, keep=0.6, factory=build, output=tmp_path / "small.safetensors")
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
