"""Grouped pairs as layers, in files, and in a network like those that have them: one pair a group, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor import BadInput, TrainingRecipe, compress, evaluate, inspect, restore
from compressor.forms import LowRankConvolution
from compressor.model import load_model
from compressor.planning import Budget, LayerPlan, Plan
from tests.lowrank.test_convolutions import CONVOLUTIONS, inputs_of, numbers


def planned(pairs: dict[str, tuple[str, int]]) -> Plan:
    """A plan that gives the named layers a form and a rank."""
    layers = (LayerPlan(name, (0, 0), "", rank, form, 0, 0.0, "") for name, (form, rank) in pairs.items())
    return Plan("", None, Budget("plan"), tuple(layers))


@st.composite
def grouped_convolutions(draw: st.DrawFn) -> nn.Module:
    sides = draw(st.integers(1, 3))
    small = st.tuples(*[st.integers(1, 3)] * sides)
    padding: Any = draw(st.sampled_from(["same", "valid", "numbers"]))
    stride = (1,) * sides if padding == "same" else draw(small)
    if padding == "numbers":
        padding = draw(st.tuples(*[st.integers(0, 3)] * sides))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    groups = draw(st.integers(2, 3))
    return CONVOLUTIONS[sides - 1](
        groups * draw(st.integers(2, 4)), groups * draw(st.integers(2, 4)), draw(small), stride=stride,
        padding=padding, dilation=draw(st.tuples(*[st.integers(1, 2)] * sides)), padding_mode=mode,
        bias=draw(st.booleans()), groups=groups, dtype=torch.float64,
    )  # fmt: skip


@settings(max_examples=40)
@given(grouped_convolutions(), st.booleans(), st.integers(0, 2**31))
def test_at_full_rank_it_is_the_dense_convolution_whatever_its_geometry(dense: Any, batched: bool, seed: int) -> None:
    x = inputs_of(dense, batched=batched, seed=seed)
    columns = dense.weight[0].numel()
    rank = min(dense.out_channels // dense.groups, columns)
    small = compress(dense, plan=planned({"": ("grouped", rank)})).model
    assert isinstance(small, LowRankConvolution)
    biases = 0 if dense.bias is None else dense.out_channels
    assert numbers(small) == rank * (dense.out_channels + dense.groups * columns) + biases
    torch.testing.assert_close(small(x), dense(x), rtol=1e-10, atol=1e-10)


@settings(max_examples=40)
@given(grouped_convolutions(), st.integers(1, 2), st.integers(0, 2**31))
def test_below_full_rank_each_group_has_the_nearest_kernel(dense: Any, rank: int, seed: int) -> None:
    torch.manual_seed(seed)
    dense.weight.data = torch.randn_like(dense.weight)
    small = compress(dense, plan=planned({"": ("grouped", rank)})).model
    assert small is not None
    blocks = dense.weight.detach().flatten(1).unflatten(0, (dense.groups, -1))
    left, values, right = torch.linalg.svd(blocks, full_matrices=False)
    nearest = (left[..., :rank] * values[:, None, :rank]) @ right[:, :rank]
    x = inputs_of(dense, batched=True, seed=seed)
    dense.weight.data = nearest.reshape(dense.weight.shape)
    torch.testing.assert_close(small(x), dense(x), rtol=1e-8, atol=1e-8)


def build() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(),
        nn.Conv2d(12, 24, (3, 5), stride=2, padding=2, groups=3, bias=False), nn.ReLU(),
        nn.Conv2d(24, 24, 3, groups=24), nn.ReLU(),
        nn.Conv2d(24, 2, 1, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


def file_of(dense: nn.Module, path: Path) -> Path:
    save_file(dense.state_dict(), path)
    return path


def test_a_file_holds_two_convolutions_counts_them_and_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = build()
    path = file_of(dense, tmp_path / "model.safetensors")
    chosen = planned({"2": ("grouped", 3)})
    report = compress(path, output=tmp_path / "small.safetensors", plan=chosen, factory=build)
    tensors = load_file(tmp_path / "small.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith("2.")} == {
        "2.weight": (0,), "2.down.weight": (9, 4, 3, 5), "2.up.weight": (24, 3, 1, 1),
    }  # fmt: skip
    [pair] = [layer for layer in report.plan.layers if layer.name == "2"]
    assert pair.parameters == 3 * (24 + 12 * 15)
    assert pair.parameters == sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("2."))
    assert report.bytes.after == (tmp_path / "small.safetensors").stat().st_size
    with safe_open(tmp_path / "small.safetensors", "pt") as file:
        record = json.loads(file.metadata()["compressor"])
    assert record["layers"]["2"] == {"rank": 3, "form": "grouped", "kind": "grouped convolution"}

    down, up = tensors["2.down.weight"].flatten(1), tensors["2.up.weight"].flatten(1)
    kernel = torch.cat([u @ d for u, d in zip(up.chunk(3), down.chunk(3), strict=True)])
    weight = dense[2].weight.detach()
    assert pair.error == pytest.approx(float((kernel - weight.flatten(1)).norm() / weight.norm()), rel=1e-4)
    in_memory = compress(dense, plan=chosen).model
    assert in_memory is not None
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(load_model(tmp_path / "small.safetensors", build)(x), in_memory(x))

    save_file(tensors, tmp_path / "bare.safetensors")  # no metadata: shapes alone say what it is
    for name in ("small", "bare"):
        place = tmp_path / f"{name}.safetensors"
        restore(place, output=tmp_path / f"{name}-back.safetensors")
        back = load_file(tmp_path / f"{name}-back.safetensors")
        assert {name: tensor.shape for name, tensor in back.items()} == {
            name: tensor.shape for name, tensor in dense.state_dict().items()
        }
        torch.testing.assert_close(back["2.weight"].flatten(1), kernel)
        assert torch.equal(load_model(place, build)(x), in_memory(x))


@pytest.mark.parametrize(("form", "rank"), [("grouped@8", 3), ("dense@4", 0), ("dense@3", 2)])
def test_integers_of_groups_come_back_with_and_without_metadata(form: str, rank: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = build()
    path = file_of(dense, tmp_path / "model.safetensors")
    small = compress(path, output=tmp_path / "small.safetensors", plan=planned({"2": (form, rank)}), factory=build)
    assert small.output is not None
    save_file(load_file(small.output), tmp_path / "bare.safetensors")
    x = torch.randn(2, 1, 8, 8)
    expected = load_model(small.output, build)(x)
    assert 0 < float((expected - dense(x)).detach().norm()) < 0.5 * float(dense(x).detach().norm())
    for place in (small.output, tmp_path / "bare.safetensors"):
        torch.testing.assert_close(load_model(place, build)(x), expected, rtol=1e-5, atol=1e-6)
        restored = restore(place, output=tmp_path / "back.safetensors", overwrite=True)
        twin = build()
        twin.load_state_dict(load_file(restored.output))
        torch.testing.assert_close(twin(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        ({"2.down.weight": (10, 4, 3, 5)}, "do not fit together"),
        ({"2.up.weight": (25, 3, 1, 1)}, "do not fit together"),
        ({"2.up.weight": (24, 3, 1, 2)}, "do not fit together"),
        ({"2.down.weight": (3, 4, 3, 5)}, "do not fit together"),
    ],
)
def test_factors_that_make_no_groups_are_refused(
    shapes: dict[str, tuple[int, ...]], named: str, tmp_path: Path
) -> None:
    path = file_of(build(), tmp_path / "model.safetensors")
    compress(path, output=tmp_path / "small.safetensors", plan=planned({"2": ("grouped", 3)}), factory=build)
    with safe_open(tmp_path / "small.safetensors", "pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / "small.safetensors") | {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "small.safetensors", metadata=metadata)
    with pytest.raises(BadInput, match=named):
        restore(tmp_path / "small.safetensors", output=tmp_path / "back.safetensors")
    assert not (tmp_path / "back.safetensors").exists()


@pytest.mark.parametrize(
    ("form", "rank", "named"),
    [("channel", 2, "channel"), ("grouped", 9, "its matrix is 8 x 60"), ("dense@4", 9, "its matrix is 8 x 60")],
)
def test_plans_of_what_groups_do_not_have_are_refused(form: str, rank: int, named: str) -> None:
    with pytest.raises(BadInput, match=named):
        compress(build(), plan=planned({"2": (form, rank)}))


def test_what_no_pair_makes_smaller_is_passed_and_said() -> None:
    dense = build()
    found = {layer.layer.name: layer.layer.skip for layer in inspect(dense).layers}
    assert found["2"] is None
    assert found["4"] == "depthwise"
    assert "one output channel each" in (found["6"] or "")
    small = compress(dense, keep=0.5, prefer="size")
    assert {layer.name for layer in small.plan.layers} == {"0", "2"}
    # Two channels to two for each group: below break-even there is no rank.
    tiny = compress(nn.Sequential(nn.Conv2d(8, 8, 1, groups=4), nn.Flatten(), nn.Linear(32, 32)), keep=0.5)
    assert {layer.name: layer.form for layer in tiny.plan.layers}["0"] == "dense"


def test_a_pair_of_a_compressed_file_stays_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = file_of(build(), tmp_path / "model.safetensors")
    compress(path, output=tmp_path / "small.safetensors", plan=planned({"2": ("grouped", 3)}), factory=build)
    given: Any = {"plan": planned({"0": ("channel", 2)}), "factory": build}
    again = compress(tmp_path / "small.safetensors", output=tmp_path / "again.safetensors", **given)
    assert [layer.name for layer in again.plan.layers] == ["0"]
    before, after = load_file(tmp_path / "small.safetensors"), load_file(tmp_path / "again.safetensors")
    own = [name for name in before if name.startswith("2.")]
    assert len(own) == 3
    assert all(torch.equal(after[name], before[name]) for name in own)
    for name in ("small", "again"):
        restore(tmp_path / f"{name}.safetensors", output=tmp_path / f"{name}-back.safetensors")
    found = [load_file(tmp_path / f"{name}-back.safetensors")["2.weight"] for name in ("small", "again")]
    assert torch.equal(*found)


def test_what_a_fine_tune_changed_of_groups_is_stored_in_full(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = build()
    file_of(base, tmp_path / "base.safetensors")
    with torch.no_grad():
        base[2].weight += 0.01 * torch.randn_like(base[2].weight)
        base[0].weight += (torch.randn(12, 1) @ torch.randn(1, 9)).view_as(base[0].weight)
    tuned = file_of(base, tmp_path / "tuned.safetensors")
    compress(
        tuned, base=tmp_path / "base.safetensors", output=tmp_path / "difference.safetensors",
        plan=planned({"0": ("channel", 1)}), factory=build,
    )  # fmt: skip
    assert torch.equal(load_file(tmp_path / "difference.safetensors")["2.weight"], base[2].weight)


@pytest.mark.parametrize("bits", [16, 4])
def test_how_much_of_the_initialization_survives_says_nothing_of_groups(bits: int) -> None:
    training: Any = {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 0.01, "momentum": 0.0, "steps": 5000}
    recipe = TrainingRecipe(schedule="constant", batch_size=8, **training)
    [first, grouped] = [each for each in inspect(build(), recipe=recipe, bits=bits).layers if each.singular_values]
    assert (first.layer.name, grouped.layer.name) == ("0", "2")
    assert first.initialization.above_edge is not None
    assert grouped.initialization.share == first.initialization.share
    assert grouped.initialization.above_edge is None
    assert "groups" in grouped.initialization.reason
    assert len(grouped.singular_values) == 8


class Bottleneck(nn.Module):
    """The block of ResNeXt (Xie et al., CVPR 2017)."""

    def __init__(self, size: int, width: int, groups: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(size, width, 1, bias=False), nn.Conv2d(width, size, 1, bias=False)
        self.grouped = nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(each) for each in (width, width, size))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.norms[0](self.reduce(x)))
        hidden = torch.relu(self.norms[1](self.grouped(hidden)))
        return torch.relu(x + self.norms[2](self.expand(hidden)))


class ResNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1)
        self.blocks = nn.Sequential(Bottleneck(32, 64, 4), Bottleneck(32, 64, 8))
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


def trained() -> tuple[ResNeXt, Tensor, Tensor]:
    """A network that tells ten noisy patterns apart, and more of them."""
    torch.manual_seed(0)
    patterns, labels = torch.randn(10, 1, 8, 8), torch.randint(10, (512,))
    images = patterns[labels] + 0.8 * torch.randn(512, 1, 8, 8)
    model = ResNeXt()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    for _ in range(3):
        for batch in torch.randperm(256).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval(), images[256:], labels[256:]


@pytest.mark.slow
def test_a_network_with_groups_is_compressed_evaluated_and_restored(tmp_path: Path) -> None:
    model, images, labels = trained()
    path = file_of(model, tmp_path / "model.safetensors")
    for name, part in (("fit", slice(0, 128)), ("report", slice(128, None))):
        np.savez(tmp_path / f"{name}.npz", inputs=images[part].numpy(), labels=labels[part].numpy())
    small, losses = tmp_path / "small.safetensors", []
    for calibration in ({"calibration": "none"}, {"calibration": tmp_path / "fit.npz", "effort": "fast"}):
        options: Any = {"factory": ResNeXt, "keep": 0.5, "bits": 16, "prefer": "size", **calibration}
        report = compress(path, output=small, data=tmp_path / "report.npz", overwrite=True, **options)
        forms = {layer.name: layer.form for layer in report.plan.layers if layer.name.endswith("grouped")}
        assert set(forms) == {"blocks.0.grouped", "blocks.1.grouped"}
        assert "grouped" in forms.values()
        found = evaluate(small, factory=ResNeXt, data=tmp_path / "report.npz")
        restored = restore(small, output=tmp_path / "back.safetensors", overwrite=True)
        twin = ResNeXt().eval()
        twin.load_state_dict(load_file(restored.output))
        with torch.no_grad():
            logits = twin(images[128:])
            outputs = load_model(small, ResNeXt).eval()(images[128:])
            torch.testing.assert_close(outputs, logits, rtol=1e-3, atol=1e-3)
        losses.append(float(nn.functional.cross_entropy(logits, labels[128:])))
        accuracy = float((logits.argmax(1) == labels[128:]).float().mean())
        assert found.quality.after == pytest.approx(accuracy, abs=1e-6)
    without, calibrated = losses
    assert calibrated < without
