"""Models that are compressed already, compressed again: the best pairs of a lower rank, and what is kept as it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressor import BadInput, compress, evaluate, inspect, load_model, open_checkpoint, plan, restore
from compressor.lowrank import LowRankSpec, stored_pairs
from compressor.lowrank.tensor_format import dense_weight
from tests.encodings import stored
from tests.encodings.stored import dense_folder, store
from tests.lowrank.architectures import ARCHITECTURES


class Network(nn.Module):
    """A layer of each kind that becomes a pair of its own matrix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.Embedding(40, 24)
        self.conv = nn.Conv1d(24, 20, 3, padding=1)
        self.turned = nn.ConvTranspose1d(20, 24, 3, padding=1)
        self.rnn = nn.GRU(24, 16, batch_first=True)
        self.fc = nn.Linear(16, 30)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.turned(self.conv(self.table(tokens).transpose(1, 2)).relu()).transpose(1, 2)
        found: Tensor = self.fc(self.rnn(hidden)[0])
        return found


TOKENS = torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(0))
FORMS = ["plain", "pivoted"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(Network().state_dict(), tmp_path / "dense.safetensors")
    return tmp_path / "dense.safetensors"


def small(file: Path, form: Any = "plain", keep: float = 0.7) -> Path:
    """The network, compressed once."""
    output = file.with_name(f"small-{form}.safetensors")
    compress(file, output=output, keep=keep, form=form, factory=Network, embeddings=True)
    return output


def matrices(path: Path) -> dict[str, Tensor]:
    """The dense weights that a file stands for, as `restore` writes them."""
    output = path.with_name(f"restored-{path.name}")
    restore(path, output=output, overwrite=True)
    return {name: tensor.double() for name, tensor in load_file(output).items()}


@torch.no_grad()
def outputs(path: Path) -> Tensor:
    found: Tensor = load_model(path, Network).eval()(TOKENS)
    return found


@pytest.mark.parametrize("form", FORMS)
def test_each_pair_is_the_nearest_of_its_rank_to_what_was_stored(file: Path, form: str) -> None:
    before = small(file, form)
    result = compress(before, output=file.with_name("again.safetensors"), keep=0.6, factory=Network, embeddings=True)
    stored, after, pairs = matrices(before), matrices(Path(str(result.output))), stored_pairs(open_checkpoint(before))
    assert result.plan.squeezed == len(pairs) > 4
    lowered = 0
    for layer in result.plan.layers:
        if layer.before is None or layer.rank is None:
            continue
        pair = pairs[layer.name]
        assert layer.form == pair.form
        assert layer.rank < pair.rank
        lowered += 1
        before_, after_ = (each[pair.tensor].flatten(1).numpy() for each in (stored, after))
        left, values, right = np.linalg.svd(before_, full_matrices=False)
        best = left[:, : layer.rank] * values[: layer.rank] @ right[: layer.rank]
        np.testing.assert_allclose(after_, best, atol=2e-6 * values[0])
        expected = np.linalg.norm(before_ - best) / np.linalg.norm(before_)
        assert layer.error == pytest.approx(expected, rel=1e-4)
    assert lowered > 3


def test_factors_are_not_multiplied_out(tmp_path: Path) -> None:
    side = 200_000  # 160 GB of them in float32
    torch.manual_seed(0)
    tensors = {"x.weight": torch.zeros(0), "x.down.weight": torch.randn(4, side), "x.up.weight": torch.randn(side, 4)}
    save_file(tensors, tmp_path / "small.safetensors")
    output = tmp_path / "smaller.safetensors"
    result = compress(tmp_path / "small.safetensors", output=output, keep=0.5, progress=lambda *_: None)
    assert [layer.rank for layer in result.plan.layers] == [2]
    up, down = tensors["x.up.weight"].double(), tensors["x.down.weight"].double()
    values = torch.linalg.svdvals(torch.linalg.qr(up).R @ torch.linalg.qr(down.T).R.T)
    expected = float((values[2:].square().sum() / values.square().sum()).sqrt())
    assert result.plan.layers[0].error == pytest.approx(expected, rel=1e-5)


def test_a_product_that_does_not_fit_into_memory_is_not_formed(tmp_path: Path) -> None:
    side = 3_000_000  # 9e12 numbers, more than machines hold
    tensors = {"x.weight": torch.zeros(0), "x.down.weight": torch.ones(1, side), "x.up.weight": torch.ones(side, 1)}
    save_file(tensors, tmp_path / "small.safetensors")
    refused = r"small\.safetensors: x stands for 3000000 x 3000000 numbers, which take .* of memory are free; use a"
    with pytest.raises(BadInput, match=refused):
        compress(tmp_path / "small.safetensors", output=tmp_path / "less.safetensors", bits=4)
    assert [each.name for each in tmp_path.iterdir()] == ["small.safetensors"]
    checkpoint = open_checkpoint(tmp_path / "small.safetensors")
    with pytest.raises(BadInput, match=refused):
        dense_weight(checkpoint, stored_pairs(checkpoint)["x"])


@pytest.mark.parametrize("form", FORMS)
def test_the_share_is_one_of_what_the_model_stores(file: Path, form: str) -> None:
    before = small(file, form)
    result = compress(before, output=file.with_name("again.safetensors"), keep=0.6, factory=Network, embeddings=True)
    spec = LowRankSpec.from_dict(json.loads(open_checkpoint(before).metadata["compressor"]))
    numbers = {layer.name: layer.before for layer in result.plan.layers if layer.before is not None}
    assert numbers.keys() == spec.layers.keys()
    assert result.plan.eligible_after <= 0.6 * result.plan.eligible_before
    assert result.parameters.before == open_checkpoint(before).elements
    assert result.bytes.before == before.stat().st_size


@pytest.mark.parametrize("form", FORMS)
def test_at_the_ranks_that_it_has_every_tensor_is_what_it_was(file: Path, form: str) -> None:
    before = small(file, form)
    ranks = plan(before, keep=0.5, factory=Network, embeddings=True)
    pairs = stored_pairs(open_checkpoint(before))
    same = replace(
        ranks,
        layers=tuple(
            replace(layer, rank=pairs[layer.name].rank, form=pairs[layer.name].form)
            if layer.name in pairs
            else replace(layer, rank=None)
            for layer in ranks.layers
        ),
    )
    output = file.with_name("same.safetensors")
    compress(before, output=output, plan=same, factory=Network, embeddings=True)
    ours, theirs = load_file(output), load_file(before)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert torch.equal(outputs(output), outputs(before))


def test_what_is_left_out_stays_a_pair(file: Path) -> None:
    before, output = small(file), file.with_name("again.safetensors")
    result = compress(before, output=output, keep=0.4, factory=Network, exclude=["conv"])
    ours, theirs = load_file(output), load_file(before)
    assert {layer.name for layer in result.plan.layers}.isdisjoint({"conv", "table"})
    for name in ("conv.down.weight", "conv.up.weight", "conv.up.bias", "table.down.weight", "table.up.weight"):
        assert torch.equal(ours[name], theirs[name])
    spec = LowRankSpec.from_dict(json.loads(open_checkpoint(output).metadata["compressor"]))
    assert {"conv", "table"} <= spec.layers.keys()
    assert outputs(output).shape == outputs(before).shape


def test_layers_that_are_dense_are_compressed_with_the_pairs(file: Path) -> None:
    output = file.with_name("half.safetensors")
    compress(file, output=output, keep=0.5, factory=Network, include=["conv", "turned"])
    again = compress(output, output=file.with_name("all.safetensors"), keep=0.5, factory=Network)
    kinds = {layer.name: layer.before is None for layer in again.plan.layers if layer.rank is not None}
    assert kinds["fc"]
    assert not kinds["conv"]
    assert set(stored_pairs(open_checkpoint(str(again.output)))) >= {"conv", "turned", "fc"}


def test_calibration_decides_by_the_loss(file: Path) -> None:
    before = small(file)
    by_data = compress(
        before,
        output=file.with_name("data.safetensors"),
        keep=0.5,
        factory=Network,
        calibration=[TOKENS[:1], TOKENS[1:]],
        effort="fast",
        bits=16,
    )
    assert by_data.plan.error_name == "relative loss error"
    assert by_data.plan.eligible_after <= 0.5 * by_data.plan.eligible_before
    assert any(layer.before is not None and layer.rank is not None for layer in by_data.plan.layers)
    assert torch.isfinite(outputs(file.with_name("data.safetensors"))).all()


def test_the_file_says_what_it_was_made_of(file: Path) -> None:
    before = small(file)
    once, twice = file.with_name("once.safetensors"), file.with_name("twice.safetensors")
    compress(before, output=once, keep=0.7, factory=Network)
    compress(once, output=twice, keep=0.7, factory=Network)
    record = json.loads(open_checkpoint(twice).metadata["compressor"])
    assert [each["source"] for each in record["made_from"]] == [file.name, before.name]
    assert record["made_from"][0]["digest"] == open_checkpoint(file).digest()
    assert record["source"] == once.name
    assert record["digest"] == open_checkpoint(once).digest()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prefer": "speed"}, "no dense layers to be faster than"),
        ({"max_latency": 0.9}, "no dense layers to be faster than"),
        ({"keep": 0.5, "initial": 0}, "what is left of its initialization is not looked for"),
    ],
)
def test_what_compares_with_the_dense_layers_is_refused(file: Path, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        compress(small(file), output=file.with_name("again.safetensors"), factory=Network, **asked)


def test_a_rank_above_the_one_that_is_stored_is_refused(file: Path) -> None:
    before = small(file)
    ranks = plan(before, keep=0.6, factory=Network)
    high = replace(
        ranks, layers=tuple(replace(each, rank=19, form="channel") for each in ranks.layers if each.name == "conv")
    )
    with pytest.raises(BadInput, match=r"above the \d+ that it is stored at"):
        compress(before, output=file.with_name("again.safetensors"), plan=high, factory=Network)


def test_spatial_pairs_and_integers_stay_as_they_are(tmp_path: Path) -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(16, 24, 3), nn.Flatten(), nn.Linear(24 * 4, 64), nn.Linear(64, 48))

    save_file(network().state_dict(), tmp_path / "dense.safetensors")
    ranks = plan(tmp_path / "dense.safetensors", keep=0.5, factory=network)
    forms = {"0": ("spatial", 6), "2": ("plain@4g32", 9), "3": ("plain", 20)}
    given = replace(
        ranks,
        layers=tuple(replace(each, form=forms[each.name][0], rank=forms[each.name][1]) for each in ranks.layers),
    )
    compress(tmp_path / "dense.safetensors", output=tmp_path / "small.safetensors", plan=given, factory=network)
    again = compress(tmp_path / "small.safetensors", output=tmp_path / "again.safetensors", keep=0.5, factory=network)
    assert [layer.name for layer in again.plan.layers] == ["3"]
    reasons = {layer.name: layer.skip for layer in again.skipped}
    assert "spatial" in str(reasons["0"])
    assert "4 bits" in str(reasons["2"])
    ours, theirs = load_file(tmp_path / "again.safetensors"), load_file(tmp_path / "small.safetensors")
    kept = [name for name in theirs if not name.startswith("3.")]
    assert all(torch.equal(ours[name], theirs[name]) for name in kept)
    x = torch.randn(2, 16, 4, 4)
    assert load_model(tmp_path / "again.safetensors", network)(x).shape == (2, 48)


@pytest.mark.parametrize("name", [name for name, each in ARCHITECTURES.items() if each.fused is not None])
def test_experts_that_were_taken_apart_stay_apart(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    architecture.dense().save_pretrained(tmp_path / "dense")
    asked: dict[str, Any] = {"calibration": "none", "prefer": "size"}
    compress(tmp_path / "dense", output=tmp_path / "small", keep=0.7, **asked)
    result = compress(tmp_path / "small", output=tmp_path / "smaller", keep=0.6, calibration="none")
    assert result.plan.squeezed > 0
    restore(tmp_path / "smaller", output=tmp_path / "restored")
    assert load_file(tmp_path / "restored" / "model.safetensors").keys() == (
        load_file(tmp_path / "dense" / "model.safetensors").keys()
    )
    inputs = architecture.inputs()
    with torch.no_grad():
        small, dense = (architecture.load(tmp_path / each)(**inputs).logits for each in ("smaller", "restored"))
    torch.testing.assert_close(small, dense, rtol=1e-4, atol=1e-5)


def test_what_others_quantized_stays_beside_the_pairs(tmp_path: Path) -> None:
    dense_folder(tmp_path / "model", stored.llama())
    store(tmp_path / "model", stored.float8_tensor, stored.FLOAT8)
    made = plan(tmp_path / "model", keep=0.9, calibration="none", prefer="size", bits=16, include=["*.up_proj"])
    ranks = replace(made, layers=tuple(replace(each, rank=24, form="plain") for each in made.layers))
    asked: dict[str, Any] = {"calibration": "none", "include": ["*.up_proj"]}
    compress(tmp_path / "model", output=tmp_path / "small", plan=ranks, **asked)
    result = compress(tmp_path / "small", output=tmp_path / "smaller", keep=0.5, **asked)
    assert result.plan.squeezed == len(result.plan.layers) == 2
    ours, theirs = (load_file(tmp_path / each / "model.safetensors") for each in ("smaller", "small"))
    floats = [name for name, each in theirs.items() if each.dtype.is_floating_point and each.dtype.itemsize == 1]
    assert floats
    assert all(torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8)) for name in floats)
    model = ARCHITECTURES["llama"].load(tmp_path / "smaller")
    assert torch.isfinite(model(torch.arange(3, 9)[None]).logits).all()


def test_inspect_reports_the_rank_that_pairs_use(file: Path) -> None:
    before = small(file)
    pairs = stored_pairs(open_checkpoint(before))
    found = {each.layer.name: each for each in inspect(before, factory=Network).layers if each.layer.eligible}
    conv = found["conv"]
    assert conv.ranks is not None
    assert conv.ranks.numerical == pairs["conv"].rank
    assert conv.to_dict()["stored"] == {"form": "channel", "rank": pairs["conv"].rank}
    dense = matrices(before)["conv.weight"].flatten(1).numpy()
    values = np.linalg.svd(dense, compute_uv=False)[: pairs["conv"].rank]
    np.testing.assert_allclose(conv.singular_values, values, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_folder_of_transformers_is_compressed_again(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    architecture.dense().save_pretrained(tmp_path / "dense")
    compress(
        tmp_path / "dense", output=tmp_path / "small", keep=0.7, prefer="size", calibration="none", embeddings=True
    )
    result = compress(tmp_path / "small", output=tmp_path / "smaller", keep=0.6, calibration="none", embeddings=True)
    assert result.plan.squeezed > 0
    loaded, told = architecture.load(tmp_path / "smaller", output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    restore(tmp_path / "smaller", output=tmp_path / "restored")
    inputs = architecture.inputs()
    with torch.no_grad():
        dense = architecture.load(tmp_path / "restored")(**inputs).logits
        torch.testing.assert_close(loaded(**inputs).logits, dense, rtol=1e-4, atol=1e-5)
    card = (tmp_path / "smaller" / "README.md").read_text()
    assert "low-rank already" in card
    with safe_open(tmp_path / "smaller" / "model.safetensors", "pt") as written:
        assert json.loads(written.metadata()["compressor"])["made_from"]


@pytest.mark.slow
def test_a_folder_is_calibrated_and_measured_beside_what_it_was(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["llama"]
    architecture.dense().save_pretrained(tmp_path / "dense")
    compress(tmp_path / "dense", output=tmp_path / "small", keep=0.7, prefer="size", calibration="none")
    tokens = torch.randint(3, 60, (8, 12), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": tokens, "labels": tokens}]
    result = compress(
        tmp_path / "small",
        output=tmp_path / "smaller",
        keep=0.7,
        calibration=[{"input_ids": tokens}],
        data=data,
        effort="fast",
        bits=16,
    )
    assert result.evaluation is not None
    before = evaluate(tmp_path / "small", data=data)
    assert result.evaluation.baseline_loss == pytest.approx(before.compressed_loss, rel=1e-5)


def test_a_module_with_pairs_is_refused(file: Path) -> None:
    module = load_model(small(file), Network)
    with pytest.raises(BadInput, match="compressed already"):
        compress(module, keep=0.5)
