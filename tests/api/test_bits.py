"""`bits`: what is asked for is what is stored, in bytes, in plans, and in models that run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from compressor import compress, inspect, plan, restore
from compressor.errors import BadInput
from tests.lowrank.started import SEED, trained


def perceptron(*, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48), nn.ReLU(), nn.Linear(48, 10)).to(dtype)


def saved(tmp_path: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    save_file(perceptron(dtype=dtype).state_dict(), tmp_path / "dense.safetensors")
    return tmp_path / "dense.safetensors"


def test_errors_are_predicted_as_they_are_stored(tmp_path: Path) -> None:
    source = saved(tmp_path)
    predicted, made = plan(source, bits=4), compress(source, bits=4, output=tmp_path / "a.safetensors").plan
    assert [layer.form for layer in made.layers] == ["dense@4", "dense@4", "dense@4"]
    assert [layer.error for layer in predicted.layers] == pytest.approx(
        [layer.error for layer in made.layers], rel=1e-6
    )
    assert all(0.02 < layer.error < 0.2 for layer in made.layers)


@pytest.mark.parametrize("bits", [8, 3])
def test_what_is_stored_has_the_bits_and_is_near_the_model(bits: int, tmp_path: Path) -> None:
    source = saved(tmp_path)
    small = compress(source, bits=bits, output=tmp_path / "a.safetensors")
    assert small.parameters.after == small.parameters.before
    tensors = load_file(tmp_path / "a.safetensors")
    assert tensors["0.weight_packed"].shape == (96, 2 * bits)
    restore(tmp_path / "a.safetensors", output=tmp_path / "b.safetensors")
    dense = perceptron()
    dense.load_state_dict(load_file(tmp_path / "b.safetensors"))
    inputs = torch.randn(20, 64)
    with torch.no_grad():
        expected, found = perceptron()(inputs), dense(inputs)
    assert 0 < (found - expected).norm() < {8: 0.05, 3: 0.6}[bits] * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0.6, 0.1])
def test_a_share_is_of_the_bytes_in_sixteen_bits(keep: float, tmp_path: Path) -> None:
    source = saved(tmp_path, dtype=torch.bfloat16)
    small = compress(source, bits="auto", keep=keep, output=tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    stored = sum(each.numel() * each.element_size() for name, each in tensors.items() if "bias" not in name)
    assert stored <= keep * 2 * small.plan.eligible_before
    assert small.plan.quantized > 0


def test_a_size_is_that_of_the_file(tmp_path: Path) -> None:
    source = saved(tmp_path)
    small = compress(source, bits="8,4", max_size=9000, output=tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_size == small.bytes.after <= 9000
    assert {layer.bits for layer in small.plan.layers} <= {16, 8, 4}


def test_what_each_width_would_lose_is_measured(tmp_path: Path) -> None:
    source = saved(tmp_path)
    found = inspect(source, bits="8,4,2")
    for layer, planned in zip(found.layers, plan(source, bits=8).layers, strict=True):
        errors = [each["error"] for each in layer.to_dict()["quantized"]]
        assert [each["bits"] for each in layer.to_dict()["quantized"]] == [8, 4, 2]
        assert errors == sorted(errors)
        assert errors[0] == pytest.approx(planned.error, rel=1e-6)
    assert "quantized" not in inspect(source, bits=16).layers[0].to_dict()


def test_an_edited_plan_is_made_as_it_states(tmp_path: Path) -> None:
    source, path = saved(tmp_path), tmp_path / "plan.json"
    document = plan(source, bits=8).to_dict()
    first, second, third = document["layers"]
    first |= {"form": "plain", "rank": 5, "bits": 4}
    second |= {"bits": 2, "group_size": 32, "zero_points": True}
    third |= {"rank": None, "bits": 16}
    path.write_text(json.dumps(document))
    small = compress(source, plan=path, output=tmp_path / "a.safetensors")
    assert [(layer.form, layer.rank) for layer in small.plan.layers] == [
        ("plain@4", 5),
        ("dense@2g32z", 0),
        ("dense", None),
    ]
    again = compress(source, plan=small.plan, output=tmp_path / "b.safetensors")
    assert again.plan.layers == small.plan.layers
    one, other = (load_file(tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
    assert all(torch.equal(one[name], other[name]) for name in one | other)


@pytest.mark.slow
def test_calibrated_layers_may_take_any_bits_where_nothing_is_said_of_them() -> None:
    torch.manual_seed(0)
    batches = list(torch.randn(48, 64).split(8))
    asked: Any = {"keep": 0.2, "calibration": batches, "effort": "fast"}
    unsaid, any_width, none = (
        compress(perceptron(), **asked, **given) for given in ({}, {"bits": "auto"}, {"bits": 16, "prefer": "size"})
    )
    assert unsaid.plan == any_width.plan
    assert unsaid.plan.quantized > 0
    assert unsaid.bits == (8, 7, 6, 5, 4, 3, 2)
    said = "in each layer 16, 8, 7, 6, 5, 4, 3, or 2, whichever loses least for its bytes"
    assert said in " ".join(str(unsaid).split())
    assert (none.plan.quantized, none.bits) == (0, ())


def test_without_calibration_sixteen_bits_are_what_there_is(tmp_path: Path) -> None:
    source = saved(tmp_path)
    compress(source, keep=0.5, output=tmp_path / "a.safetensors")
    compress(source, keep=0.5, bits=16, output=tmp_path / "b.safetensors")
    one, other = (load_file(tmp_path / name) for name in ("a.safetensors", "b.safetensors"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_embeddings_are_quantized_only_where_they_are_asked_for() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(300, 64), nn.Linear(64, 64))
    forms = {layer.name: layer.form for layer in plan(model, bits=8).layers}
    assert forms == {"1": "dense@8"}
    forms = {layer.name: layer.form for layer in plan(model, bits=8, embeddings=True).layers}
    assert forms == {"0": "dense@8", "1": "dense@8"}
    (words, _) = plan(model, bits=3, embeddings=True).layers
    assert (words.rank, words.reason) == (None, "an embedding has no form in 3 bits")


@pytest.mark.slow
def test_the_smallest_within_a_drop_may_be_quantized() -> None:
    torch.manual_seed(0)
    model, inputs = perceptron(), torch.randn(600, 64)
    data = (inputs, model(inputs).argmax(1))
    small = compress(model, bits="8,4", max_drop=0.2, data=data, calibration="none", allow_miss=True)
    search = small.plan.search
    assert search is not None
    assert small.plan.quantized > 0
    assert min(trial.keep for trial in search.trials) < 0.5
    assert small.model is not None


def test_what_training_wrote_is_quantized_too() -> None:
    model, _ = trained(layers)
    given: Any = {"initial": SEED, "factory": layers}
    planned = plan(model, keep=0.1, calibration="none", prefer="size", **given)
    forms = {"0": ("initial+dense@4", 0), "2": ("initial+plain@8", 2)}
    stated = [replace(each, form=forms[each.name][0], rank=forms[each.name][1]) for each in planned.layers]
    small = compress(model, plan=replace(planned, layers=tuple(stated)), **given)
    for layer in small.plan.layers:
        assert (layer.form, layer.rank) == forms[layer.name]
        assert layer.share is not None
        assert 0 < layer.error < {4: 0.06, 8: 0.01}[layer.bits]
    assert isinstance(small.model, nn.Module)
    inputs = torch.randn(8, 96)
    with torch.no_grad():
        expected, found = model(inputs), small.model(inputs)
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 64))


@pytest.mark.slow
def test_a_tolerance_is_kept_in_the_fewest_bytes() -> None:
    model = perceptron()
    found = plan(model, bits="auto", tolerance=0.03).layers
    assert all(layer.error <= 0.03 for layer in found)
    assert {layer.bits for layer in found} <= {5, 6}
    assert all(layer.parameters < 0.5 * layer.parameters_before for layer in found)


def test_without_a_size_a_width_needs_no_other_budget() -> None:
    with pytest.raises(BadInput, match="shares a size"):
        compress(perceptron(), bits="auto", calibration=torch.randn(8, 64))
