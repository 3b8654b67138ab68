"""Spatial pairs as layers and in files: the dense convolution in two, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from compressor import BadInput, compress, restore
from compressor.forms import LowRankConvolution, SpatialConvolution
from compressor.lowrank import low_rank_layer
from compressor.model import load_model
from compressor.planning import Budget, LayerPlan, Plan


def planned(pairs: dict[str, tuple[str, int]]) -> Plan:
    """A plan that gives the named layers a form and a rank."""
    layers = (LayerPlan(name, (0, 0), "", rank, form, 0, 0.0, "") for name, (form, rank) in pairs.items())
    return Plan("", None, Budget("plan"), tuple(layers))


@st.composite
def convolutions(draw: st.DrawFn) -> nn.Conv2d:
    sides = st.integers(2, 4)
    kernel = (draw(sides), draw(sides))
    padding: Any = draw(st.sampled_from(["same", "valid", "numbers"]))
    small = st.integers(1, 3)
    stride = (1, 1) if padding == "same" else (draw(small), draw(small))
    if padding == "numbers":
        padding = (draw(st.integers(0, 3)), draw(st.integers(0, 3)))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    return nn.Conv2d(
        draw(st.integers(1, 4)), draw(st.integers(1, 4)), kernel, stride=stride, padding=padding, dilation=dilation,
        padding_mode=mode, bias=draw(st.booleans()), dtype=torch.float64,
    )  # fmt: skip


@settings(max_examples=60)
@given(
    dense=convolutions(),
    height=st.integers(7, 11),
    width=st.integers(7, 11),
    batched=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_at_full_rank_it_is_the_dense_convolution_whatever_its_geometry(
    dense: nn.Conv2d, height: int, width: int, *, batched: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    c, k_h, k_w = dense.weight.shape[1:]
    x = torch.randn(*([2] if batched else []), c, height, width, dtype=torch.float64)
    rank = min(dense.out_channels * k_w, c * k_h)
    small = compress(dense, plan=planned({"": ("spatial", rank)})).model
    assert isinstance(small, SpatialConvolution)
    torch.testing.assert_close(small(x), dense(x), rtol=1e-9, atol=1e-9)


def test_below_full_rank_it_is_the_convolution_with_the_kernel_that_its_factors_give() -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(5, 6, (3, 4), stride=(2, 1), padding=(2, 1), padding_mode="circular", dtype=torch.float64)
    small = compress(dense, plan=planned({"": ("spatial", 4)})).model
    assert small is not None
    down, up = small.down.weight[..., 0], small.up.weight[:, :, 0]  # type: ignore[union-attr, index]
    truncated = nn.Conv2d(5, 6, (3, 4), stride=(2, 1), padding=(2, 1), padding_mode="circular", dtype=torch.float64)
    truncated.load_state_dict({"weight": torch.einsum("orj,rci->ocij", up, down), "bias": dense.bias})
    x = torch.randn(2, 5, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(small(x), truncated(x), rtol=1e-9, atol=1e-9)


def build() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(),
        nn.Conv2d(12, 16, (3, 5), stride=2, padding=2, bias=False), nn.ReLU(),
        nn.Conv2d(16, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


@pytest.mark.parametrize("factory", [build, None], ids=["architecture", "bare file"])
def test_a_file_holds_two_convolutions_counts_them_and_comes_back(factory: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = build()
    save_file(dense.state_dict(), tmp_path / "model.safetensors")
    chosen = planned({"2": ("spatial", 7), "4": ("channel", 3)})
    report = compress(tmp_path / "model.safetensors", output=tmp_path / "s.safetensors", plan=chosen, factory=factory)
    tensors = load_file(tmp_path / "s.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith("2.")} == {
        "2.weight": (0,), "2.down.weight": (7, 12, 3, 1), "2.up.weight": (16, 7, 1, 5),
    }  # fmt: skip
    [spatial] = [layer for layer in report.plan.layers if layer.name == "2"]
    assert spatial.parameters == sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("2."))
    assert report.bytes.after == (tmp_path / "s.safetensors").stat().st_size
    with safe_open(tmp_path / "s.safetensors", "pt") as file:
        record = json.loads(file.metadata()["compressor"])
    assert record["layers"]["2"] == {"rank": 7, "form": "spatial", "kind": "convolution"}

    kernel = torch.einsum("orj,rci->ocij", tensors["2.up.weight"][:, :, 0], tensors["2.down.weight"][..., 0])
    relative = float((kernel - dense[2].weight.detach()).norm() / dense[2].weight.detach().norm())
    assert spatial.error == pytest.approx(relative, rel=1e-4)

    in_memory = compress(dense, plan=chosen).model
    assert in_memory is not None
    assert isinstance(in_memory[2], SpatialConvolution)  # type: ignore[index]
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(load_model(tmp_path / "s.safetensors", build)(x), in_memory(x))

    restore(tmp_path / "s.safetensors", output=tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert {name: tensor.shape for name, tensor in back.items()} == {
        name: tensor.shape for name, tensor in dense.state_dict().items()
    }
    torch.testing.assert_close(back["2.weight"], kernel, rtol=1e-4, atol=1e-6)


def test_a_transformers_folder_loads_bit_equal_saves_again_and_restores(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=1, num_labels=5, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic"
    )
    dense = transformers.ResNetForImageClassification(config).eval()
    dense.save_pretrained(tmp_path / "dense")
    stage = "resnet.encoder.stages.{}.layers.0.layer.{}.convolution".format
    chosen = planned({stage(0, 0): ("spatial", 9), stage(0, 1): ("channel", 4), stage(1, 1): ("spatial", 11)})
    compress(tmp_path / "dense", output=tmp_path / "small", plan=chosen)
    said = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert {name: layer["form"] for name, layer in said["layers"].items()} == {
        stage(0, 0): "spatial",
        stage(0, 1): "channel",
        stage(1, 1): "spatial",
    }
    in_memory = compress(dense, plan=chosen).model
    assert in_memory is not None
    x = {"pixel_values": torch.rand(2, 1, 16, 16)}
    loaded = transformers.ResNetForImageClassification.from_pretrained(tmp_path / "small")
    kinds = [type(loaded.get_submodule(stage(*place))) for place in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert kinds == [SpatialConvolution, LowRankConvolution, nn.Conv2d, SpatialConvolution]
    with torch.no_grad():
        expected = in_memory(**x).logits
        assert torch.equal(loaded(**x).logits, expected)
        loaded.save_pretrained(tmp_path / "again")  # without our metadata: the shapes alone tell the forms
        again = transformers.ResNetForImageClassification.from_pretrained(tmp_path / "again")
        assert torch.equal(again(**x).logits, expected)
        restore(tmp_path / "again", output=tmp_path / "restored")
        restored = transformers.ResNetForImageClassification.from_pretrained(tmp_path / "restored")
        torch.testing.assert_close(restored(**x).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("down", "up"),
    [((3, 4, 3, 3), (5, 3, 1, 3)), ((3, 4, 3, 1), (5, 3, 3, 3)), ((3, 4, 3), (5, 3, 2)), ((3, 4, 3, 1), (5, 2, 1, 3))],
)
def test_factors_that_are_no_spatial_pair_are_refused(
    down: tuple[int, ...], up: tuple[int, ...], tmp_path: Path
) -> None:
    tensors = {"a.weight": torch.empty(0), "a.down.weight": torch.ones(down), "a.up.weight": torch.ones(up)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match="factors of a do not fit together"):
        restore(tmp_path / "model.safetensors")


@pytest.mark.parametrize("layer", [nn.Conv1d(2, 2, 3), nn.Conv3d(2, 2, 3), nn.Linear(2, 2)])
def test_only_a_two_dimensional_convolution_can_be_one(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match="two-dimensional"):
        low_rank_layer(layer, "spatial", 1)
