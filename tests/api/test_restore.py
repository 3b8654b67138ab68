"""What `restore` does with the state dict of a module that was compressed in memory, and so says nothing of itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor import BadInput, compress, export, restore
from compressor.cli.run import run
from compressor.model import load_model
from compressor.planning import Budget, LayerPlan, Plan


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 40, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.words(x)))


class Conv1D(nn.Module):
    """GPT-2's linear layer, which stores the transpose of its matrix."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def square_transposed() -> nn.Module:
    return nn.Sequential(Conv1D(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), Conv1D(16, 16))


def pointwise_transposed() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(12, 12, 1), nn.ReLU(), nn.Conv2d(12, 12, 1))


class Lookup(nn.Module):
    """An embedding of as many tokens as its largest rank, and a head that is tied to it and comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 8, bias=False)
        self.words, self.mix = nn.Embedding(8, 16), nn.Linear(16, 16)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.words(x)))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.again(torch.tanh(self.first(x)))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "square transposed": (square_transposed, lambda: torch.randn(3, 16)),
    "pointwise transposed": (pointwise_transposed, lambda: torch.randn(2, 12, 5, 5)),
    "tied, the head first": (Lookup, lambda: torch.randint(0, 8, (3, 5))),
    "one layer twice": (Twice, lambda: torch.randn(3, 16)),
}


def at_full_rank(model: nn.Module) -> nn.Module:
    """The model with every layer as a pair that computes what the layer does."""
    planned = compress(model, tolerance=1e-9, embeddings=True, dry_run=True, prefer="size").plan
    layers = tuple(
        LayerPlan(p.name, p.shape, p.kind, min(p.shape), "channel" if "conv" in p.kind else "plain", 0, 0.0, "")
        for p in planned.layers
    )
    small = compress(model, embeddings=True, plan=Plan("", None, Budget("plan"), layers)).model
    assert small is not None
    assert all(getattr(small.get_submodule(p.name), "rank", 0) == min(p.shape) for p in layers)
    return small


@pytest.mark.parametrize(
    ("name", "suffix"),
    [(name, ".pt") for name in MODELS]
    # Nothing in these shares its memory, which safetensors refuses.
    + [(name, ".safetensors") for name in ("square transposed", "pointwise transposed")],
)
def test_a_state_dict_says_itself_how_square_weights_are_laid_out(name: str, suffix: str, tmp_path: Path) -> None:
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    model, x = build(), inputs()
    small = at_full_rank(model)
    path = tmp_path / f"small{suffix}"
    if suffix == ".pt":
        torch.save(small.state_dict(), path)
    else:
        save_file(small.state_dict(), path)
    outputs = [
        restore(path, output=tmp_path / "restored.pt").output,
        restore(path, output=tmp_path / "checked.pt", factory=build).output,
        export(path, to="dense", output=tmp_path / "exported.pt", factory=build).output,
    ]
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(small(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(load_model(path, build)(x), expected, rtol=1e-4, atol=1e-4)
        for output in outputs:
            twin = build()
            twin.load_state_dict(torch.load(output, weights_only=True), strict=True)
            torch.testing.assert_close(twin(x), expected, rtol=1e-4, atol=1e-4)


def test_a_model_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    factory = tmp_path / "net.py"
    factory.write_text("from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Linear(16, 20))\n")
    save_file(nn.Sequential(nn.Linear(16, 16)).state_dict(), tmp_path / "dense.safetensors")
    small, output = tmp_path / "small.safetensors", tmp_path / "out.safetensors"
    compress(tmp_path / "dense.safetensors", output=small, keep=0.5)
    for verb in (["restore", str(small)], ["export", str(small), "--to", "dense"]):
        assert run([*verb, "--model", f"{factory}:build", "-o", str(output), "-q"]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert "the model that --model builds does not fit: 0.weight is 16 x 16 in the file" in line
        assert not output.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"to": "hf-remote", "factory": Twice}, "leave out `factory`"),
        ({"to": "hf-remote", "input_shape": (3, 8, 8)}, "leave out `input_shape`"),
        ({"to": "dense", "input_shape": (3, 8, 8)}, "leave out `input_shape`"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(options: dict, words: str, tmp_path: Path) -> None:
    save_file(nn.Sequential(nn.Linear(16, 16)).state_dict(), tmp_path / "dense.safetensors")
    compress(tmp_path / "dense.safetensors", output=tmp_path / "small.safetensors", keep=0.5)
    with pytest.raises(BadInput, match=words):
        export(tmp_path / "small.safetensors", output=tmp_path / "out", **options)


def test_a_file_that_was_compressed_without_its_code_restores_its_own_layout(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = {name: tensor.clone() for name, tensor in square_transposed().state_dict().items()}
    for name, tensor in dense.items():
        if name.endswith("weight"):
            tensor[4:] = 0  # of rank four
    save_file(dense, tmp_path / "dense.safetensors")
    compress(tmp_path / "dense.safetensors", output=tmp_path / "small.safetensors", keep=0.5)
    restore(tmp_path / "small.safetensors", output=tmp_path / "again.safetensors", factory=square_transposed)
    restored = load_file(tmp_path / "again.safetensors")
    for name, tensor in dense.items():
        torch.testing.assert_close(restored[name], tensor, rtol=1e-4, atol=1e-5)


class Generator(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.ConvTranspose2d(12, 12, 1), nn.ReLU(), nn.Conv2d(12, 12, 3))


def test_names_of_one_tensor_all_return(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tied()
    small = compress(model, keep=0.5, prefer="size").model
    assert small is not None
    torch.save(small.state_dict(), tmp_path / "small.pt")
    restore(tmp_path / "small.pt", output=tmp_path / "dense.pt")
    again = Tied()
    again.load_state_dict(torch.load(tmp_path / "dense.pt", weights_only=True), strict=True)
    x = torch.randint(0, 40, (3, 5))
    torch.testing.assert_close(again(x), small(x), rtol=1e-4, atol=1e-5)


def test_the_users_code_says_what_the_layers_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = compress(Generator(), keep=0.5, prefer="size").model
    assert small is not None
    torch.save(small.state_dict(), tmp_path / "small.pt")
    restore(tmp_path / "small.pt", output=tmp_path / "dense.pt", factory=Generator)
    again = Generator()
    again.load_state_dict(torch.load(tmp_path / "dense.pt", weights_only=True), strict=True)
    x = torch.randn(2, 12, 6, 6)
    torch.testing.assert_close(again(x), small(x), rtol=1e-4, atol=1e-5)


def test_a_module_is_restored_and_exported_to_a_file_that_is_named(tmp_path: Path) -> None:
    dense = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
    small = compress(dense, keep=0.5, prefer="size").model
    assert small is not None
    restored = restore(small, output=tmp_path / "dense.safetensors")
    exported = export(small, to="dense", output=tmp_path / "exported.safetensors")
    assert (restored.source, exported.source) == ("Sequential", "Sequential")
    x = torch.randn(3, 16)
    for written in (restored.output, exported.output):
        assert torch.allclose(load_model(written, lambda: dense).eval()(x), small(x), atol=1e-5)
    for verb in (restore, lambda model: export(model, to="dense")):
        with pytest.raises(BadInput, match="a module has no place beside it; name one with `output`") as refused:
            verb(small)
        assert refused.value.option == "output"
