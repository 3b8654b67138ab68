"""ONNX files: what torch computes, for other batch sizes and lengths, and each pair still two nodes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from compressor import BadInput, Export, compress, export
from compressor.cli.run import run
from compressor.exporting.onnx import traced_inputs
from compressor.forms import LowRankConvolution
from compressor.model import open_runnable
from tests.lowrank.architectures import ARCHITECTURES

pytestmark = pytest.mark.slow

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

NETWORKS = """
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 5))

def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=2), nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2), nn.Flatten(), nn.Linear(216, 5)
    )
"""


@pytest.fixture
def networks(tmp_path: Path) -> Path:
    path = tmp_path / "networks.py"
    path.write_text(NETWORKS)
    return path


def computed(path: Path, *inputs: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    [found] = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
    return torch.from_numpy(found)


def products(path: Path) -> list[tuple[str, tuple[int, ...]]]:
    """The products in a graph: the kind of node and the shape of the stored matrix or kernel."""
    graph = onnx.load(path).graph
    shapes = {each.name: tuple(each.dims) for each in graph.initializer}
    return [
        (node.op_type, shapes[stored[0]])
        for node in graph.node
        if node.op_type in ("MatMul", "Gemm", "Conv") and (stored := [name for name in node.input if name in shapes])
    ]


def test_a_perceptron_of_a_file(networks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, Any] = {}
    exec(NETWORKS, namespace)
    torch.manual_seed(0)
    dense = namespace["mlp"]()
    save_file(dense.state_dict(), tmp_path / "mlp.safetensors")
    factory = f"{networks}:mlp"
    small = compress(dense, keep=0.5, form="plain", prefer="size").model
    compress(tmp_path / "mlp.safetensors", output=tmp_path / "small.safetensors", keep=0.5, form="plain")
    assert run(["export", str(tmp_path / "small.safetensors"), "--to", "onnx", "--model", factory]) == 0
    assert "outputs differ from torch's by" in capsys.readouterr().out
    path = tmp_path / "small.onnx"
    inputs = torch.rand(9, 24)
    assert small is not None
    with torch.no_grad():
        assert (computed(path, inputs) - small(inputs)).abs().max() <= 1e-5
    expected = []
    for layer in small:
        parts = (layer.down, layer.up) if hasattr(layer, "down") else (layer,) if isinstance(layer, nn.Linear) else ()
        expected += [("Gemm", tuple(part.weight.shape)) for part in parts]
    assert len(expected) > 3
    assert products(path) == expected


@pytest.fixture(scope="module")
def exported(small_llama: Path) -> Export:
    return export(small_llama, to="onnx", output=small_llama.with_name("llama.onnx"))


def test_the_file_is_weights_and_graph_and_names_no_path(exported: Export) -> None:
    path = Path(exported.output)
    model = onnx.load(path)
    weights = sum(len(each.raw_data) for each in model.graph.initializer)
    assert weights > 0
    assert path.stat().st_size < weights + 600 * len(model.graph.node)
    assert str(Path(torch.__file__).parents[1]).encode() not in path.read_bytes()
    assert b".py" not in path.read_bytes()


def test_convolutions_of_the_one_size_that_goes_through(networks: Path, tmp_path: Path) -> None:
    namespace: dict[str, Any] = {}
    exec(NETWORKS, namespace)
    torch.manual_seed(0)
    dense = namespace["convolutions"]()
    save_file(dense.state_dict(), tmp_path / "dense.safetensors")
    factory = f"{networks}:convolutions"
    compress(tmp_path / "dense.safetensors", output=tmp_path / "small.safetensors", keep=0.5, factory=factory)
    small = compress(dense, keep=0.5, prefer="size").model
    path = tmp_path / "small.onnx"
    with pytest.raises(BadInput, match="torch cannot export"):
        export(tmp_path / "small.safetensors", to="onnx", output=path, factory=factory, input_shape=(3, 5))
    assert not path.exists()
    export(tmp_path / "small.safetensors", to="onnx", output=path, factory=factory)  # 8x8 goes through
    images = torch.rand(5, 3, 8, 8)
    assert small is not None
    with torch.no_grad():
        assert (computed(path, images) - small(images)).abs().max() <= 1e-5
    kernels = [tuple(part.weight.shape) for layer in small if hasattr(layer, "down") for part in (layer.down, layer.up)]
    found = [shape for kind, shape in products(path) if kind == "Conv"]
    kernels = [shape for shape in kernels if len(shape) == 4]
    assert len(kernels) >= 4
    assert any(isinstance(layer, LowRankConvolution) and layer.groups == 2 for layer in small)
    assert set(kernels) <= set(found)


def test_a_language_model(small_llama: Path, exported: Export) -> None:
    import transformers

    assert exported.difference is not None
    assert exported.difference <= 1e-5
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(small_llama).eval()
    tokens = torch.randint(3, 60, (3, 13))
    mask = torch.ones_like(tokens)
    mask[0, -4:] = 0
    with torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=mask).logits
    assert (computed(Path(exported.output), tokens, mask) - expected).abs().max() <= 1e-5
    stored = [tuple(sorted(shape)) for _, shape in products(Path(exported.output))]
    layer = model.model.layers[0].mlp.gate_proj
    pair = [tuple(sorted(part.weight.shape)) for part in (layer.down, layer.up)]
    dense = tuple(sorted((layer.out_features, layer.in_features)))
    assert all(factor in stored for factor in pair)
    assert dense not in stored


def image_model(size: int | None) -> nn.Module:
    """A tiny image model of three channels, whose configuration says the size of the images or not."""
    import transformers

    if size is None:
        config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], num_channels=3)
        return transformers.ResNetForImageClassification(config)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=size, patch_size=4))


@pytest.mark.parametrize(
    ("size", "shape", "words"),
    [
        (8, (3, 9, 9), "3x9x9 is not that of the model, 3x8x8"),
        (None, (8, 8), "8x8 is not that of an image of 3 channels; say it as 3xHEIGHTxWIDTH"),
        (None, (1, 8, 8), "1x8x8 is not that of an image of 3 channels"),
    ],
)
def test_a_shape_that_a_transformers_model_does_not_take(size: int | None, shape: Any, *, words: str) -> None:
    model = open_runnable(image_model(size))
    with pytest.raises(BadInput, match=words):
        traced_inputs(model, shape)
    [images] = traced_inputs(model, (3, 8, 8)).values()
    assert images.shape[1:] == (3, 8, 8)


def test_a_text_has_no_shape(small_llama: Path) -> None:
    with pytest.raises(BadInput, match="not for text"):
        traced_inputs(open_runnable(small_llama), (7,))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("vit-1.5b", "vit-1.5b.onnx"),
        ("v1.safetensors", "v1.safetensors.onnx"),
        ("net-1.5.safetensors", "net-1.5.onnx"),
        ("net-1.5.safetensors.index.json", "net-1.5.onnx"),
    ],
)
def test_a_dot_in_a_name_is_no_ending(tmp_path: Path, source: str, target: str) -> None:
    weights = {"0.weight": torch.rand(8, 8)}
    place = tmp_path / source
    if source.endswith(".index.json"):
        save_file(weights, tmp_path / "shard.safetensors")
        place.write_text(json.dumps({"weight_map": {"0.weight": "shard.safetensors"}}))
    elif target == f"{source}.onnx":
        place.mkdir()
        save_file(weights, place / "model.safetensors")
    else:
        save_file(weights, place)
    exported = export(place, to="onnx", factory=lambda: nn.Sequential(nn.Linear(8, 8, bias=False)))
    assert exported.output == str(tmp_path / target)


def test_an_error_is_all_that_is_written_to_standard_error(small_llama: Path, tmp_path: Path) -> None:
    # In a process of its own: what libraries log when they are imported, they log once.
    command = "import sys; from compressor.cli.run import run; sys.exit(run(sys.argv[1:]))"
    asked = ["export", str(small_llama), "--to", "onnx", "--input-shape", "3x8", "-o", str(tmp_path / "a.onnx"), "-q"]
    ran = subprocess.run([sys.executable, "-c", command, *asked], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert re.fullmatch(r"error: --input-shape is not for text.*\n", ran.stderr)


def test_a_missing_extra_is_named(small_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    known = importlib.import_module

    def without(name: str, *rest: Any) -> Any:
        if name == "onnxscript":
            raise ImportError(name)
        return known(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(BadInput, match=r"needs onnxscript.*compressor\[onnx\]"):
        export(small_llama, to="onnx", output=tmp_path / "llama.onnx")


def test_requests_that_are_bad(small_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(small_llama)
    assert run(["export", folder, "--to", "onnx", "-o", str(tmp_path / "folder")]) == 2
    assert run(["export", folder, "--to", "onnx", "--input-shape", "3x", "-o", str(tmp_path / "a.onnx")]) == 2
    (tmp_path / "there.onnx").write_bytes(b"")
    assert run(["export", folder, "--to", "onnx", "-o", str(tmp_path / "there.onnx")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert ["name it with .onnx" in errors[0], "3x224x224" in errors[1], "--overwrite" in errors[2]] == [True] * 3
    encoder_decoder = open_runnable(ARCHITECTURES["t5"].dense())
    with pytest.raises(BadInput, match="takes inputs that this exporter cannot make"):
        traced_inputs(encoder_decoder, None)
    with pytest.raises(BadInput, match="`input_shape` 3x224x224"):
        traced_inputs(open_runnable(nn.Sequential(nn.LSTM(3, 4))), None)
